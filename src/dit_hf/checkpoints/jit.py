"""JiT (https://github.com/LTH14/JiT): pixels, context tokens, the clean image as the network's output.

Shapes: `B` batch, `C` channels, `N` image tokens, `L` context tokens, `D` width, `p` patch size.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..presets import JIT_PRESETS
from .dit import DIT
from .family import Family
from .lightningdit import LIGHTNINGDIT
from .reference import block_forward, embed_time, linear_forward, norm_forward
from .sizes import Hints, count_blocks, infer_mlp_ratio


logger = logging.get_logger(__name__)

PREFIX = "net."
KEYS = {
    "pos_embed": "pos_embed.positions",  # a table that averaging the weights has moved, so it is no computed one
    "x_embedder.proj1.weight": "pos_embed.bottleneck.weight",
    "x_embedder.proj2.weight": "pos_embed.proj.weight",
    "x_embedder.proj2.bias": "pos_embed.proj.bias",
    "in_context_posemb": "context_embed.positions",
    "final_layer.norm_final.weight": "norm_out.norm.weight",
} | {key: ours for key, ours in DIT.keys.items() if not key.startswith("x_embedder.")}
PUBLISHED_LARGE = 512  # the image size from which on the published models have twice the noise

BLOCK = "transformer_blocks.0."
# The weights that sizes are read off, with their axes.
RANKS = {
    "pos_embed.positions": 3,
    "pos_embed.bottleneck.weight": 4,
    "pos_embed.proj.weight": 4,
    "context_embed.positions": 3,
    "class_embed.weight": 2,
    f"{BLOCK}attn.norm_q.weight": 1,
    f"{BLOCK}ff.gate_proj.weight": 2,
}


def infer_jit_config(weights: Mapping[str, torch.Tensor], hints: Hints, path: str | Path) -> dict:
    """
    Reads a model's options off its weights and the training arguments beside them.

    Args:
        weights (`dict[str, torch.Tensor]`): With our keys.
        hints (`Hints`):
            Nothing in the weights tells the start of the context tokens, nor the noise scale. The training arguments
            do; without them the former is needed, and the latter is that of the published models of this image size,
            which is logged.
        path (`str` or `Path`): Named in the log.

    Returns:
        `dict`: arguments of `JiTTransformer2DModel`.

    Raises:
        ValueError: if a weight is missing or its shape makes no sense, or the start of the context is unknown.
    """
    _check_shapes(weights)
    bottleneck_dim, in_channels, patch_size, _ = weights["pos_embed.bottleneck.weight"].shape
    dim, head_dim = (weights[name].shape[0] for name in ("pos_embed.proj.weight", f"{BLOCK}attn.norm_q.weight"))
    side = math.isqrt(tokens := weights["pos_embed.positions"].shape[1])
    if side**2 != tokens:
        raise ValueError(
            f"its table of positions has {tokens} tokens, which is not a square number; only square images can be "
            "converted."
        )
    if dim % head_dim:
        raise ValueError(f"the width {dim} is not divisible by {head_dim} channels per head.")
    if (heads := hints.heads(1)) not in (None, [dim // head_dim]):
        raise ValueError(f"it has {dim // head_dim} attention heads, not num_attention_heads={heads[0]}; omit that.")
    arguments, noise_scale = hints.arguments, hints.noise_scale
    starts: dict[Any, int] = {name: preset.in_context_start for name, preset in JIT_PRESETS.items()}
    size = arguments.get("model") if isinstance(arguments.get("model"), str) else None
    facts = {"in_context_start": starts.get(size), "noise_scale": arguments.get("noise_scale")}
    for name, fact in facts.items():
        if None not in (fact, given := getattr(hints, name)) and fact != given:
            logger.warning(f"Checkpoint {path}: it was trained with {name}={fact!r}; {given!r}, as given, is taken.")
    in_context_start = _context_start(arguments) if hints.in_context_start is None else hints.in_context_start
    if noise_scale is None:
        noise_scale = arguments.get("noise_scale")
    if noise_scale is None:
        noise_scale = 2.0 if side * patch_size >= PUBLISHED_LARGE else 1.0
        logger.warning(
            f"Checkpoint {path}: it is read as trained with a noise scale of {noise_scale}, as the published models "
            f"of {side * patch_size} pixels. Pass noise_scale (`--noise_scale`) if that is wrong."
        )
    return {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks.")),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": infer_mlp_ratio(len(weights[f"{BLOCK}ff.gate_proj.weight"]), dim, swiglu=True),
        "bottleneck_dim": bottleneck_dim,
        "in_context_len": weights["context_embed.positions"].shape[1],
        "in_context_start": in_context_start,
        "num_classes": len(weights["class_embed.weight"]) - 1,
        "dropout": arguments.get("proj_dropout", 0.0),
        "t_eps": arguments.get("t_eps", 0.05),
        "noise_scale": noise_scale,
    }


def _check_shapes(weights):
    """That the weights which sizes are read off are there, with the axes they need."""
    for name, rank in RANKS.items():
        key = next(key for key, names in JIT.key_table({"num_layers": 1}).items() if name in names)
        if name not in weights:
            raise ValueError(f"it is not a {JIT.name} model: the key {key!r} is missing.")
        if weights[name].ndim != rank or 0 in weights[name].shape:
            shape = tuple(weights[name].shape)
            raise ValueError(f"{key!r} has shape {shape}, where {rank} axes are needed.")


def _context_start(arguments):
    """The first block with context tokens, by the name of the size that was trained."""
    name = arguments.get("model")
    if not isinstance(name, str) or name not in JIT_PRESETS:
        raise ValueError(
            "nothing in it tells in which block the context tokens join (4 in the B sizes, 8 in "
            "L, 10 in H); pass in_context_start (`--in_context_start`)."
        )
    return JIT_PRESETS[name].in_context_start


def jit_reference_forward(
    weights: Mapping[str, torch.Tensor],
    config: Mapping,
    images: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """
    The clean image that the original code predicts in eval mode: an oracle that shares no code with the model.

    Args:
        weights (`dict[str, torch.Tensor]`): With the original's keys.
        config (`Mapping`): For the heads and the first block with context tokens.
        images (`torch.Tensor` of shape `(B, C, H, W)`): Noisy images of the size the checkpoint is for.
        time (`torch.Tensor` of shape `(B,)`): From noise at 0 to data at 1.
        labels (`torch.Tensor` of shape `(B,)`): Class ids.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`
    """
    weights = {key.removeprefix(PREFIX): weight for key, weight in weights.items()}
    heads = config["num_attention_heads"]
    first, second = (weights[f"x_embedder.proj{layer}.weight"].float() for layer in (1, 2))
    patch_size = first.shape[-1]
    tokens = F.conv2d(F.conv2d(images, first, stride=patch_size), second, weights["x_embedder.proj2.bias"].float())
    rows, columns = tokens.shape[-2:]
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"].float()  # (B, N, D)

    label = weights["y_embedder.embedding_table.weight"][labels].float()[:, None]
    condition = F.silu(embed_time(weights, "t_embedder", time)[:, None] + label)
    context = weights["in_context_posemb"].float() + label  # (B, L, D)

    angles = _angles(rows, columns, len(weights["blocks.0.attn.q_norm.weight"]))
    for index in range(config["num_layers"]):
        if index == config["in_context_start"]:
            tokens = torch.cat([context, tokens], dim=1)
            angles = F.pad(angles, (0, 0, context.shape[1], 0))  # context tokens are not turned
        tables = {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
        tokens = block_forward(weights | tables, f"blocks.{index}", heads, tokens, condition)
    tokens = tokens[:, -rows * columns :]
    shift, scale = linear_forward(weights, "final_layer.adaLN_modulation.1", condition).chunk(2, dim=-1)
    tokens = norm_forward(weights, "final_layer.norm_final", tokens) * (1 + scale) + shift
    output = linear_forward(weights, "final_layer.linear", tokens)
    output = output.reshape(len(output), rows, columns, patch_size, patch_size, -1)
    return torch.einsum("bhwpqc->bchpwq", output).reshape(images.shape)


def _angles(rows, columns, head_dim):
    """Rotary angles `(N, D/heads)`: half of the channels for the row, half for the column, two neighbours alike."""
    frequencies = 10000.0 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()  # (N, 2)
    return (places[:, :, None] * frequencies).flatten(1).repeat_interleave(2, dim=1)


def infer(family, original, hints, path):
    """As [`dit_hf.checkpoints.sizes.infer`]."""
    ours = family.to_ours(original, {"num_layers": count_blocks(original, family)})
    return infer_jit_config(ours, hints, path), original, ours


def jit_reference_velocity(weights, config, images, time, labels):
    """The velocity data − noise of [`jit_reference_forward`]'s image, as its sampler computes it."""
    image = jit_reference_forward(weights, config, images, time, labels)
    return (image - images) / (1 - time).clamp(min=config["t_eps"]).view(-1, 1, 1, 1)


def published_scale(config):
    """The guidance scale of the published results; that of B for a size that was never published."""
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "sample_size")
    fits = (preset for preset in JIT_PRESETS.values() if all(getattr(preset, name) == config[name] for name in sizes))
    return next((preset.guidance_scale for preset in fits), JIT_PRESETS["JiT-B/16"].guidance_scale)


JIT = Family(
    "jit",
    keys={PREFIX + key: ours for key, ours in KEYS.items()},
    block_layers={
        layer: ours for layer, ours in LIGHTNINGDIT.block_layers.items() if layer not in ("mlp.fc1", "mlp.fc2")
    },
    options={"has_null_class": (True,)},
    tables={},
    predictions=("velocity",),
    blocks=PREFIX + "blocks",
    model="JiTTransformer2DModel",
    infer=infer,
    reference_forward=jit_reference_velocity,
    data_at_one=True,
    bakes=False,  # the model turns the clean image into a velocity
    marks=(PREFIX + "in_context_posemb",),
    wrapper="model_ema1",
    other_wrappers=("model", "model_ema2"),
    scheduler="flow_heun",
    # Guidance for times above 0.1, which are the evaluations from the twelfth of 99 on.
    recommended_call={"num_inference_steps": 50, "guidance_scale": 3.0, "guidance_interval": (11 / 99, 1.0)},
    guidance_scale=published_scale,
)
