"""Original autoencoders become models of diffusers, and models their weights with the original's keys."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..loading import check_keys, copy_weight, is_close
from ..parsing import check_finite
from ..reading import find_autoencoder, find_entry, find_file, read_checkpoint, select_weights
from .family import AutoencoderFamily, AutoencoderHints, original_keys
from .kl import VAVAE
from .rae import RAE_DECODER


AUTOENCODERS: dict[str, AutoencoderFamily] = {family.name: family for family in (VAVAE, RAE_DECODER)}
# Of REPA-E's training checkpoint, which has the transformer under the usual names.
ENTRY = "vae"


@dataclass(frozen=True)
class Autoencoder:
    """
    A parsed file.

    Args:
        family (`AutoencoderFamily`): The code base it comes from.
        config (`dict`): Arguments of diffusers' class, those that the file tells.
        original (`dict[str, torch.Tensor]`): Its weights with the original's keys, without those of training only.
    """

    family: AutoencoderFamily
    config: dict
    original: dict[str, torch.Tensor]

    @property
    def latent_channels(self) -> int:
        """Channels of its latents."""
        return self.family.latent_channels(self.config)

    @property
    def latent_size(self) -> int | None:
        """The side of its latents, where there is only one."""
        return self.family.latent_size(self.original)

    def describe(self) -> str:
        """What the weights say about the model, in one line."""
        parameters = sum(weight.numel() for weight in self.original.values())
        return (
            f"{self.family.name}: {self.family.describe(self.config)}, {self.latent_channels} latent channels, "
            f"{parameters / 1e6:.2f} M parameters"
        )


def parse_autoencoder(
    path: str | Path,
    hints: AutoencoderHints = AutoencoderHints(),
    content: dict | None = None,
    weights: str = "auto",
    family: str = "auto",
) -> Autoencoder:
    """
    Reads an original autoencoder and what its weights say about the model; nothing is copied.

    Args:
        path (`str` or `Path`):
            A `.pt`, `.ckpt`, `.bin` or `.safetensors` file: the state dict itself, or a training checkpoint with it
            under `state_dict`, or `vae` (REPA-E). Weights that only training needs are dropped.
        hints (`AutoencoderHints`, *optional*): What the weights do not tell.
        content (`dict`, *optional*): What [`read_checkpoint`] gave, if the file is open already.
        weights (`str`, defaults to `"auto"`): As [`find_entry`] takes it.
        family (`str`, defaults to `"auto"`): A name of `AUTOENCODERS`; the keys tell it.

    Returns:
        `Autoencoder`

    Raises:
        ValueError: if the file is not an autoencoder of a known family; the message names the file and the key.
    """
    if family not in ("auto", *AUTOENCODERS):
        raise ValueError(f"`family` is {family!r}; it must be one of auto, {', '.join(AUTOENCODERS)}.")
    path = find_file(Path(path))
    content = read_checkpoint(path) if content is None else content
    if isinstance(content.get(ENTRY), dict):
        content = content[ENTRY]
    source = AUTOENCODERS[(find_autoencoder(content) or VAVAE.name) if family == "auto" else family]
    selected = select_weights(content, find_entry(content, weights, path), path, source.beginnings)
    selected = {key.removeprefix(source.prefix): weight for key, weight in selected.items()}
    config = source.infer(selected, hints, path)
    try:
        with torch.device("meta"):
            needed = source.skeleton(config, selected)
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    tables = source.computed_tables(selected)
    shapes = {
        key: source.original_shape(ours, tuple(needed.get_parameter(ours).shape))
        for key, ours in original_keys(source, needed).items()
    }
    check_keys(selected, shapes | {key: tuple(table.shape) for key, table in tables.items()}, path)
    check_finite(selected, path)
    for key, table in tables.items():
        if not is_close(selected[key], table):
            raise ValueError(f"Checkpoint {path}: {key!r} is not the table that {source.name} computes.")
    return Autoencoder(source, config, selected)


def build_autoencoder(
    autoencoder: Autoencoder,
    path: str | Path,
    statistics: tuple[list, list],
    dtype: torch.dtype | None = None,
    encoder: str | None = None,
) -> Any:
    """
    Builds the model of a parsed file.

    Args:
        autoencoder (`Autoencoder`): From [`parse_autoencoder`].
        path (`str` or `Path`): Named in errors.
        statistics (`tuple[list, list]`):
            Mean and standard deviation of its latents from
            [`dit_hf.checkpoints.latents_stats.read_latents_stats`]: a value per channel, for RAE nested lists of shape
            `(C, h, w)`.
        dtype (`torch.dtype`, *optional*): Type of the weights, float32 if not given.
        encoder (`str`, *optional*): Folder or Hub id of the encoder of RAE, which its file lacks.

    Returns:
        `AutoencoderKL` or `AutoencoderRAE`: in eval mode, frozen.

    Raises:
        ValueError: if the statistics are of another number of channels, the encoder is missing or does not fit, or
            `dtype` has no room for a weight.
        OSError: if the encoder can't be downloaded.
    """
    family, channels = autoencoder.family, autoencoder.latent_channels
    if any(len(values) != channels for values in statistics):
        raise ValueError(
            f"The latents' statistics are of {len(statistics[0])} channels, and the autoencoder {path} has latents of "
            f"{channels}; pass those that were published with it."
        )
    arguments, others = family.complete(autoencoder.config, autoencoder.original, statistics, encoder)
    with torch.device("meta"):
        vae = family.model(**arguments)
    keys = {ours: key for key, ours in original_keys(family, vae).items()}
    # Key by key, so that no weight is in memory twice.
    for ours, needed in vae.named_parameters():
        given = others[ours] if ours in others else autoencoder.original[keys[ours]]
        weight = copy_weight(keys.get(ours, ours), given, dtype, path).reshape(needed.shape)
        vae.load_state_dict({ours: weight}, strict=False, assign=True)
    for name, value in family.buffers(vae).items():
        owner, _, attribute = name.rpartition(".")
        setattr(vae.get_submodule(owner), attribute, value)
    return vae.eval().requires_grad_(False)


def original_autoencoder(vae: Any) -> dict[str, torch.Tensor]:
    """
    The weights of an autoencoder with the original's keys and shapes.

    Args:
        vae (`AutoencoderKL` or `AutoencoderRAE`): To be written.

    Returns:
        `dict[str, torch.Tensor]`: sharing its tensors.

    Raises:
        ValueError: if the original's code can't build it.
    """
    found = [family for family in AUTOENCODERS.values() if family.model.__name__ == type(vae).__name__]
    if not found:
        known = " or ".join(family.model.__name__ for family in AUTOENCODERS.values())
        raise ValueError(f"The autoencoder can't be written as an original: it is a {type(vae).__name__}, no {known}.")
    family = found[0]
    if mismatch := family.find_mismatch(vae.config):
        raise ValueError(f"The autoencoder can't be written as the original: it has {mismatch}.")
    weights, keys = vae.state_dict(), original_keys(family, vae)
    stray = sorted(key for key in weights.keys() - set(keys.values()) if key.startswith(family.written))
    if stray:
        raise ValueError(f"The autoencoder can't be written as the original, which has no key for {stray[0]!r}.")
    shapes = {key: family.original_shape(ours, weights[ours].shape) for key, ours in keys.items()}
    written = {key: weights[ours].reshape(shapes[key]) for key, ours in keys.items()}
    return written | family.model_tables(vae)
