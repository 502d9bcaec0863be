"""The autoencoders of latent diffusion as their own code saves them, such as VA-VAE's and REPA-E's.

One table of keys, original <-> diffusers' `AutoencoderKL`, is used in both directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .loading import check_keys, copy_weight
from .parsing import check_finite
from .reading import find_entry, find_file, read_checkpoint, select_weights


# As `--family` takes it.
VAVAE = "vavae"
# What inference needs. Training checkpoints hold discriminator, perceptual loss and foundation model as well.
BEGINNINGS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Of REPA-E's training checkpoint, which has the transformer under the usual names.
ENTRY = "vae"

# Layers, original -> diffusers.
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
MIDDLE = {
    "mid.block_1": ("mid_block.resnets.0", RESNET),
    "mid.attn_1": ("mid_block.attentions.0", ATTENTION),
    "mid.block_2": ("mid_block.resnets.1", RESNET),
}
# The default of AutoencoderKL and of every published file.
NORM_NUM_GROUPS = 32
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


def table_of(vae: AutoencoderKL) -> dict[str, str]:
    """The keys that one autoencoder has, original -> diffusers'."""
    table = key_table(len(vae.config.block_out_channels), vae.config.layers_per_block)
    needed = vae.state_dict().keys()
    return {original: ours for original, ours in table.items() if ours in needed}


def original_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one of diffusers' weights in the original, whose attentions are convolutions of one pixel."""
    return (*shape, 1, 1) if ".attentions." in key and len(shape) == 2 else shape


@dataclass(frozen=True)
class Autoencoder:
    """
    A parsed file.

    Args:
        config (`dict`): Arguments of `AutoencoderKL`, without the statistics of its latents.
        original (`dict[str, torch.Tensor]`): Its weights with the original's keys, without those of training only.
    """

    config: dict
    original: dict[str, torch.Tensor]

    def describe(self) -> str:
        """What the weights say about the model, in one line."""
        widths = ", ".join(map(str, self.config["block_out_channels"]))
        blocks = self.config["layers_per_block"]
        parameters = sum(weight.numel() for weight in self.original.values())
        return (
            f"{VAVAE}: an autoencoder of widths {widths}, {blocks} block{'s' * (blocks != 1)} per level, "
            f"{self.config['latent_channels']} latent channels, {parameters / 1e6:.2f} M parameters"
        )


def parse_autoencoder(
    path: str | Path, norm_num_groups: int = NORM_NUM_GROUPS, content: dict | None = None, weights: str = "auto"
) -> Autoencoder:
    """
    Reads an original autoencoder and what its weights say about the model; nothing is copied.

    Args:
        path (`str` or `Path`):
            A `.pt`, `.ckpt`, `.bin` or `.safetensors` file: the state dict itself, or a training checkpoint with it
            under `state_dict`, or `vae` (REPA-E). Weights that only training needs are dropped.
        norm_num_groups (`int`, defaults to 32): Groups of the group norms, which leave no trace in the weights.
        content (`dict`, *optional*): What [`read_checkpoint`] gave, if the file is open already.
        weights (`str`, defaults to `"auto"`): As [`find_entry`] takes it.

    Returns:
        `Autoencoder`

    Raises:
        ValueError: if the file is no such autoencoder; the message names the file and the key.
    """
    path = find_file(Path(path))
    content = read_checkpoint(path) if content is None else content
    if isinstance(content.get(ENTRY), dict):
        content = content[ENTRY]
    selected = select_weights(content, find_entry(content, weights, path), path, BEGINNINGS)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in selected:
        raise ValueError(f"Checkpoint {path} is in diffusers' format already; give the folder that it is in.")
    config = infer_config(selected, path)
    if bad := [width for width in config["block_out_channels"] if norm_num_groups < 1 or width % norm_num_groups]:
        raise ValueError(
            f"Checkpoint {path}: its width {bad[0]} is not divisible by {norm_num_groups} groups; pass "
            "norm_num_groups (`--norm_num_groups`) as the autoencoder was trained with."
        )
    with torch.device("meta"):
        vae = AutoencoderKL(**config, norm_num_groups=norm_num_groups)
    needed = vae.state_dict()
    shapes = {key: original_shape(ours, tuple(needed[ours].shape)) for key, ours in table_of(vae).items()}
    check_keys(selected, shapes, path)
    check_finite(selected, path)
    return Autoencoder(config | {"norm_num_groups": norm_num_groups}, selected)


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
            raise ValueError(f"Checkpoint {path} is no original AutoencoderKL: the key {key!r} is missing.")
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


def build_autoencoder(
    autoencoder: Autoencoder,
    path: str | Path,
    statistics: tuple[list[float], list[float]],
    dtype: torch.dtype | None = None,
) -> AutoencoderKL:
    """
    Builds the model of a parsed file.

    Args:
        autoencoder (`Autoencoder`): From [`parse_autoencoder`].
        path (`str` or `Path`): Named in errors.
        statistics (`tuple[list[float], list[float]]`):
            Mean and standard deviation of its latents, a value per channel, from
            [`dit_hf.checkpoints.latents_stats.read_latents_stats`]: its `latents_mean` and `latents_std`.
        dtype (`torch.dtype`, *optional*): Type of the weights, float32 if not given.

    Returns:
        `AutoencoderKL`: in eval mode, frozen.

    Raises:
        ValueError: if the statistics are of another number of channels, or `dtype` has no room for a weight.
    """
    channels = autoencoder.config["latent_channels"]
    if any(len(values) != channels for values in statistics):
        raise ValueError(
            f"The latents' statistics are of {len(statistics[0])} channels, and the autoencoder {path} has latents of "
            f"{channels}; give those that were published with it."
        )
    mean, std = statistics
    with torch.device("meta"):
        vae = AutoencoderKL(
            **autoencoder.config,
            latents_mean=mean,
            latents_std=std,
            scaling_factor=1.0,
            sample_size=SAMPLE_SIZE,
            force_upcast=False,
        )
    needed = {ours: weight.shape for ours, weight in vae.state_dict().items()}
    # Key by key, so that no weight is in memory twice.
    for key, ours in table_of(vae).items():
        weight = copy_weight(key, autoencoder.original[key], dtype, path).reshape(needed[ours])
        vae.load_state_dict({ours: weight}, strict=False, assign=True)
    return vae.eval().requires_grad_(False)


def original_autoencoder(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """
    An autoencoder's weights with the original's keys and shapes.

    Args:
        vae (`AutoencoderKL`): To be written.

    Returns:
        `dict[str, torch.Tensor]`: sharing its tensors.

    Raises:
        ValueError: if the original's code can't build it.
    """
    config = vae.config
    for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        if not config[name]:
            raise ValueError(f"The autoencoder can't be written as the original: it has {name}={config[name]!r}.")
    if config["act_fn"] not in ("silu", "swish"):
        raise ValueError(f"The autoencoder can't be written as the original: it has act_fn={config['act_fn']!r}.")
    weights, table = vae.state_dict(), table_of(vae)
    if stray := sorted(weights.keys() - set(table.values())):
        raise ValueError(f"The autoencoder can't be written as the original, which has no key for {stray[0]!r}.")
    return {key: weights[ours].reshape(original_shape(ours, weights[ours].shape)) for key, ours in table.items()}
