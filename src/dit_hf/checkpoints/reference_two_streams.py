"""The forward pass of two-stream models from their own weights and keys: an oracle that shares no code with the model.

Shapes: `B` batch, `C` channels, `N` tokens, `D` width, `p` patch size.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .reference import _block, _embed_time, _linear, _norm


def ddt_reference_forward(
    weights: dict[str, torch.Tensor],
    config: Mapping,
    latents: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What DDT's code computes in eval mode.

    Args:
        weights (`dict[str, torch.Tensor]`): A checkpoint with DDT's keys, without a prefix.
        config (`Mapping`): For the heads, the encoder's blocks and the patch size.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents.
        time (`torch.Tensor` of shape `(B,)`): From noise at 0 to data at 1.
        labels (`torch.Tensor` of shape `(B,)`): Class ids.
        state (`torch.Tensor` of shape `(B, N, D)`, *optional*): Of an earlier pass.

    Returns:
        `tuple`: the velocity data − noise `(B, C, H, W)`, and the state.
    """
    side, heads = config["patch_size"], config["num_attention_heads"]
    rows, columns = (size // side for size in latents.shape[-2:])
    weights = {key.replace("adaLN_modulation.0.", "adaLN_modulation.1."): value for key, value in weights.items()}
    for index in range(config["num_layers"]):
        gate, value = (weights.pop(f"blocks.{index}.mlp.{name}.weight") for name in ("w1", "w3"))
        weights[f"blocks.{index}.mlp.w12.weight"] = torch.cat([gate, value])
        weights[f"blocks.{index}.mlp.w3.weight"] = weights.pop(f"blocks.{index}.mlp.w2.weight")
    head_dim = len(weights["blocks.0.attn.q_norm.weight"])
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    x = (torch.linspace(0, 16, columns).repeat(rows)[:, None] * frequencies).float()
    y = (torch.linspace(0, 16, rows).repeat_interleave(columns)[:, None] * frequencies).float()
    angles = torch.stack([x, y], dim=-1).flatten(1).repeat_interleave(2, dim=1)  # (N, D/heads)
    tables = {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}

    patches = F.unfold(latents, side, stride=side).transpose(1, 2)  # (B, N, C·p·p)
    if state is None:
        embedded_time = _embed_time(weights, "t_embedder", time, period=10)[:, None]
        label = weights["y_embedder.embedding_table.weight"][labels].float()[:, None]
        tokens = _linear(weights, "s_embedder.proj", patches)
        for index in range(config["num_encoder_layers"]):
            tokens = _block(weights | tables, f"blocks.{index}", heads, tokens, F.silu(embedded_time + label))
        state = F.silu(embedded_time + tokens)
    tokens = _linear(weights, "x_embedder.proj", patches)
    for index in range(config["num_encoder_layers"], config["num_layers"]):
        tokens = _block(weights | tables, f"blocks.{index}", heads, tokens, state)
    output = _head(weights, tokens, state)
    return F.fold(output.transpose(1, 2), latents.shape[-2:], side, stride=side), state


def rae_reference_forward(
    weights: dict[str, torch.Tensor],
    config: Mapping,
    latents: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """
    What RAE's DiT-DH computes in eval mode.

    Args:
        weights (`dict[str, torch.Tensor]`): A checkpoint with its keys.
        config (`Mapping`): For the heads and the encoder's blocks.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents of the size the checkpoint is for.
        time (`torch.Tensor` of shape `(B,)`): From data at 0 to noise at 1.
        labels (`torch.Tensor` of shape `(B,)`): Class ids.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: the velocity noise − data.
    """
    pixels = latents.flatten(2).transpose(1, 2)  # (B, N, C)
    embedded_time = _embed_fourier_time(weights, time)[:, None]
    label = weights["y_embedder.embedding_table.weight"][labels].float()[:, None]
    tokens = F.linear(
        pixels, weights["s_embedder.proj.weight"].float().flatten(1), weights["s_embedder.proj.bias"].float()
    )
    if "pos_embed" in weights:
        tokens = tokens + weights["pos_embed"].float()
    condition = F.silu(F.silu(embedded_time + label))
    for index in range(config["num_encoder_layers"]):
        tables = _stream_tables(weights, "enc")
        tokens = _block(weights | tables, f"blocks.{index}", config["num_attention_heads"], tokens, condition)
    condition = F.silu(embedded_time + tokens)
    if "s_projector.weight" in weights:
        condition = _linear(weights, "s_projector", condition)
    condition = F.silu(condition)
    tokens = F.linear(
        pixels, weights["x_embedder.proj.weight"].float().flatten(1), weights["x_embedder.proj.bias"].float()
    )
    heads = config["decoder_num_attention_heads"] or config["num_attention_heads"]
    for index in range(config["num_encoder_layers"], config["num_layers"]):
        tables = _stream_tables(weights, "dec")
        tokens = _block(weights | tables, f"blocks.{index}", heads, tokens, condition)
    return _head(weights, tokens, condition).transpose(1, 2).reshape(latents.shape)


def _embed_fourier_time(weights, time):
    angles = 2 * math.pi * weights["t_embedder.W"].double() * time[:, None].double()
    features = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return _linear(weights, "t_embedder.mlp.2", F.silu(_linear(weights, "t_embedder.mlp.0", features)))


def _stream_tables(weights, stream):
    return {f"feat_rope.freqs_{name}": weights[f"{stream}_feat_rope.freqs_{name}"] for name in ("cos", "sin")}


def _head(weights, tokens, condition):
    shift, scale = _linear(weights, "final_layer.adaLN_modulation.1", condition).chunk(2, dim=-1)
    return _linear(
        weights, "final_layer.linear", _norm(weights, "final_layer.norm_final", tokens) * (1 + scale) + shift
    )
