"""What sets one code base's autoencoders apart from another's, used to read and to write them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch


# The default of AutoencoderKL and of every published file.
NORM_NUM_GROUPS = 32


@dataclass(frozen=True)
class AutoencoderHints:
    """
    What is known of an autoencoder besides its weights.

    Args:
        norm_num_groups (`int`, defaults to 32): Groups of the group norms of an `AutoencoderKL`.
        decoder_num_attention_heads (`int`, *optional*): Of RAE's decoder, if its width is none of the published ones.
    """

    norm_num_groups: int = NORM_NUM_GROUPS
    decoder_num_attention_heads: int | None = None


class AutoencoderFamily(ABC):
    """
    A code base whose autoencoders can be read and written.

    Attributes:
        name (`str`): As `--family` takes it.
        model (`type`): The class of diffusers.
        beginnings (`tuple[str, ...]`): Of the keys that inference needs; the others are dropped.
        stats_forms (`tuple[str, ...]`):
            How the statistics of its latents are stored, names of [`dit_hf.checkpoints.latents_stats.FORMS`].
        prefix (`str`): What the keys begin with in a checkpoint of training.
        written (`tuple[str, ...]`): Beginnings of diffusers' keys that the file holds.
    """

    name: ClassVar[str]
    model: ClassVar[type]
    beginnings: ClassVar[tuple[str, ...]]
    stats_forms: ClassVar[tuple[str, ...]]
    prefix: ClassVar[str] = ""
    written: ClassVar[tuple[str, ...]] = ("",)

    @abstractmethod
    def infer(self, weights: Mapping[str, torch.Tensor], hints: AutoencoderHints, path: str | Path) -> dict:
        """
        Reads sizes off the weights.

        Args:
            weights (`dict[str, torch.Tensor]`): With the original's keys.
            hints (`AutoencoderHints`): What is known besides.
            path (`str` or `Path`): Named in errors.

        Returns:
            `dict`: arguments of `model`, those that the file tells.

        Raises:
            ValueError: if a key is missing or of another shape, or something can't be known.
        """

    @abstractmethod
    def latent_channels(self, config: Mapping) -> int:
        """Channels of the latents."""

    def latent_size(self, weights: Mapping[str, torch.Tensor]) -> int | None:
        """The side of the latents, where there is only one."""
        return None

    @abstractmethod
    def describe(self, config: Mapping) -> str:
        """What a configuration says about the model, as the beginning of a line."""

    @abstractmethod
    def skeleton(self, config: Mapping, weights: Mapping[str, torch.Tensor]) -> Any:
        """A model of this configuration, for its keys and shapes; built on the meta device."""

    @abstractmethod
    def key_table(self, config: Mapping) -> dict[str, str]:
        """Keys that a model of this configuration can have, original -> diffusers'."""

    def original_shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the original of the weight with one of diffusers' keys."""
        return shape

    def computed_tables(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model computes and the file holds, with the original's keys."""
        return {}

    @abstractmethod
    def complete(
        self, config: dict, weights: Mapping[str, torch.Tensor], statistics: tuple[list, list], encoder: str | None
    ) -> tuple[dict, dict[str, torch.Tensor]]:
        """
        What a model needs besides its file.

        Args:
            config (`dict`): From [`infer`].
            weights (`dict[str, torch.Tensor]`): With the original's keys.
            statistics (`tuple[list, list]`): Mean and standard deviation of its latents.
            encoder (`str`, *optional*): Folder or Hub id of the encoder, where the file has none.

        Returns:
            `tuple`: all arguments of `model`, and the weights that the file lacks, with diffusers' keys.

        Raises:
            ValueError: if the statistics or the encoder do not fit.
        """

    def find_mismatch(self, config: Mapping) -> str | None:
        """The first option of a model of diffusers that the original's code can't build; None if there is none."""
        return None

    def buffers(self, vae: Any) -> dict[str, torch.Tensor]:
        """What a model computes when it is built, by name."""
        return {}

    def model_tables(self, vae: Any) -> dict[str, torch.Tensor]:
        """The tables of [`computed_tables`] for a model of diffusers."""
        return {}

    @abstractmethod
    def outputs(
        self, config: Mapping, vae: Any, generator: torch.Generator
    ) -> tuple[list[torch.Tensor], Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]]:
        """What a model computes from seeded inputs, and a function that gives the same for original weights."""


def original_keys(family: AutoencoderFamily, vae: Any) -> dict[str, str]:
    """The keys that one model has, original -> diffusers'."""
    needed = vae.state_dict()
    return {original: ours for original, ours in family.key_table(vae.config).items() if ours in needed}
