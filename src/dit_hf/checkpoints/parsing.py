"""What a checkpoint's keys, shapes and training arguments say about the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.utils import logging

from ..complexity import describe_blocks
from . import FAMILIES
from .family import Family
from .reading import (
    find_autoencoder,
    find_entry,
    find_file,
    read_checkpoint,
    select_weights,
    training_arguments,
)
from .sizes import Hints


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """
    A parsed checkpoint.

    Args:
        family (`Family`): The code base it comes from.
        config (`dict`): Arguments of `DiTTransformer2DModel`.
        original (`dict[str, torch.Tensor]`): Its weights with the original's keys, computed tables included.
        weights (`dict[str, torch.Tensor]`): Its weights with our keys.
        training_only (`dict[str, torch.Tensor]`): Weights that only training needs, with the original's keys.
        entry (`str`, *optional*): The file's entry that the weights are from; None if the file is a state dict.
    """

    family: Family
    config: dict
    original: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    training_only: dict[str, torch.Tensor]
    entry: str | None = None

    @property
    def latents_statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of the latents, per channel, where the file has them."""
        statistics = self.family.latents_statistics
        return statistics(self.training_only, self.config["in_channels"]) if statistics else None

    def describe(self) -> str:
        """What the weights say about the model, in one line."""
        config = self.config
        classes = config["num_classes"]
        parameters = sum(weight.numel() for weight in self.weights.values())
        options = [name for name in ("swiglu", "rms_norm", "sincos+rope") if name in config.values()]
        options += ["qk_norm"] * config.get("qk_norm", False)
        options += ["no shift"] * (not config.get("modulation_shift", True))
        options += ["no null class"] * (config.get("class_dropout_prob") == 0)
        options += ["guidance in its weights"] * config.get("guidance_in_weights", False)
        return (
            f"{self.family.name}: {describe_blocks(config)}, patch {config['patch_size']}, "
            f"{classes} class{'es' * (classes != 1)}, {parameters / 1e6:.2f} M parameters"
            + "".join(f", {o}" for o in options)
            + (f"; the weights of {self.entry!r}" if self.entry else "")
        )


def has_marks(family: Family, state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint has keys that identify a family."""
    return any(key.startswith(family.marks) for key in state_dict)


def detect_family(state_dict: Mapping[str, torch.Tensor], arguments: dict) -> Family:
    """
    The code base that wrote a checkpoint, by its keys and by the training arguments beside them.

    Args:
        state_dict (`dict[str, torch.Tensor]`): With the original's keys.
        arguments (`dict`): Of the training script; empty if the file has none.

    Returns:
        `Family`: the first of `FAMILIES` with a mark in it, or DiT. SiT's keys are DiT's, so such a file is DiT's
        unless its arguments identify SiT.
    """
    *marked, unmarked = FAMILIES.values()
    for family in marked:
        if has_marks(family, state_dict) or any(name in arguments for name in family.argument_marks):
            return family
    return unmarked


def parse_checkpoint(
    path: str | Path,
    num_attention_heads: int | Sequence[int] | None = None,
    family: str = "auto",
    weights: str = "auto",
    embedders_of_block: int | None = None,
    has_null_class: bool | None = None,
    content: dict | None = None,
    in_context_start: int | None = None,
    num_encoder_blocks: int | None = None,
    noise_scale: float | None = None,
    in_channels: int | None = None,
) -> Checkpoint:
    """
    Reads a checkpoint and derives the model's configuration from its weights; only baked weights are copied.

    Args:
        path (`str` or `Path`):
            A `.pt`, `.bin` or `.safetensors` file; for the stock diffusers format also the folder with its
            `config.json`.
        num_attention_heads (`int` or `Sequence[int]`, *optional*):
            Needed for widths that were never published; two numbers for a model of two streams.
        family (`str`, defaults to `"auto"`): `"auto"` or a name of `FAMILIES`.
        weights (`str`, defaults to `"auto"`): Which weights of a training checkpoint, as [`find_entry`] takes it.
        embedders_of_block (`int`, *optional*):
            Block whose copy of the embedders is used, if the copies of a stock diffusers DiT differ.
        has_null_class (`bool`, *optional*):
            Whether the last row of the class table is the null class of classifier-free guidance. If not given, the
            training arguments tell, or a table of 1000 rows (ImageNet's classes) or of one row has none, any other has
            one.
        content (`dict`, *optional*): The result of [`read_checkpoint`], if the file is already open.
        in_context_start (`int`, *optional*): The block before which JiT's context tokens join, if nothing tells.
        num_encoder_blocks (`int`, *optional*): How many of DDT's blocks are the encoder, if nothing tells.
        noise_scale (`float`, *optional*): Of JiT, if nothing tells.
        in_channels (`int`, *optional*): Of DDT's latents, if they are neither 4 nor 3.

    Returns:
        `Checkpoint`

    Raises:
        ValueError: if the file is not a checkpoint of a known family; the message names the file and the key.
    """
    hints = Hints(
        num_attention_heads=num_attention_heads,
        embedders_of_block=embedders_of_block,
        has_null_class=has_null_class,
        in_context_start=in_context_start,
        num_encoder_blocks=num_encoder_blocks,
        noise_scale=noise_scale,
        in_channels=in_channels,
    )
    if family not in ("auto", *FAMILIES):
        raise ValueError(f"`family` is {family!r}; it must be one of auto, {', '.join(FAMILIES)}.")
    path = find_file(Path(path))
    content = read_checkpoint(path) if content is None else content
    if autoencoder := find_autoencoder(content):
        raise ValueError(
            f"Checkpoint {path} is an autoencoder, not a transformer; `--family {autoencoder}` converts it."
        )
    entry = find_entry(content, weights, path)
    original = select_weights(content, entry, path)
    arguments = training_arguments(content)
    if "time_embed.linear_1.weight" in original:
        raise ValueError(
            f"Checkpoint {path} is already in the format of this package; load it with `from_pretrained`."
        )
    source = choose_family(family, original, arguments, path)
    try:
        hints.check_fit(source)
        original, prefix = source.select(original, weights)
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    entry = entry if prefix is None else prefix
    if source.read_arguments and not arguments:
        arguments = source.read_arguments(path)
    for name, allowed in source.trained_with.items():
        if arguments.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"Checkpoint {path} was trained with {name}={arguments[name]!r}; only {allowed[0]!r} can be converted."
            )
    training_only = {key: value for key, value in original.items() if key.startswith(source.training_only)}
    original = {key: value for key, value in original.items() if key not in training_only}

    try:
        config, original, ours = source.infer(source, original, replace(hints, arguments=arguments), path)
        if source.latents_statistics:
            source.latents_statistics(training_only, config["in_channels"])
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    if mismatch := source.find_mismatch(config):
        raise ValueError(f"Checkpoint {path} is not a {source.name} model: it has {mismatch}.")
    check_finite(original | training_only, path)
    if entry is not None:
        logger.info(f"Checkpoint {path}: the weights are those of {entry!r}.")
    return Checkpoint(source, config, original, ours, training_only, entry)


def check_finite(weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """
    That no weight is NaN or infinite.

    Args:
        weights (`dict[str, torch.Tensor]`): Any.
        path (`str` or `Path`): Named in errors.

    Raises:
        ValueError: naming the first such key, and how many of its values are.
    """
    for key, weight in weights.items():
        finite = weight.isfinite()
        if not finite.all():
            count = (~finite).sum().item()
            raise ValueError(
                f"Checkpoint {path}: {count:,} of {weight.numel():,} values of {key!r} are NaN or infinite."
            )


def choose_family(asked: str, state_dict: Mapping[str, torch.Tensor], arguments: dict, path: str | Path) -> Family:
    """
    The family that was asked for, if the keys allow it, or the one that is detected.

    Args:
        asked (`str`): `"auto"` or a name of `FAMILIES`.
        state_dict, arguments: As [`detect_family`] takes them.
        path (`str` or `Path`): Named in errors.

    Returns:
        `Family`

    Raises:
        ValueError: if the keys are another family's.
    """
    detected = detect_family(state_dict, arguments)
    lacks_marks = not any(family.marks and has_marks(family, state_dict) for family in FAMILIES.values())
    if asked == "auto":
        others = [other.name for other in FAMILIES.values() if other.can_lack_marks and other is not detected]
        if lacks_marks and not any(name in arguments for name in detected.argument_marks):
            flags = " or ".join(f"`--family {name}`" for name in reversed(others))
            logger.warning(
                f"Checkpoint {path} is read as {detected.name}, whose keys others have as well: pass {flags} if it is "
                "one."
            )
        return detected
    if asked == detected.code_base:
        return detected
    if asked != detected.name and not (lacks_marks and FAMILIES[asked].can_lack_marks):
        raise ValueError(
            f"Checkpoint {path} is not a {asked} model; its keys look like {detected.name}. Pass `--family "
            f"{detected.name}`."
        )
    return FAMILIES[asked]
