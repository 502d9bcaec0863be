"""What the original code of an autoencoder computes, written from its layout, straight and slow.

Shapes: `B` batch, `C` channels, `H W` pixels, `h w` latent size, `Z` latent channels.
"""

from itertools import count, takewhile

import torch
import torch.nn.functional as F


def reference_encode(weights: dict[str, torch.Tensor], groups: int, images: torch.Tensor) -> torch.Tensor:
    """
    What the original's encoder computes.

    Args:
        weights (`dict[str, torch.Tensor]`): With the original's keys.
        groups (`int`): Of the group norms.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1].

    Returns:
        `torch.Tensor` of shape `(B, 2Z, h, w)`: mean and logarithm of the variance.
    """
    states = _convolve(weights, "encoder.conv_in", images)
    for level in _indices(weights, "encoder.down.{}.block.0.conv1.weight"):
        states = _level(weights, f"encoder.down.{level}", groups, states)
        if f"encoder.down.{level}.downsample.conv.weight" in weights:
            padded = F.pad(states, (0, 1, 0, 1))
            states = _convolve(weights, f"encoder.down.{level}.downsample.conv", padded, stride=2, padding=0)
    states = _end(weights, "encoder", groups, _middle(weights, "encoder.mid", groups, states))
    return _convolve(weights, "quant_conv", states)


def reference_decode(weights: dict[str, torch.Tensor], groups: int, latents: torch.Tensor) -> torch.Tensor:
    """
    What the original's decoder computes.

    Args:
        weights (`dict[str, torch.Tensor]`): With the original's keys.
        groups (`int`): Of the group norms.
        latents (`torch.Tensor` of shape `(B, Z, h, w)`): As the encoder gives them, not normalised.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`
    """
    states = _convolve(weights, "decoder.conv_in", _convolve(weights, "post_quant_conv", latents))
    states = _middle(weights, "decoder.mid", groups, states)
    for level in reversed(_indices(weights, "decoder.up.{}.block.0.conv1.weight")):
        states = _level(weights, f"decoder.up.{level}", groups, states)
        if f"decoder.up.{level}.upsample.conv.weight" in weights:
            doubled = states.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            states = _convolve(weights, f"decoder.up.{level}.upsample.conv", doubled)
    return _end(weights, "decoder", groups, states)


def _indices(weights, name):
    return list(takewhile(lambda index: name.format(index) in weights, count()))


def _convolve(weights, name, states, stride=1, padding=None):
    # Half precision becomes float32 here, one weight at a time.
    kernel, bias = (weights[f"{name}.{kind}"].float() for kind in ("weight", "bias"))
    return F.conv2d(states, kernel, bias, stride, kernel.shape[-1] // 2 if padding is None else padding)


def _norm(weights, name, groups, states):
    scale, shift = (weights[f"{name}.{kind}"].float() for kind in ("weight", "bias"))
    return F.group_norm(states, groups, scale, shift, 1e-6)


def _level(weights, name, groups, states):
    for index in _indices(weights, f"{name}.block.{{}}.conv1.weight"):
        states = _block(weights, f"{name}.block.{index}", groups, states)
        if f"{name}.attn.{index}.norm.weight" in weights:
            states = _attention(weights, f"{name}.attn.{index}", groups, states)
    return states


def _middle(weights, name, groups, states):
    states = _block(weights, f"{name}.block_1", groups, states)
    states = _attention(weights, f"{name}.attn_1", groups, states)
    return _block(weights, f"{name}.block_2", groups, states)


def _end(weights, name, groups, states):
    return _convolve(weights, f"{name}.conv_out", F.silu(_norm(weights, f"{name}.norm_out", groups, states)))


def _block(weights, name, groups, states):
    inner = states
    for number in (1, 2):
        inner = F.silu(_norm(weights, f"{name}.norm{number}", groups, inner))
        inner = _convolve(weights, f"{name}.conv{number}", inner)
    if f"{name}.nin_shortcut.weight" in weights:
        states = _convolve(weights, f"{name}.nin_shortcut", states)
    return states + inner


def _attention(weights, name, groups, states):
    inner = _norm(weights, f"{name}.norm", groups, states)
    query, key, value = (_convolve(weights, f"{name}.{kind}", inner).flatten(2) for kind in "qkv")  # (B, C, h·w)
    scores = (query.transpose(1, 2) @ key) * query.shape[1] ** -0.5
    mixed = value @ scores.softmax(dim=-1).transpose(1, 2)
    return states + _convolve(weights, f"{name}.proj_out", mixed.view_as(states))


def reference_decode_tokens(
    weights: dict[str, torch.Tensor], heads: int, latents: torch.Tensor, patch_size: int
) -> torch.Tensor:
    """
    What the decoder of RAE computes.

    Args:
        weights (`dict[str, torch.Tensor]`): With the original's keys.
        heads (`int`): Of its attention.
        latents (`torch.Tensor` of shape `(B, Z, h, w)`): As the encoder gives them, not normalised.
        patch_size (`int`): Pixels of an image per token, along each side.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: normalised as the encoder's images are.
    """
    batch, _, height, width = latents.shape
    tokens = _linear(weights, "decoder_embed", latents.flatten(2).transpose(1, 2))
    first = weights["trainable_cls_token"].float().expand(batch, -1, -1)
    states = torch.cat([first, tokens], dim=1) + weights["decoder_pos_embed"].float()
    for index in _indices(weights, "decoder_layers.{}.layernorm_before.weight"):
        states = _token_block(weights, f"decoder_layers.{index}", heads, states)
    states = _linear(weights, "decoder_pred", _layer_norm(weights, "decoder_norm", states))[:, 1:]
    patches = states.view(batch, height, width, patch_size, patch_size, 3)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, height * patch_size, width * patch_size)


def _linear(weights, name, states):
    return F.linear(states, weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())


def _layer_norm(weights, name, states):
    scale, shift = (weights[f"{name}.{kind}"].float() for kind in ("weight", "bias"))
    return F.layer_norm(states, scale.shape, scale, shift, 1e-12)


def _token_block(weights, name, heads, states):
    inner = _layer_norm(weights, f"{name}.layernorm_before", states)
    query, key, value = (
        _linear(weights, f"{name}.attention.attention.{kind}", inner).unflatten(2, (heads, -1)).transpose(1, 2)
        for kind in ("query", "key", "value")
    )  # (B, heads, tokens, width of a head)
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    states = states + _linear(weights, f"{name}.attention.output.dense", mixed)
    inner = _layer_norm(weights, f"{name}.layernorm_after", states)
    inner = F.gelu(_linear(weights, f"{name}.intermediate.dense", inner))
    return states + _linear(weights, f"{name}.output.dense", inner)
