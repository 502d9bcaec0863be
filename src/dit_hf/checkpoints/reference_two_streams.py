"""The forward pass of two-stream models from their own weights and keys: an oracle that shares no code with the model.

Shapes: `B` batch, `C` channels, `N` tokens, `D` width, `p` patch size.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .reference import block_forward, embed_time, linear_forward, norm_forward


def ddt_reference_forward(
    weights: dict[str, torch.Tensor],
    config: Mapping,
    latents: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What DDT's code computes in eval mode.

    Args:
        weights (`dict[str, torch.Tensor]`): A checkpoint with DDT's keys, without a prefix.
        config (`Mapping`): For the heads, the encoder's blocks and the patch size.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents.
        time (`torch.Tensor` of shape `(B,)`): From noise at 0 to data at 1.
        labels (`torch.Tensor` of shape `(B,)`): Class ids.
        state (`torch.Tensor` of shape `(B, N, D)`, *optional*): What [`ddt_reference_state`] returned, if known.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: the velocity data − noise.
    """
    if state is None:
        state = ddt_reference_state(weights, config, latents, time, labels)
    side = config["patch_size"]
    blocks = range(config["num_encoder_layers"], config["num_layers"])
    tokens = linear_forward(weights, "x_embedder.proj", F.unfold(latents, side, stride=side).transpose(1, 2))
    tokens = _ddt_blocks(weights, config, latents, blocks, tokens, state)
    output = _head(_with_common_names(weights), tokens, state)
    return F.fold(output.transpose(1, 2), latents.shape[-2:], side, stride=side)


def ddt_reference_state(
    weights: dict[str, torch.Tensor],
    config: Mapping,
    latents: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """
    The encoder's output.

    Args:
        weights, config, latents, time, labels: As [`ddt_reference_forward`] takes them.

    Returns:
        `torch.Tensor` of shape `(B, N, D)`
    """
    side = config["patch_size"]
    embedded_time = embed_time(weights, "t_embedder", time, period=10)[:, None]
    label = weights["y_embedder.embedding_table.weight"][labels].float()[:, None]
    tokens = linear_forward(weights, "s_embedder.proj", F.unfold(latents, side, stride=side).transpose(1, 2))
    blocks = range(config["num_encoder_layers"])
    return F.silu(embedded_time + _ddt_blocks(weights, config, latents, blocks, tokens, F.silu(embedded_time + label)))


def _ddt_blocks(weights, config, latents, blocks, tokens, condition):
    """Rotary positions of pairs of channels are in turns the column's and the row's, from 0 to 16 on any grid."""
    rows, columns = (size // config["patch_size"] for size in latents.shape[-2:])
    head_dim = len(weights["blocks.0.attn.q_norm.weight"])
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    x = torch.linspace(0, 16, columns).repeat(rows)[:, None] * frequencies
    y = torch.linspace(0, 16, rows).repeat_interleave(columns)[:, None] * frequencies
    angles = torch.stack([x, y], dim=-1).flatten(1).repeat_interleave(2, dim=1)  # (N, D/heads)
    tables = {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    for index in blocks:
        name = f"blocks.{index}."
        block = {key: weight for key, weight in weights.items() if key.startswith(name)}
        gate, value, down = (block.pop(f"{name}mlp.{layer}.weight") for layer in ("w1", "w3", "w2"))
        block |= {f"{name}mlp.w12.weight": torch.cat([gate, value]), f"{name}mlp.w3.weight": down}
        block = _with_common_names(block) | tables
        tokens = block_forward(block, f"blocks.{index}", config["num_attention_heads"], tokens, condition)
    return tokens


def _with_common_names(weights):
    """DDT has no activation before the layers that regress modulation, and so another index."""
    return {key.replace("adaLN_modulation.0.", "adaLN_modulation.1."): weight for key, weight in weights.items()}


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
    embedded_time = embed_time(weights, "t_embedder", time)[:, None]
    label = weights["y_embedder.embedding_table.weight"][labels].float()[:, None]
    tokens = _embed_pixels(weights, "s_embedder.proj", latents)
    if "pos_embed" in weights:
        tokens = tokens + weights["pos_embed"].float()
    condition = F.silu(F.silu(embedded_time + label))
    heads = config["num_attention_heads"]
    encoder = weights | _stream_tables(weights, "enc")
    for index in range(config["num_encoder_layers"]):
        tokens = block_forward(encoder, f"blocks.{index}", heads, tokens, condition)
    condition = F.silu(embedded_time + tokens)
    if "s_projector.weight" in weights:
        condition = linear_forward(weights, "s_projector", condition)
    condition = F.silu(condition)
    tokens = _embed_pixels(weights, "x_embedder.proj", latents)
    decoder = weights | _stream_tables(weights, "dec")
    decoder_heads = config["decoder_num_attention_heads"] or heads
    for index in range(config["num_encoder_layers"], config["num_layers"]):
        tokens = block_forward(decoder, f"blocks.{index}", decoder_heads, tokens, condition)
    return _head(weights, tokens, condition).transpose(1, 2).reshape(latents.shape)


def _embed_pixels(weights, name, latents):
    """A kernel of one pixel, so a linear layer of each pixel's channels, `(B, N, D)`."""
    kernel, bias = (weights[f"{name}.{kind}"].float() for kind in ("weight", "bias"))
    return F.linear(latents.flatten(2).transpose(1, 2), kernel.flatten(1), bias)


def _stream_tables(weights, stream):
    return {f"feat_rope.freqs_{name}": weights[f"{stream}_feat_rope.freqs_{name}"] for name in ("cos", "sin")}


def _head(weights, tokens, condition):
    shift, scale = linear_forward(weights, "final_layer.adaLN_modulation.1", condition).chunk(2, dim=-1)
    tokens = norm_forward(weights, "final_layer.norm_final", tokens) * (1 + scale) + shift
    return linear_forward(weights, "final_layer.linear", tokens)
