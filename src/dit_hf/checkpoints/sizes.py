"""What shapes, computed tables and training arguments say about a DiT; other architectures have their own."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging

from ..presets import PRESETS
from ..transformer_dit import swiglu_width


if TYPE_CHECKING:
    from .family import Family

logger = logging.get_logger(__name__)

# Width -> heads of the paper's sizes and of LightningDiT's larger ones: most weights do not tell them.
KNOWN_HEADS = {
    preset.num_attention_heads * preset.attention_head_dim: preset.num_attention_heads for preset in PRESETS.values()
} | {1536: 24, 1792: 28}
IMAGENET_CLASSES = 1000
# Axes of the weights that dimensions are read off, by our keys.
RANKS = {"pos_embed.proj.weight": 4, "class_embed.weight": 2, "proj_out.weight": 2}
BLOCK = "transformer_blocks.0."
# Hint -> the only model that it says something about.
HINT_MODELS = {
    "in_context_start": "JiTTransformer2DModel",
    "noise_scale": "JiTTransformer2DModel",
    "num_encoder_blocks": "DDTTransformer2DModel",
}


@dataclass(frozen=True)
class Hints:
    """
    What is known of a checkpoint besides its weights.

    Args:
        num_attention_heads (`int` or `Sequence[int]`, *optional*): Of the model, or of its two streams.
        embedders_of_block (`int`, *optional*): Which of the stock diffusers format's copies to take if they differ.
        has_null_class (`bool`, *optional*): Whether the last row of the class table is the null class.
        in_context_start (`int`, *optional*): The block before which JiT's context tokens join.
        num_encoder_blocks (`int`, *optional*): How many of DDT's blocks, the first ones, are the encoder.
        noise_scale (`float`, *optional*): Of JiT.
        in_channels (`int`, *optional*): Of DDT's latents, whose patches are vectors in its weights.
        arguments (`dict`): Of the training script; empty if the file has none.
    """

    num_attention_heads: int | Sequence[int] | None = None
    embedders_of_block: int | None = None
    has_null_class: bool | None = None
    in_context_start: int | None = None
    num_encoder_blocks: int | None = None
    noise_scale: float | None = None
    in_channels: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        heads = self.num_attention_heads
        counts = [("num_attention_heads", 1, each) for each in (heads if isinstance(heads, list | tuple) else [heads])]
        counts += [("in_context_start", 0, self.in_context_start), ("num_encoder_blocks", 1, self.num_encoder_blocks)]
        counts += [("in_channels", 1, self.in_channels)]
        for name, smallest, value in counts:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number from {smallest}.")
        if self.noise_scale is not None and not 0 < self.noise_scale < math.inf:
            raise ValueError(f"`noise_scale` is {self.noise_scale!r}; it must be a number above 0.")
        if self.has_null_class not in (None, True, False):
            raise ValueError(f"`has_null_class` is {self.has_null_class!r}; it must be True, False or None.")

    def check_fit(self, family: "Family") -> None:
        """`ValueError` naming a hint that says nothing about a family's models, or contradicts them."""
        for name, model in HINT_MODELS.items():
            if getattr(self, name) is not None and family.model != model:
                raise ValueError(f"{family.name} models have no {name} (`--{name}`); omit it.")
        if self.has_null_class is False and family.options.get("has_null_class") == (True,):
            raise ValueError(f"{family.name} models have a null class; omit has_null_class (`--no_null_class`).")

    def heads(self, streams: int) -> list[int] | None:
        """Heads of each stream, of all if one number was given; `ValueError` for another number of numbers."""
        if self.num_attention_heads is None:
            return None
        given = self.num_attention_heads
        heads = [given] if isinstance(given, int) else list(given)
        heads = heads * streams if len(heads) == 1 else heads
        if len(heads) != streams:
            needed = "ENCODER DECODER" if streams == 2 else "one"
            raise ValueError(f"num_attention_heads (`--num_attention_heads`) has {len(heads)} numbers, not {needed}.")
        return heads


def infer(
    family: "Family", original: dict[str, torch.Tensor], hints: Hints, path: Path
) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Reads a `DiTTransformer2DModel`'s config off a checkpoint.

    Args:
        family (`Family`): Of the checkpoint.
        original (`dict[str, torch.Tensor]`): With the original's keys.
        hints (`Hints`): What is known besides.
        path (`Path`): Of the checkpoint; a config may be beside it.

    Returns:
        `tuple`: the config, the original weights, of which the selected copies count, and the weights with our keys.

    Raises:
        ValueError: if the weights contradict each other, or something can't be known; the message may lack the path.
    """
    layers = {"num_layers": count_blocks(original, family)}
    ours = family.to_ours(original, layers, hints.embedders_of_block)
    if family.block_copies:  # the selected copy counts
        copied = {key: ours[key] for key in family.block_copies.values()}
        original = original | family.to_original(copied, layers)
    check_dimensions(ours, family)
    beside = family.read_config(path) if family.read_config else {}
    tables = {table: original[key] for key, table in family.tables.items() if key in original}
    heads = hints.heads(1)
    config = family.fixed_options | infer_config(ours, tables, beside, heads[0] if heads else None)
    told = family.trained_options(hints.arguments) if family.trained_options else {}
    has_null_class = told.pop("has_null_class", None) if hints.has_null_class is None else hints.has_null_class
    config |= infer_classes(len(ours["class_embed.weight"]), family, hints.arguments, beside, has_null_class, path)
    if family.options["guidance_in_weights"] != (False,):  # the published checkpoints have it
        config["guidance_in_weights"] = config.get("class_dropout_prob") != 0 and told.get("guidance_in_weights", True)
    return config, original, ours


def count_blocks(original: Mapping[str, torch.Tensor], family: "Family") -> int:
    """
    The number of blocks by the largest index, which can't be larger than the number of keys.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys.
        family (`Family`): Of the checkpoint.

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
                raise ValueError(f"{key[:80]!r} is of a block that {len(original)} keys can't have.")
            num_blocks = max(num_blocks, 1 + int(index))
    return num_blocks


def check_dimensions(weights: dict[str, torch.Tensor], family: "Family") -> None:
    """
    That the weights whose shapes tell the dimensions are there, with the axes they need.

    Args:
        weights (`dict[str, torch.Tensor]`): With our keys.
        family (`Family`): Of the checkpoint.

    Raises:
        ValueError: naming the key, with the original's name.
    """
    table = {name: original for original, names in family.key_table({"num_layers": 1}).items() for name in names}
    feed_forward = [BLOCK + name for name in ("ff.gate_proj.weight", "ff.net.0.proj.weight")]
    needed = [*RANKS, BLOCK + "modulation.weight", feed_forward[feed_forward[0] not in weights]]
    for name in needed:
        if name not in weights:
            raise ValueError(f"it is not a {family.name} model: the key {table[name]!r} is missing.")
        weight, rank = weights[name], RANKS.get(name, 2)
        if weight.ndim != rank or 0 in weight.shape:
            shape = tuple(weight.shape)
            raise ValueError(f"{table[name]!r} has shape {shape}, where {rank} axes are needed.")


def infer_config(
    weights: dict[str, torch.Tensor],
    tables: dict[str, torch.Tensor],
    beside: dict,
    heads: int | None,
) -> dict:
    """
    Reads a model's dimensions and options off its weights.

    Args:
        weights (`dict[str, torch.Tensor]`): With our keys.
        tables (`dict[str, torch.Tensor]`): The checkpoint's computed tables, by their names in `computed_tables`.
        beside (`dict`): What a configuration beside the checkpoint says.
        heads (`int`, *optional*): Needed if nothing else tells.

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
            f"the heads of a model of width {dim} are unknown (known widths: {known}); "
            "pass num_attention_heads (`--num_attention_heads`)."
        )
    if heads < 1 or dim % heads:
        raise ValueError(f"the width {dim} is not divisible by {heads} attention heads.")
    return {
        "sample_size": _sample_size(tables, beside, patch_size),
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


def _sample_size(tables, beside, patch_size):
    """The latent size by the table of positions, or by a configuration beside the checkpoint."""
    positions = tables.get("positions")
    if positions is not None and positions.ndim == 3:
        tokens = positions.shape[1]
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"its table of positions has {tokens} tokens, which is not a square number; only square images can be "
                "converted."
            )
        return math.isqrt(tokens) * patch_size
    if "sample_size" not in beside:
        raise ValueError(
            "it has no table of positions ('pos_embed') that tells the latent size, and no config.json beside it."
        )
    return beside["sample_size"]


def infer_classes(
    rows: int, family: "Family", arguments: dict, beside: dict, has_null_class: bool | None, path: str | Path
) -> dict:
    """
    Whether the last row of the class table is the null class; a guess is logged.

    Args:
        rows (`int`): Of the class table.
        family (`Family`): Of the checkpoint.
        arguments (`dict`): From [`training_arguments`].
        beside (`dict`): What a configuration beside the checkpoint says.
        has_null_class (`bool`, *optional*): Given, it decides.
        path (`str` or `Path`): Named in the log.

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
        raise ValueError("its class table has one row, which can't be a class and the null class.")
    return {"num_classes": rows - 1} if has_null_class else {"num_classes": rows, "class_dropout_prob": 0.0}


def infer_mlp_ratio(hidden: int, dim: int, swiglu: bool) -> float:
    """
    A ratio that gives a hidden width again, through the truncations of the model's arithmetic.

    Args:
        hidden (`int`): Width of the feed-forward layers.
        dim (`int`): Width of the model.
        swiglu (`bool`): Whether the hidden width is two thirds of the ratio's.

    Returns:
        `float`: 4.0 if that fits.

    Raises:
        ValueError: if there is none.
    """
    widened = 1.5 * hidden if swiglu else hidden
    for ratio in (4.0, widened / dim, (math.ceil(widened) + 0.25) / dim):
        if hidden == (swiglu_width(dim, ratio) if swiglu else int(dim * ratio)):
            return ratio
    raise ValueError(f"A feed-forward width of {hidden} at a model width of {dim} can't be expressed as a ratio.")
