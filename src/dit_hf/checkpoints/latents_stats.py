"""Statistics of an autoencoder's latents, in the files that are published beside it.

Shapes: `C` latent channels, `h w` latent size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..command_line import real
from .reading import find_problem, read_checkpoint


# What RAE's code adds to the variance.
EPSILON = 1e-5


@dataclass(frozen=True)
class Form:
    """
    How a code base stores statistics.

    Args:
        mean (`str`): The entry of the mean.
        spread (`str`): The entry of what tells the standard deviation.
        to_std (`Callable`): The standard deviation by this entry.
        from_std (`Callable`): The reverse.
        per_position (`bool`): Whether each position of the latents has its own, shape `(C, h, w)`.
    """

    mean: str
    spread: str
    to_std: Callable[[torch.Tensor], torch.Tensor]
    from_std: Callable[[torch.Tensor], torch.Tensor]
    per_position: bool = False


FORMS = {
    "vavae": Form("mean", "std", lambda std: std, lambda std: std),
    "repae": Form("latents_bias", "latents_scale", lambda scale: 1 / scale, lambda std: 1 / std),
    "rae": Form("mean", "var", lambda var: (var + EPSILON).sqrt(), lambda std: std**2 - EPSILON, per_position=True),
}


def read_latents_stats(
    path: str | Path, latent_multiplier: float = 1.0, forms: Sequence[str] = ("vavae", "repae")
) -> tuple[list, list]:
    """
    Reads a `latents_stats.pt` of VA-VAE (`mean`, `std`) or REPA-E (`latents_bias`, `latents_scale` = 1 / std), or a
    `stat.pt` of RAE (`mean`, `var`).

    Args:
        path (`str` or `Path`): The file; its tensors have shape `(1, C, 1, 1)` or `(C,)`, those of RAE `(C, h, w)`.
        latent_multiplier (`float`, defaults to 1.0):
            Factor on normalised latents in LightningDiT's configuration.
        forms (`Sequence[str]`, defaults to `("vavae", "repae")`): Names of `FORMS` that are looked for.

    Returns:
        `tuple[list, list]`: `latents_mean` and `latents_std` of an autoencoder's config, a value per channel, or
        nested lists of shape `(C, h, w)`.

    Raises:
        ValueError: if the file holds something else; the message names the file and the entry.
    """
    content = read_checkpoint(path)
    known = [FORMS[name] for name in forms]
    form = next((form for form in known if {form.mean, form.spread} <= content.keys()), None)
    if form is None:
        needed = " or ".join(f"{form.mean!r} and {form.spread!r}" for form in known)
        held = ", ".join(sorted(map(str, content)))
        raise ValueError(f"{path} holds no statistics of latents: {needed} are needed, and it has {held[:200]}.")
    mean, spread = (_read_values(content[name], name, path, form.per_position) for name in (form.mean, form.spread))
    if len(mean) != len(spread):
        raise ValueError(f"{path}: {form.mean!r} is of {len(mean)} channels and {form.spread!r} of {len(spread)}.")
    if mean.shape != spread.shape:
        shapes = f"{tuple(mean.shape)} and {tuple(spread.shape)}"
        raise ValueError(f"{path}: {form.mean!r} and {form.spread!r} have shapes {shapes}, where one is needed.")
    std = form.to_std(spread) / real(above=0).check("latent_multiplier", latent_multiplier)
    if not ((std.float() > 0) & std.float().isfinite()).all():
        raise ValueError(f"{path}: {form.spread!r} must give a finite standard deviation above 0 in every channel.")
    return mean.tolist(), std.tolist()


def _read_values(value, name, path, per_position):
    """A tensor in float64, so that what is computed from it comes back to the bit."""
    if problem := find_problem(name, value):
        raise ValueError(f"{path}: {name!r} {problem}.")
    shape = tuple(value.shape)
    if per_position and len(shape) == 3 and value.numel():
        values = value
    elif not per_position and value.numel() and shape in ((value.numel(),), (1, value.numel(), 1, 1)):
        values = value.flatten()
    else:
        needed = "(C, h, w)" if per_position else "(1, C, 1, 1) or (C,)"
        raise ValueError(f"{path}: {name!r} has shape {shape}, where {needed} is needed.")
    if not values.isfinite().all():
        raise ValueError(f"{path}: {name!r} holds NaN or infinity.")
    return values.double()


def original_latents_stats(vae, form: str) -> dict[str, torch.Tensor]:
    """
    The content of a file with the statistics of an autoencoder's config.

    Args:
        vae (`AutoencoderKL` or `AutoencoderRAE`): With `latents_mean` and `latents_std`.
        form (`str`): A name of `FORMS`: whose code will load the file.

    Returns:
        `dict[str, torch.Tensor]`: of shape `(1, C, 1, 1)`, those of RAE `(C, h, w)`. A latent multiplier is in the
        standard deviation.

    Raises:
        ValueError: if the config has none, or normalises latents otherwise.
    """
    config, stored = vae.config, FORMS[form]
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        raise ValueError("The autoencoder's config has no latents_mean and latents_std; omit `--latents_stats`.")
    if config.get("scaling_factor") != 1 or config.get("shift_factor"):
        raise ValueError(
            f"The autoencoder's config has scaling_factor={config.get('scaling_factor')!r} and shift_factor="
            f"{config.get('shift_factor')!r} besides latents_std; the original's code knows neither."
        )
    mean, std = (torch.tensor(config[name], dtype=torch.float64) for name in ("latents_mean", "latents_std"))
    for name, value in (("latents_mean", mean), ("latents_std", std)):
        used = getattr(vae, f"_{name}", None)  # AutoencoderRAE computes with those of its weights
        if used is not None and not torch.equal(value.to(used), used):
            raise ValueError(f"The autoencoder's config and weights have different {name}; restore the folder.")
    if not (std > 0).all():
        raise ValueError("The autoencoder's config has a latents_std that is not above 0.")
    values = {stored.mean: mean, stored.spread: stored.from_std(std)}
    return {
        name: value.float() if stored.per_position else value.float().view(1, -1, 1, 1)
        for name, value in values.items()
    }
