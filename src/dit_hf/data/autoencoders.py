"""Any image autoencoder of diffusers: loading it, and what training must know of it.

Shapes: `N` images, `C` latent channels, `H W` pixels, `h w` latent size.
"""

from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL

from .. import model_folders  # noqa: F401  reads the old names of weights
from ..bundled import resolve_vae
from ..dtypes import DTYPE_ARGUMENT
from ..hub import check_available
from ..model_folders import accept_old_encoders
from ..pipeline_dit_class_cond import correct_rae, is_rae, rae_scale, raise_value_error, spatial_factor
from ..pipeline_dit_class_cond import latent_channels as stated_channels


__all__ = [
    "Pixels",
    "check_autoencoder",
    "encode_posterior",
    "latent_channels",
    "load_autoencoder",
    "spatial_factor",
    "vae_statistics",
]


class Pixels(torch.nn.Module):
    """Takes the place of an autoencoder for models that work on images in [-1, 1]: these are its latents."""

    spatial_compression_ratio = 1
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.config = {"latent_channels": 3}
        self.place: torch.Tensor
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where images are moved."""
        return self.place.device

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The images as they are."""
        return {"latent": pixels}


def load_autoencoder(
    pretrained_model_name_or_path: str | Path, subfolder: str | None = None, dtype: torch.dtype = torch.float32
):
    """
    Loads an autoencoder of any class, as its config names it, frozen and in eval mode.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): A folder, a Hub id, or the name of a bundled pipeline.
        subfolder (`str`, *optional*): Where it lies in a pipeline, usually `"vae"`.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the weights.

    Returns:
        `diffusers.ModelMixin`: for example `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`.

    Raises:
        OSError: if there is no such model.
        ValueError: if the model does not encode RGB images to a grid of latents.
    """
    source = resolve_vae(pretrained_model_name_or_path) if subfolder is None else str(pretrained_model_name_or_path)
    check_available(source, "/".join(filter(None, (subfolder, AutoencoderKL.config_name))))
    config = AutoencoderKL.load_config(source, subfolder=subfolder)
    name = config.get("_class_name", "a model without a class name")
    model_class = getattr(diffusers, name, None)
    if model_class is None or not hasattr(model_class, "encode"):
        raise ValueError(f"{source} holds {name}; pass an autoencoder of diffusers, such as AutoencoderKL.")
    accept_old_encoders(model_class)
    options = {DTYPE_ARGUMENT: dtype, "output_loading_info": True}
    with raise_value_error(f"{source} can't be loaded as {name}"):
        vae, loaded = model_class.from_pretrained(source, subfolder=subfolder, **options)
    try:
        check_autoencoder(vae)
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(
                f"its weights have no {missing[0]!r}, nor {len(missing) - 1} others of {name}; save it again with the "
                "diffusers and transformers that are installed."
            )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if is_rae(vae):
        correct_rae(vae)
    return vae.eval().requires_grad_(False)


def check_autoencoder(vae) -> None:
    """
    Checks that a model encodes RGB images to a grid of latents.

    Args:
        vae (`diffusers.ModelMixin`): The autoencoder.

    Raises:
        ValueError: if it encodes something else.
    """
    channels = vae.config.get("in_channels", 3)
    if channels != 3:
        raise ValueError(
            f"{type(vae).__name__} encodes images of {channels} channels; images are read as RGB, with 3."
        )
    if any(isinstance(module, torch.nn.Conv3d) for module in vae.modules()):
        raise ValueError(f"{type(vae).__name__} encodes videos; pass an autoencoder of images.")
    spatial_factor(vae)
    latent_channels(vae)


def latent_channels(vae) -> int:
    """
    Number of channels of the latents.

    Args:
        vae (`diffusers.ModelMixin`): The autoencoder.

    Returns:
        `int`

    Raises:
        ValueError: if its config does not state it.
    """
    if not isinstance(channels := stated_channels(vae), int):
        raise ValueError(f"The config of {type(vae).__name__} has no latent_channels; it is not supported.")
    return channels


def vae_statistics(vae) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation that the config of an autoencoder normalises latents by.

    Args:
        vae (`diffusers.ModelMixin`): The autoencoder.

    Returns:
        `tuple[list[float], list[float]]`: one value per channel, or one for all.
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None or is_rae(vae):  # RAE's latents are normalised already
        mean, std = [0.0], [1.0]
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    return [value + shift for value in mean], [value / scale for value in std]


@torch.no_grad()
def encode_posterior(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and standard deviation of the latents of images.

    Args:
        vae (`diffusers.ModelMixin`): In eval mode.
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): In [-1, 1], on the model's device and of its type.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both `(N, C, h, w)`. The standard deviation of a deterministic encoder
        is 0.
    """
    if is_rae(vae):
        latents = vae.encode((pixels + 1) / 2).latent / rae_scale(vae).to(pixels)
        return latents, torch.zeros_like(latents)
    output = vae.encode(pixels)
    if "latent_dist" in output:
        return output.latent_dist.mean, output.latent_dist.std
    latents = output["latents" if "latents" in output else "latent"]
    return latents, torch.zeros_like(latents)
