"""Statistics of an autoencoder's latents, in the files that are published beside it.

Shapes: `C` latent channels.
"""

from pathlib import Path

import torch

from ..command_line import real
from .reading import find_problem, read_checkpoint


# Entries of the file, by the code base that writes it: the mean, and the standard deviation or 1 / it.
FORMS = {"vavae": ("mean", "std"), "repae": ("latents_bias", "latents_scale")}
INVERSE = "latents_scale"


def read_latents_stats(path: str | Path, latent_multiplier: float = 1.0) -> tuple[list[float], list[float]]:
    """
    Reads a `latents_stats.pt`, of VA-VAE (`mean`, `std`) or of REPA-E (`latents_bias`, `latents_scale` = 1 / std).

    Args:
        path (`str` or `Path`): The file; its tensors have shape `(1, C, 1, 1)` or `(C,)`.
        latent_multiplier (`float`, defaults to 1.0):
            What LightningDiT multiplies normalised latents by; its configuration has it.

    Returns:
        `tuple[list[float], list[float]]`: `latents_mean` and `latents_std` of an `AutoencoderKL`'s config.

    Raises:
        ValueError: if the file holds something else; the message names the file and the entry.
    """
    content = read_checkpoint(path)
    form = next((names for names in FORMS.values() if set(names) <= content.keys()), None)
    if form is None:
        known = " or ".join(" and ".join(map(repr, names)) for names in FORMS.values())
        held = ", ".join(sorted(map(str, content)))
        raise ValueError(f"{path} holds no statistics of latents: {known} are needed, and it has {held[:200]}.")
    mean, std = (_read_values(content[name], name, path) for name in form)
    if len(mean) != len(std):
        raise ValueError(f"{path}: {form[0]!r} is of {len(mean)} channels and {form[1]!r} of {len(std)}.")
    std = (1 / std if form[1] == INVERSE else std) / real(above=0).check("latent_multiplier", latent_multiplier)
    if not ((std.float() > 0) & std.float().isfinite()).all():
        raise ValueError(f"{path}: {form[1]!r} must give a finite standard deviation above 0 in every channel.")
    return mean.tolist(), std.tolist()


def _read_values(value, name, path):
    """A tensor of one value per channel, in float64, so that what is computed from it comes back to the bit."""
    if problem := find_problem(name, value):
        raise ValueError(f"{path}: {name!r} {problem}.")
    if value.numel() == 0 or value.shape not in ((value.numel(),), (1, value.numel(), 1, 1)):
        raise ValueError(f"{path}: {name!r} has shape {tuple(value.shape)}, where (1, C, 1, 1) or (C,) is needed.")
    if not value.isfinite().all():
        raise ValueError(f"{path}: {name!r} holds NaN or infinity.")
    return value.flatten().double()


def original_latents_stats(vae, form: str) -> dict[str, torch.Tensor]:
    """
    The content of a `latents_stats.pt` with the statistics of an autoencoder's config.

    Args:
        vae (`AutoencoderKL`): With `latents_mean` and `latents_std`.
        form (`str`): A name of `FORMS`: whose code will load the file.

    Returns:
        `dict[str, torch.Tensor]`: of shape `(1, C, 1, 1)`. A latent multiplier is in the standard deviation.

    Raises:
        ValueError: if the config has none, or normalises latents otherwise.
    """
    config = vae.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        raise ValueError("The autoencoder's config has no latents_mean and latents_std; omit `--latents_stats`.")
    if config.get("scaling_factor") != 1 or config.get("shift_factor"):
        raise ValueError(
            f"The autoencoder's config has scaling_factor={config.get('scaling_factor')!r} and shift_factor="
            f"{config.get('shift_factor')!r} besides latents_std; the original's code knows neither."
        )
    mean, std = (torch.tensor(config[name], dtype=torch.float64) for name in ("latents_mean", "latents_std"))
    values = (mean, 1 / std if FORMS[form][1] == INVERSE else std)
    return {name: value.float().view(1, -1, 1, 1) for name, value in zip(FORMS[form], values, strict=True)}
