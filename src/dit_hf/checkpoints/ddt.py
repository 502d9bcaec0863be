"""DDT (https://github.com/MCG-NJU/DDT): a Lightning file with two models, from noise at 0 to data at 1."""

import math
from collections.abc import Mapping, Sequence

import torch
from diffusers.utils import logging

from ..transformer_ddt import MAX_PERIOD
from .reference_two_streams import ddt_reference_forward
from .two_streams import BLOCK_LAYERS, KEYS, Layout, TwoStreamFamily, check_axes, count_blocks, infer_streams, reorder


logger = logging.get_logger(__name__)

LAYERS = {
    "mlp.w1": ("ff.gate_proj",),
    "mlp.w3": ("ff.up_proj",),
    "mlp.w2": ("ff.down_proj",),
    "adaLN_modulation.0": ("modulation",),
}
HEAD = {f"final_layer.adaLN_modulation.0.{kind}": f"norm_out.linear.{kind}" for kind in ("weight", "bias")}
OPTIONS: dict[str, tuple] = {
    "time_embedding": ("sinusoidal",),
    "position_table": (False,),
    "rotary_span": (16.0,),
    "norm": ("rms_norm",),
    "head_norm": ("layer_norm",),
    "qk_norm": (True,),
    "ff": ("swiglu",),
    "bias": (False,),
    "modulation_activation": (False,),
    "decoder_num_attention_heads": (None,),
    "decoder_attention_head_dim": (None,),
    "has_null_class": (True,),
}
AXES = {
    "s_embedder.proj.weight": 2,
    "x_embedder.proj.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.attn.q_norm.weight": 1,
}
# Width and blocks -> blocks of the encoder, of the published models: the weights do not tell.
KNOWN_ENCODERS = {(1152, 28): 22}
# The published models have 16×16 patches.
PATCHES = 16
# Channels that latents, or pixels, are assumed to have if nothing tells.
KNOWN_CHANNELS = (4, 3)


def ddt_layouts(config: Mapping) -> dict[str, Layout]:
    """
    Patches are (channel, row, column) vectors, and a linear layer embeds them. Rotary positions take pairs of channels
    in turns for column and row, in ours the first half is for the row: a permutation that attention does not see.

    Args:
        config (`Mapping`): A `DDTTransformer2DModel`'s config.

    Returns:
        `dict`: by the ends of our keys.
    """
    side, channels = config["patch_size"], config["in_channels"]
    patch = torch.arange(channels * side**2).view(channels, side, side).permute(1, 2, 0).flatten()
    head = torch.arange(config["attention_head_dim"]).view(-1, 2, 2).flip(1).transpose(0, 1).flatten()
    first = torch.arange(config["num_attention_heads"]) * config["attention_head_dim"]
    heads = (first[:, None] + head).flatten()
    return {
        "patch_embed.proj.weight": (
            lambda weight: weight.unflatten(1, (channels, side, side)),
            lambda weight: weight.flatten(1),
        ),
        "attn.to_q.weight": reorder(heads),
        "attn.to_k.weight": reorder(heads),
        "attn.norm_q.weight": reorder(head),
        "attn.norm_k.weight": reorder(head),
        "proj_out.weight": reorder(patch),
        "proj_out.bias": reorder(patch),
    }


def infer_config(
    original: Mapping[str, torch.Tensor],
    num_attention_heads: Sequence[int] | None = None,
    num_encoder_blocks: int | None = None,
    in_channels: int | None = None,
    name: str = "checkpoint",
) -> dict:
    """
    Reads a model's sizes off its weights.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys, without a prefix.
        num_attention_heads (`Sequence[int]`, *optional*): Of the two streams; the weights tell as well.
        num_encoder_blocks (`int`, *optional*): Needed if the model is none of the published ones.
        in_channels (`int`, *optional*): The weights only tell its product with the patch size squared.
        name (`str`): Of the checkpoint, for messages.

    Returns:
        `dict`: arguments of `DDTTransformer2DModel`.

    Raises:
        ValueError: if something can't be known, or the weights contradict each other.
    """
    check_axes(original, AXES)
    width, patch_values = original["s_embedder.proj.weight"].shape
    num_layers = count_blocks(original)
    if num_encoder_blocks is None:
        num_encoder_blocks = KNOWN_ENCODERS.get((width, num_layers))
        if num_encoder_blocks is None:
            raise ValueError(
                f"the weights don't tell how many of its {num_layers} blocks are the encoder; pass "
                "num_encoder_blocks (`--num_encoder_blocks`)."
            )
        logger.warning(
            f"{name}: read as a model with {num_encoder_blocks} of its {num_layers} blocks in the encoder, as the "
            "published ones. Pass num_encoder_blocks (`--num_encoder_blocks`) if that is wrong."
        )
    head_dim = len(original["blocks.0.attn.q_norm.weight"])
    streams = infer_streams(original, (head_dim, head_dim), num_attention_heads, num_encoder_blocks, "mlp.w2")
    if streams["decoder_num_attention_heads"] is not None:
        raise ValueError("its encoder and decoder differ in width or heads; those of a DDT model are equal.")
    channels, side = _split_patch(patch_values, in_channels, name)
    return _fixed() | streams | {"in_channels": channels, "patch_size": side, "sample_size": PATCHES * side}


def infer(family, original, hints, path):
    """As [`dit_hf.checkpoints.sizes.infer`]."""
    told = (hints.heads(2), hints.num_encoder_blocks, hints.in_channels)
    config = infer_config(original, *told, name=f"Checkpoint {path}")
    return config, original, family.to_ours(original, config)


def _split_patch(patch_values, in_channels, name):
    """Channels and side of a patch; a guess other than the published models' is logged."""
    for channels in (in_channels,) if in_channels else KNOWN_CHANNELS:
        side = math.isqrt(patch_values // channels)
        if side and channels * side**2 == patch_values:
            if in_channels is None and patch_values != 16:
                logger.warning(
                    f"{name}: its patches of {patch_values} values are read as {channels} channels of {side}×{side}. "
                    "Pass in_channels (`--in_channels`) if that is wrong."
                )
            return channels, side
    raise ValueError(
        f"its patches have {patch_values} values, which are not square patches of "
        f"{' or '.join(map(str, (in_channels,) if in_channels else KNOWN_CHANNELS))} channels; pass in_channels "
        "(`--in_channels`)."
    )


def _fixed():
    return {name: values[0] for name, values in OPTIONS.items() if name != "has_null_class"}


DDT = TwoStreamFamily(
    "ddt",
    KEYS | HEAD,
    BLOCK_LAYERS | LAYERS,
    OPTIONS,
    tables={},
    predictions=("velocity",),
    model="DDTTransformer2DModel",
    infer=infer,
    marks=("ema_denoiser.", "denoiser."),
    data_at_one=True,
    max_period=MAX_PERIOD,
    training_only=("diffusion_trainer.",),
    needs_training_only=False,
    wrapper="state_dict",
    writes_tables=False,
    scheduler="flow_ddt",
    # Guidance for times above 0.3, which are the steps from the 79th of 250 on.
    recommended_call={"num_inference_steps": 250, "guidance_scale": 2.0, "guidance_interval": (78 / 250, 1.0)},
    guidance_scale=lambda config: 3.0 if config["sample_size"] >= 64 else 2.0,  # 512 pixels, 256
    prefixes={"ema": "ema_denoiser.", "model": "denoiser."},
    layouts=ddt_layouts,
    reference_forward=ddt_reference_forward,
)
