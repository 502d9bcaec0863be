"""The autoencoders of latent diffusion, such as VA-VAE's and REPA-E's, which become an `AutoencoderKL`."""

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .family import AutoencoderFamily
from .reference import reference_decode, reference_encode


# Layers, original -> diffusers.
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
MIDDLE = {
    "mid.block_1": ("mid_block.resnets.0", RESNET),
    "mid.attn_1": ("mid_block.attentions.0", ATTENTION),
    "mid.block_2": ("mid_block.resnets.1", RESNET),
}
# Levels, and blocks of a level, that are looked for; published files have up to five.
MAX_LAYERS = 64
# Pixels of the images that they are trained on; tiled decoding works on tiles of this size.
SAMPLE_SIZE = 256


def key_table(levels: int, layers_per_block: int) -> dict[str, str]:
    """
    Every key that an autoencoder can have.

    Args:
        levels (`int`): Resolutions; the original counts the decoder's from the finest, diffusers from the coarsest.
        layers_per_block (`int`): Residual blocks of an encoder's level; the decoder's levels have one more.

    Returns:
        `dict[str, str]`: original key -> diffusers' key.
    """
    layers = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        layers |= {f"{side}.{original}": f"{side}.{ours}" for original, ours in ENDS.items()}
        parts = dict(MIDDLE)
        for level in range(levels):
            if side == "encoder":
                original, ours, resample, blocks = f"down.{level}", f"down_blocks.{level}", "downsample", 0
            else:
                original, ours, resample, blocks = f"up.{level}", f"up_blocks.{levels - 1 - level}", "upsample", 1
            parts[f"{original}.{resample}"] = (f"{ours}.{resample}rs.0", {"conv": "conv"})
            for index in range(layers_per_block + blocks):
                parts[f"{original}.block.{index}"] = (f"{ours}.resnets.{index}", RESNET)
                parts[f"{original}.attn.{index}"] = (f"{ours}.attentions.{index}", ATTENTION)
        for original, (ours, names) in parts.items():
            layers |= {f"{side}.{original}.{old}": f"{side}.{ours}.{new}" for old, new in names.items()}
    return {f"{original}.{kind}": f"{ours}.{kind}" for original, ours in layers.items() for kind in ("weight", "bias")}


def infer_config(weights: Mapping[str, torch.Tensor], path: str | Path) -> dict:
    """
    Counts levels, blocks and widths.

    Args:
        weights (`dict[str, torch.Tensor]`): With the original's keys.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict`: arguments of `AutoencoderKL`.

    Raises:
        ValueError: naming a key that is missing, or without the axes of a convolution.
    """

    def shape(key):
        if key not in weights:
            raise ValueError(f"Checkpoint {path} is not an original AutoencoderKL: the key {key!r} is missing.")
        if weights[key].ndim != 4 or 0 in weights[key].shape:
            raise ValueError(
                f"Checkpoint {path}: {key!r} has shape {tuple(weights[key].shape)}, where 4 axes are needed."
            )
        return weights[key].shape

    def count_layers(name):
        return len(list(takewhile(lambda index: name.format(index) in weights, range(MAX_LAYERS))))

    first = "encoder.down.0.block.0.conv1.weight"
    shape(first)
    levels = range(count_layers("encoder.down.{}.block.0.conv1.weight"))
    attention = {
        part: ["Attn" * (f"{part}.{level}.attn.0.norm.weight" in weights) for level in levels]
        for part in ("encoder.down", "decoder.up")
    }
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in attention["encoder.down"]),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(attention["decoder.up"])),
        "block_out_channels": tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in levels),
        "layers_per_block": count_layers("encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shape("decoder.conv_in.weight")[1],
    }


class KLFamily(AutoencoderFamily):
    """VA-VAE's code, REPA-E's, and latent diffusion's before them."""

    name = "vavae"
    model = AutoencoderKL
    # Training checkpoints hold discriminator, perceptual loss and foundation model as well.
    beginnings = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    stats_forms = ("vavae", "repae")

    def infer(self, weights, hints, path):
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
            raise ValueError(f"Checkpoint {path} is already in diffusers' format; pass the folder that it is in.")
        config, groups = infer_config(weights, path), hints.norm_num_groups
        if hints.decoder_num_attention_heads is not None:
            raise ValueError(
                f"Checkpoint {path} is not a decoder of RAE; omit decoder_num_attention_heads "
                "(`--decoder_num_attention_heads`)."
            )
        if bad := [width for width in config["block_out_channels"] if groups < 1 or width % groups]:
            raise ValueError(
                f"Checkpoint {path}: its width {bad[0]} is not divisible by {groups} groups; pass norm_num_groups "
                "(`--norm_num_groups`) as the autoencoder was trained with."
            )
        return config | {"norm_num_groups": groups}

    def latent_channels(self, config):
        return config["latent_channels"]

    def describe(self, config):
        widths, blocks = ", ".join(map(str, config["block_out_channels"])), config["layers_per_block"]
        return f"an autoencoder of widths {widths}, {blocks} block{'s' * (blocks != 1)} per level"

    def skeleton(self, config, weights):
        return AutoencoderKL(**config)

    def key_table(self, config):
        return key_table(len(config["block_out_channels"]), config["layers_per_block"])

    def original_shape(self, key, shape):
        # Its attentions are convolutions of one pixel.
        return (*shape, 1, 1) if ".attentions." in key and len(shape) == 2 else shape

    def complete(self, config, weights, statistics, encoder):
        if encoder is not None:
            raise ValueError("An original AutoencoderKL has its encoder in its file; omit encoder (`--encoder`).")
        mean, std = statistics
        own = {"scaling_factor": 1.0, "sample_size": SAMPLE_SIZE, "force_upcast": False}
        return config | {"latents_mean": mean, "latents_std": std} | own, {}

    def find_mismatch(self, config):
        allowed = dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), (True,))
        for name, values in (allowed | {"act_fn": ("silu", "swish")}).items():
            if config[name] not in values:
                return f"{name}={config[name]!r}"
        return None

    def outputs(self, config, vae, generator):
        size, groups = 2 ** len(config["block_out_channels"]), config["norm_num_groups"]
        images = torch.rand(1, config["in_channels"], size, size, generator=generator) * 2 - 1
        latents = torch.randn(1, config["latent_channels"], 2, 2, generator=generator)
        moments = vae.encode(images.to(vae.dtype)).latent_dist.parameters
        decoded = vae.decode(latents.to(vae.dtype)).sample

        def reference(weights):
            return [reference_encode(weights, groups, images), reference_decode(weights, groups, latents)]

        return [moments, decoded], reference


VAVAE = KLFamily()
