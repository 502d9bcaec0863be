"""The forward pass of every family from its own weights and keys: an oracle that shares no code with ours.

Written from the papers and from what the recorded outputs of the original code bases show, straight and slow.

Shapes: `B` batch, `C` channels, `N` tokens, `D` width, `p` patch size.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F


def reference_forward(
    weights: dict[str, torch.Tensor],
    config: Mapping,
    latents: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor,
    end: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What the original code computes in eval mode.

    Args:
        weights (`dict[str, torch.Tensor]`): A checkpoint with the keys of DiT, SiT, REPA, LightningDiT or MeanFlow.
        config (`Mapping`): For the attention heads.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents of the size the checkpoint is for.
        time (`torch.Tensor` of shape `(B,)`): In the original's convention.
        labels (`torch.Tensor` of shape `(B,)`): Class ids.
        end (`torch.Tensor` of shape `(B,)`, *optional*): Where the interval ends that begins at `time`, for MeanFlow.

    Returns:
        `torch.Tensor` of shape `(B, C or 2C, H, W)`: all channels of the head.
    """
    patch_size = weights["x_embedder.proj.weight"].shape[-1]
    kernel, bias = (weights[f"x_embedder.proj.{kind}"].float() for kind in ("weight", "bias"))
    tokens = F.conv2d(latents, kernel, bias, stride=patch_size)  # (B, D, h, w)
    grid = tokens.shape[-2:]
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"].float()

    condition = embed_time(weights, "t_embedder", time)
    if end is not None:
        condition = condition + embed_time(weights, "r_embedder", time - end)
    condition = F.silu(condition + weights["y_embedder.embedding_table.weight"][labels].float())[:, None]

    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    for index in range(depth):
        tokens = block_forward(weights, f"blocks.{index}", config["num_attention_heads"], tokens, condition)
    shift, scale = linear_forward(weights, "final_layer.adaLN_modulation.1", condition).chunk(2, dim=-1)
    tokens = norm_forward(weights, "final_layer.norm_final", tokens) * (1 + scale) + shift
    output = linear_forward(weights, "final_layer.linear", tokens)
    output = output.reshape(len(output), *grid, patch_size, patch_size, -1)
    return torch.einsum("bhwpqc->bchpwq", output).reshape(len(output), -1, *latents.shape[-2:])


def embed_time(weights, name, time, period=10000):
    """Cosines before sines of fixed frequencies, sines before cosines of RAE's random ones."""
    if f"{name}.W" in weights:
        angles = time[:, None].double() * weights[f"{name}.W"].double() * 2 * math.pi
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    else:
        angles = time[:, None].float() * torch.exp(-math.log(period) * torch.arange(128) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = linear_forward(weights, f"{name}.mlp.0", waves)
    return linear_forward(weights, f"{name}.mlp.2", F.silu(hidden))


def linear_forward(weights, name, values):
    # Half precision becomes float32 here, one weight at a time.
    bias = weights[f"{name}.bias"].float() if f"{name}.bias" in weights else None
    return F.linear(values, weights[f"{name}.weight"].float(), bias)


def norm_forward(weights, name, values, layer_norm_epsilon=1e-6):
    """RMS norm if there is a weight without bias, layer norm with or without both otherwise."""
    weight, bias = (
        weights[f"{name}.{kind}"].float() if f"{name}.{kind}" in weights else None for kind in ("weight", "bias")
    )
    if weight is not None and bias is None:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * weight
    return F.layer_norm(values, values.shape[-1:], weight, bias, layer_norm_epsilon)


def _rotate(values, cosines, sines):
    """Turns neighbouring pairs of channels."""
    pairs = values.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return values * cosines + turned * sines


def block_forward(weights, name, heads, tokens, condition):
    vectors = linear_forward(weights, f"{name}.adaLN_modulation.1", condition).split(tokens.shape[-1], dim=-1)
    if len(vectors) == 4:
        scale_1, gate_1, scale_2, gate_2 = vectors
        shift_1 = shift_2 = torch.zeros(())
    else:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors
    inner = norm_forward(weights, f"{name}.norm1", tokens) * (1 + scale_1) + shift_1
    tokens = tokens + gate_1 * _attention(weights, f"{name}.attn", heads, inner)
    inner = norm_forward(weights, f"{name}.norm2", tokens) * (1 + scale_2) + shift_2
    if f"{name}.mlp.w12.weight" in weights:
        gate, value = linear_forward(weights, f"{name}.mlp.w12", inner).chunk(2, dim=-1)
        inner = linear_forward(weights, f"{name}.mlp.w3", F.silu(gate) * value)
    else:
        inner = F.gelu(linear_forward(weights, f"{name}.mlp.fc1", inner), approximate="tanh")
        inner = linear_forward(weights, f"{name}.mlp.fc2", inner)
    return tokens + gate_2 * inner


def _attention(weights, name, heads, tokens):
    stacked = linear_forward(weights, f"{name}.qkv", tokens).unflatten(-1, (3, heads, -1))
    query, key, value = stacked.permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads) each
    if f"{name}.q_norm.weight" in weights:
        query, key = (
            norm_forward(weights, f"{name}.{which}_norm", states, 1e-5) for which, states in (("q", query), ("k", key))
        )
    if "feat_rope.freqs_cos" in weights:
        tables = weights["feat_rope.freqs_cos"].float(), weights["feat_rope.freqs_sin"].float()
        query, key = _rotate(query, *tables), _rotate(key, *tables)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mixed = scores.softmax(dim=-1) @ value
    return linear_forward(weights, f"{name}.proj", mixed.transpose(1, 2).flatten(2))
