"""Whether a converted autoencoder computes what its checkpoint computes, by an independent forward pass.

Written from the layout of latent diffusion's autoencoder, straight and slow.

Shapes: `B` batch, `C` channels, `H W` pixels, `h w` latent size, `Z` latent channels.
"""

from itertools import count, takewhile

import torch
import torch.nn.functional as F

from ..seeds import seeded_generator
from .autoencoder import Autoencoder, original_autoencoder
from .parity import Parity, compare_weights, largest, output_distance


def measure_autoencoder_parity(autoencoder: Autoencoder, vae, seed: int = 0) -> Parity:
    """
    Encodes and decodes seeded inputs with the checkpoint's own weights beside the model.

    Args:
        autoencoder (`Autoencoder`): From [`dit_hf.checkpoints.autoencoder.parse_autoencoder`].
        vae (`AutoencoderKL`): What it became.
        seed (`int`, defaults to 0): Of the inputs.

    Returns:
        `Parity`

    Raises:
        ValueError: if the two are of different models.
    """
    for name, value in autoencoder.config.items():
        given = tuple(vae.config[name]) if isinstance(value, tuple) else vae.config[name]
        if given != value:
            raise ValueError(
                f"The checkpoint has {name}={value!r} and the autoencoder {given!r}: they are not the same."
            )
    generator, channels = seeded_generator(seed, 0), autoencoder.config["latent_channels"]
    size = 2 ** len(autoencoder.config["block_out_channels"])
    images = torch.rand(1, autoencoder.config["in_channels"], size, size, generator=generator) * 2 - 1
    latents = torch.randn(1, channels, 2, 2, generator=generator)
    groups, back = autoencoder.config["norm_num_groups"], original_autoencoder(vae)
    with torch.no_grad():
        moments = vae.encode(images.to(vae.dtype)).latent_dist.parameters.float()
        decoded = vae.decode(latents.to(vae.dtype)).sample.float()
        forward, forward_back = (
            largest(
                (
                    output_distance(moments, reference_encode(weights, groups, images)),
                    output_distance(decoded, reference_decode(weights, groups, latents)),
                )
            )
            for weights in (autoencoder.original, back)
        )
    compared = compare_weights(autoencoder.original, back, autoencoder.original)
    return Parity(forward, forward_back, **compared, dtype=vae.dtype)


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
