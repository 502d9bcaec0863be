"""What a checkpoint's keys, shapes and training arguments say about the model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import logging

from ..presets import PRESETS
from . import FAMILIES
from .family import Family, infer_mlp_ratio
from .reading import (
    find_entry,
    find_file,
    holds_autoencoder,
    read_checkpoint,
    select_weights,
    training_arguments,
)


logger = logging.get_logger(__name__)

# Width -> heads of the paper's sizes and of LightningDiT's larger ones: heads leave no trace in most weights.
KNOWN_HEADS = {
    preset.num_attention_heads * preset.attention_head_dim: preset.num_attention_heads for preset in PRESETS.values()
} | {1536: 24, 1792: 28}
IMAGENET_CLASSES = 1000
# Axes of the weights that dimensions are read off, by our keys.
RANKS = {"pos_embed.proj.weight": 4, "class_embed.weight": 2, "proj_out.weight": 2}
BLOCK = "transformer_blocks.0."


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
        return self.family.latents_statistics(self.training_only) if self.family.latents_statistics else None

    def describe(self) -> str:
        """What the weights say about the model, in one line."""
        config = self.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        classes = config["num_classes"]
        parameters = sum(weight.numel() for weight in self.weights.values())
        options = [name for name in ("swiglu", "rms_norm", "sincos+rope") if name in config.values()]
        options += ["qk_norm"] * config["qk_norm"] + ["no shift"] * (not config["modulation_shift"])
        options += ["no null class"] * (config.get("class_dropout_prob") == 0)
        options += ["guidance in its weights"] * config["guidance_in_weights"]
        return (
            f"{self.family.name}: {config['num_layers']} blocks of width {width}, patch {config['patch_size']}, "
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
    num_attention_heads: int | None = None,
    family: str = "auto",
    weights: str = "auto",
    embedders_of_block: int | None = None,
    has_null_class: bool | None = None,
    content: dict | None = None,
) -> Checkpoint:
    """
    Reads a checkpoint and what its weights say about the model; only baked weights are copied.

    Args:
        path (`str` or `Path`):
            A `.pt`, `.bin` or `.safetensors` file; for the stock diffusers format also the folder with its
            `config.json`.
        num_attention_heads (`int`, *optional*): Needed if the width is none of the published ones.
        family (`str`, defaults to `"auto"`): `"auto"` or a name of `FAMILIES`.
        weights (`str`, defaults to `"auto"`): Which weights of a training checkpoint, as [`find_entry`] takes it.
        embedders_of_block (`int`, *optional*): Which of the stock diffusers format's copies to take if they differ.
        has_null_class (`bool`, *optional*):
            Whether the last row of the class table is the null class of classifier-free guidance. If not given, the
            training arguments tell, or a table of 1000 rows (ImageNet's classes) or of one row has none, any other has
            one.
        content (`dict`, *optional*): What [`read_checkpoint`] gave, if the file is open already.

    Returns:
        `Checkpoint`

    Raises:
        ValueError: if the file is no such checkpoint; the message names the file and the key.
    """
    heads = num_attention_heads
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int)):
        raise ValueError(f"`num_attention_heads` is {heads!r}; it must be a whole number.")
    if has_null_class not in (None, True, False):
        raise ValueError(f"`has_null_class` is {has_null_class!r}; it must be True, False or None.")
    if family not in ("auto", *FAMILIES):
        raise ValueError(f"`family` is {family!r}; it must be one of auto, {', '.join(FAMILIES)}.")
    path = find_file(Path(path))
    content = read_checkpoint(path) if content is None else content
    if holds_autoencoder(content):
        raise ValueError(f"Checkpoint {path} is an autoencoder, no transformer; `--family vavae` converts it.")
    entry = find_entry(content, weights, path)
    original = select_weights(content, entry, path)
    arguments = training_arguments(content)
    if "time_embed.linear_1.weight" in original:
        raise ValueError(f"Checkpoint {path} is in this package's format already; load it with `from_pretrained`.")
    source = choose_family(family, original, arguments, path)
    if source.read_arguments and not arguments:
        arguments = source.read_arguments(path)
    for name, allowed in source.trained_with.items():
        if arguments.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"Checkpoint {path} was trained with {name}={arguments[name]!r}; only {allowed[0]!r} can be converted."
            )
    training_only = {key: value for key, value in original.items() if key.startswith(source.training_only)}
    original = {key: value for key, value in original.items() if key not in training_only}

    num_layers = count_blocks(original, source, path)
    try:
        ours = source.to_ours(original, num_layers, embedders_of_block)
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    if source.block_copies:  # the selected copy counts
        copied = {key: ours[key] for key in source.block_copies.values()}
        original |= source.to_original(copied, num_layers)
    check_dimensions(ours, source, path)
    beside = source.read_config(path) if source.read_config else {}
    tables = {table: original[key] for key, table in source.tables.items() if key in original}
    config = source.fixed_options | infer_config(ours, tables, beside, num_attention_heads, path)
    told = source.trained_options(arguments) if source.trained_options else {}
    has_null_class = told.pop("has_null_class", None) if has_null_class is None else has_null_class
    config |= infer_classes(len(ours["class_embed.weight"]), source, arguments, beside, has_null_class, path)
    if source.options["guidance_in_weights"] != (False,):  # the published checkpoints have it
        config["guidance_in_weights"] = config.get("class_dropout_prob") != 0 and told.get("guidance_in_weights", True)
    if mismatch := source.find_mismatch(config):
        raise ValueError(f"Checkpoint {path} is no {source.name} model: it has {mismatch}.")
    check_finite(original | training_only, path)
    if entry is not None:
        logger.info(f"Checkpoint {path}: the weights are those of {entry!r}.")
    return Checkpoint(source, config, original, ours, training_only, entry)


def count_blocks(original: Mapping[str, torch.Tensor], family: Family, path: str | Path) -> int:
    """
    The number of blocks by the largest index, which can't be larger than the number of keys.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys.
        family (`Family`): Of the checkpoint.
        path (`str` or `Path`): Named in errors.

    Returns:
        `int`: at least 1.

    Raises:
        ValueError: naming the key of a block whose predecessors are missing.
    """
    num_blocks = 1
    for key in original:
        if match := re.match(rf"{family.blocks}\.([0-9]+)\.", key):
            index = match[1]
            if len(index) > 9 or int(index) >= len(original):
                raise ValueError(
                    f"Checkpoint {path}: {key[:80]!r} is of a block that {len(original)} keys can't have."
                )
            num_blocks = max(num_blocks, 1 + int(index))
    return num_blocks


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
    if asked != detected.name and not (lacks_marks and FAMILIES[asked].can_lack_marks):
        raise ValueError(f"Checkpoint {path} is no {asked} model; its keys look like {detected.name}.")
    return FAMILIES[asked]


def check_dimensions(weights: dict[str, torch.Tensor], family: Family, path: str | Path) -> None:
    """
    That the weights whose shapes tell the dimensions are there, with the axes they need.

    Args:
        weights (`dict[str, torch.Tensor]`): With our keys.
        family (`Family`): Of the checkpoint.
        path (`str` or `Path`): Named in errors.

    Raises:
        ValueError: naming the key, with the original's name.
    """
    table = {name: original for original, names in family.key_table(1).items() for name in names}
    feed_forward = [BLOCK + name for name in ("ff.gate_proj.weight", "ff.net.0.proj.weight")]
    needed = [*RANKS, BLOCK + "modulation.weight", feed_forward[feed_forward[0] not in weights]]
    for name in needed:
        if name not in weights:
            raise ValueError(f"Checkpoint {path} is no {family.name} model: the key {table[name]!r} is missing.")
        weight, rank = weights[name], RANKS.get(name, 2)
        if weight.ndim != rank or 0 in weight.shape:
            shape = tuple(weight.shape)
            raise ValueError(f"Checkpoint {path}: {table[name]!r} has shape {shape}, where {rank} axes are needed.")


def infer_config(
    weights: dict[str, torch.Tensor],
    tables: dict[str, torch.Tensor],
    beside: dict,
    heads: int | None,
    path: str | Path,
) -> dict:
    """
    Reads a model's dimensions and options off its weights.

    Args:
        weights (`dict[str, torch.Tensor]`): With our keys.
        tables (`dict[str, torch.Tensor]`): The checkpoint's computed tables, by their names in `computed_tables`.
        beside (`dict`): What a configuration beside the checkpoint says.
        heads (`int`, *optional*): Needed if nothing else tells.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict`: arguments of `DiTTransformer2DModel`, except for the classes and what a family fixes.

    Raises:
        ValueError: if the weights contradict each other, or the heads or the latent size can't be known.
    """
    dim, in_channels, patch_size, _ = weights["pos_embed.proj.weight"].shape
    out_channels = weights["proj_out.weight"].shape[0] // patch_size**2
    qk_norm = weights.get(BLOCK + "attn.norm_q.weight")
    swiglu = BLOCK + "ff.gate_proj.weight" in weights
    hidden = weights[BLOCK + ("ff.gate_proj.weight" if swiglu else "ff.net.0.proj.weight")].shape[0]
    rotary = tables.get("rotary_cosines")
    head_dim = next((axis.shape[-1] for axis in (rotary, qk_norm) if axis is not None and axis.ndim), 0)
    if heads is None:
        heads = beside.get("num_attention_heads") or (dim // head_dim if head_dim else KNOWN_HEADS.get(dim))
    if heads is None:
        known = ", ".join(map(str, KNOWN_HEADS))
        raise ValueError(
            f"Checkpoint {path}: the heads of a model of width {dim} are unknown (known widths: {known}); "
            "pass num_attention_heads (`--num_attention_heads`)."
        )
    if heads < 1 or dim % heads:
        raise ValueError(f"Checkpoint {path}: the width {dim} is not divisible by {heads} attention heads.")
    return {
        "sample_size": _sample_size(tables, beside, patch_size, path),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks.")),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": infer_mlp_ratio(hidden, dim, swiglu),
        "learn_sigma": out_channels == 2 * in_channels,
        "position_embedding": "sincos" if rotary is None else "sincos+rope",
        "norm": "rms_norm" if BLOCK + "norm1.weight" in weights else "layer_norm",
        "qk_norm": qk_norm is not None,
        "ff": "swiglu" if swiglu else "gelu",
        "modulation_shift": weights[BLOCK + "modulation.weight"].shape[0] != 4 * dim,
    }


def _sample_size(tables, beside, patch_size, path):
    """The latent size by the table of positions, or by a configuration beside the checkpoint."""
    positions = tables.get("positions")
    if positions is not None and positions.ndim == 3:
        tokens = positions.shape[1]
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"Checkpoint {path}: its table of positions has {tokens} tokens, which is no square.")
        return math.isqrt(tokens) * patch_size
    if "sample_size" not in beside:
        raise ValueError(
            f"Checkpoint {path} has no table of positions ('pos_embed') to read the latent size off, and no "
            "config.json beside it."
        )
    return beside["sample_size"]


def infer_classes(
    rows: int, family: Family, arguments: dict, beside: dict, has_null_class: bool | None, path: str | Path
) -> dict:
    """
    Whether the last row of the class table is the null class; a guess is logged.

    Args:
        rows (`int`): Of the class table.
        family (`Family`): Of the checkpoint.
        arguments (`dict`): From [`training_arguments`].
        beside (`dict`): What a configuration beside the checkpoint says.
        has_null_class (`bool`, *optional*): Given, it decides.
        path (`str` or `Path`): Named in messages.

    Returns:
        `dict`: `num_classes`, and `class_dropout_prob=0.0` if there is no null class.

    Raises:
        ValueError: if no class would be left.
    """
    classes = arguments.get("num_classes", beside.get("num_classes"))
    if has_null_class is None and family.options.get("has_null_class") == (True,):
        has_null_class = True
    if has_null_class is None and classes in (rows, rows - 1):
        has_null_class = classes == rows - 1
    if has_null_class is None:
        has_null_class = rows not in (1, IMAGENET_CLASSES)
        if rows not in (1, IMAGENET_CLASSES + 1):
            read, flag = (f"{rows - 1} classes and the null class", "--no_null_class")
            if not has_null_class:
                read, flag = f"{rows} classes without a null class", "--null_class"
            logger.warning(
                f"Checkpoint {path}: its class table of {rows} rows is read as {read}. Pass "
                f"has_null_class={not has_null_class} (`{flag}`) if that is wrong."
            )
    if has_null_class and rows < 2:
        raise ValueError(f"Checkpoint {path}: its class table has one row, which can't be a class and the null class.")
    return {"num_classes": rows - 1} if has_null_class else {"num_classes": rows, "class_dropout_prob": 0.0}
