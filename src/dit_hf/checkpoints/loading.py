"""What a checkpoint's weights say about the model, and the model built from them."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.utils import logging

from ..presets import PRESETS
from ..transformer_dit import swiglu_width
from . import FAMILIES, diffusers_dit
from .family import Family
from .reading import read_checkpoint, select_weights, training_arguments


logger = logging.get_logger(__name__)

# Width -> heads of the paper's sizes and of LightningDiT's larger ones: heads leave no trace in most weights.
KNOWN_HEADS = {
    preset.num_attention_heads * preset.attention_head_dim: preset.num_attention_heads for preset in PRESETS.values()
} | {1536: 24, 1792: 28}
# Axes of the weights that dimensions are read off, in our words.
RANKS = {"pos_embed.proj.weight": 4, "class_embed.weight": 2, "proj_out.weight": 2}
# What SiT's and REPA's training arguments must say for the model to be what we compute.
LINEAR_VELOCITY = {"path_type": ("Linear", "linear"), "prediction": ("velocity", "v")}


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint that has been understood.

    Args:
        family (`Family`): The code base it comes from.
        config (`dict`): Arguments of `DiTTransformer2DModel`.
        original (`dict[str, torch.Tensor]`): Its weights in the original's words, computed tables among them.
        weights (`dict[str, torch.Tensor]`): Its weights in ours.
        aside (`dict[str, torch.Tensor]`): Weights that only training needs, in the original's words.
    """

    family: Family
    config: dict
    original: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    aside: dict[str, torch.Tensor]


def detect_family(state_dict: dict[str, torch.Tensor], arguments: dict) -> str:
    """
    The code base that wrote a checkpoint, by its keys and by the training arguments beside them.

    Args:
        state_dict (`dict[str, torch.Tensor]`): In the original's words.
        arguments (`dict`): Of the training script; empty if the file has none.

    Returns:
        `str`: a name of `FAMILIES`. SiT's keys are DiT's, so such a file is `"dit"` unless its arguments say SiT.
    """
    if diffusers_dit.MARK in state_dict:
        return "diffusers"
    if any(key.startswith("projectors.") for key in state_dict):
        return "repa"
    signs = ("feat_rope.freqs_cos", "blocks.0.mlp.w12.weight", "blocks.0.norm1.weight", "blocks.0.attn.q_norm.weight")
    if any(sign in state_dict for sign in signs):
        return "lightningdit"
    return "sit" if "path_type" in arguments else "dit"


def check_objective(family: Family, arguments: dict, path: str | Path) -> None:
    """
    Refuses flow-matching models on another path or with another prediction than the linear velocity.

    Args:
        family (`Family`): Of the checkpoint.
        arguments (`dict`): From [`training_arguments`].
        path (`str` or `Path`): Named in errors.

    Raises:
        ValueError: naming the argument.
    """
    if not family.flow_matching:
        return
    for name, allowed in LINEAR_VELOCITY.items():
        if arguments.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"Checkpoint {path} was trained with {name}={arguments[name]!r}; only {allowed[0]!r} can be converted."
            )


def infer_config(
    weights: dict[str, torch.Tensor], tokens: int | None, arguments: dict, heads: int | None, path: str | Path
) -> dict:
    """
    Reads a model's dimensions off its weights.

    Args:
        weights (`dict[str, torch.Tensor]`): In our words.
        tokens (`int`, *optional*): Rows of the checkpoint's table of positions.
        arguments (`dict`): From [`training_arguments`].
        heads (`int`, *optional*): Needed if neither the weights nor the width tell.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict`: arguments of `DiTTransformer2DModel`, without `timestep_scale`.

    Raises:
        ValueError: if the weights contradict each other, or the heads can't be known.
    """
    block = "transformer_blocks.0."
    dim, in_channels, patch_size, _ = weights["pos_embed.proj.weight"].shape
    rows = weights["class_embed.weight"].shape[0]
    out_channels = weights["proj_out.weight"].shape[0] // patch_size**2
    qk_norm = weights.get(block + "attn.norm_q.weight")
    swiglu = block + "ff.gate_proj.weight" in weights
    hidden = weights[block + ("ff.gate_proj.weight" if swiglu else "ff.net.0.proj.weight")].shape[0]
    if heads is None:
        heads = dim // len(qk_norm) if qk_norm is not None and len(qk_norm) else KNOWN_HEADS.get(dim)
    if heads is None:
        known = ", ".join(map(str, KNOWN_HEADS))
        raise ValueError(
            f"Checkpoint {path}: the heads of a model of width {dim} are unknown (known widths: {known}); "
            "pass num_attention_heads (`--num_attention_heads`)."
        )
    if heads < 1 or dim % heads:
        raise ValueError(f"Checkpoint {path}: the width {dim} is not divisible by {heads} attention heads.")
    config = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks.")),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": _mlp_ratio(hidden, dim, swiglu),
        "num_classes": rows - 1,
        "learn_sigma": out_channels == 2 * in_channels,
        "norm": "rms_norm" if block + "norm1.weight" in weights else "layer_norm",
        "qk_norm": qk_norm is not None,
        "ff": "swiglu" if swiglu else "gelu",
        "modulation_shift": weights[block + "modulation.weight"].shape[0] != 4 * dim,
    }
    if arguments.get("num_classes") == rows:  # trained without label dropout
        config |= {"num_classes": rows, "class_dropout_prob": 0.0}
    if tokens is not None:
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"Checkpoint {path}: its table of positions has {tokens} tokens, which is no square.")
        config["sample_size"] = math.isqrt(tokens) * patch_size
    return config


def _mlp_ratio(hidden, dim, swiglu):
    """A ratio that gives this hidden width again, through the truncations of the model's arithmetic."""
    widened = 1.5 * hidden if swiglu else hidden
    for ratio in (4.0, widened / dim, (math.ceil(widened) + 0.25) / dim):
        if hidden == (swiglu_width(dim, ratio) if swiglu else int(dim * ratio)):
            return ratio
    raise ValueError(f"A feed-forward width of {hidden} at a model width of {dim} can't be expressed as a ratio.")


def _check_readable(weights, family, path):
    """That the weights dimensions are read off are there, with the axes they need."""
    table = {name: original for original, names in family.key_table(1).items() for name in names}
    table |= (
        {ours: f"transformer_blocks.0.{name}" for name, ours in diffusers_dit.EMBEDDERS.items()}
        if (family.name == "diffusers")
        else {}
    )
    needed = [*RANKS, "transformer_blocks.0.modulation.weight"]
    swiglu = "transformer_blocks.0.ff.gate_proj.weight"
    needed.append(swiglu if swiglu in weights else "transformer_blocks.0.ff.net.0.proj.weight")
    for name in needed:
        if name not in weights:
            raise ValueError(f"Checkpoint {path} is no {family.name} model: the key {table[name]!r} is missing.")
        weight = weights[name]
        if weight.ndim != RANKS.get(name, 2) or 0 in weight.shape:
            raise ValueError(
                f"Checkpoint {path}: {table[name]!r} has shape {tuple(weight.shape)}, where {RANKS.get(name, 2)} axes "
                "are needed."
            )


def understand(
    path: str | Path,
    num_attention_heads: int | None = None,
    family: str = "auto",
    weights: str = "ema",
    embedders_of_block: int | None = None,
) -> Checkpoint:
    """
    Reads a checkpoint and what its weights say about the model; nothing is copied but what is baked.

    Args:
        path (`str` or `Path`):
            A `.pt`, `.bin` or `.safetensors` file; for the stock diffusers format also the folder with its
            `config.json`.
        num_attention_heads (`int`, *optional*): Needed if the width is none of the published ones.
        family (`str`, defaults to `"auto"`): `"auto"` or a name of `FAMILIES`.
        weights (`str`, defaults to `"ema"`): Which weights of a training checkpoint.
        embedders_of_block (`int`, *optional*): Which of the stock diffusers format's copies to take if they differ.

    Returns:
        `Checkpoint`

    Raises:
        ValueError: if the file is no such checkpoint; the message names the file and the key.
    """
    if family not in ("auto", *FAMILIES):
        raise ValueError(f"`family` is {family!r}; it must be one of auto, {', '.join(FAMILIES)}.")
    path, beside = _find_file(Path(path))
    content = read_checkpoint(path)
    original = select_weights(content, weights, path)
    arguments = training_arguments(content)
    if "time_embed.linear_1.weight" in original:
        raise ValueError(f"Checkpoint {path} is in this package's format already; load it with `from_pretrained`.")
    source = _choose_family(family, detect_family(original, arguments), path)
    check_objective(source, arguments, path)
    aside = {key: value for key, value in original.items() if source.aside and key.startswith(source.aside)}
    original = {key: value for key, value in original.items() if key not in aside}

    layers = [int(match.group(1)) for key in original if (match := re.match(rf"{source.blocks}\.(\d+)\.", key))]
    num_layers = 1 + max(layers, default=0)
    converted = source.to_ours(original, num_layers)
    if source.name == "diffusers":
        try:
            embedders = diffusers_dit.take_embedders(original, num_layers, embedders_of_block)
            converted |= embedders
            original |= diffusers_dit.give_embedders(embedders, num_layers)  # the chosen copy is what counts
        except ValueError as error:
            raise ValueError(f"Checkpoint {path}: {error}") from None
    _check_readable(converted, source, path)
    positions = original.get(source.computed[0])
    tokens = positions.shape[1] if positions is not None and positions.ndim == 3 else None
    heads = beside.get("num_attention_heads") if num_attention_heads is None else num_attention_heads
    rope = original.get("feat_rope.freqs_cos")
    if heads is None and rope is not None and rope.ndim == 2 and rope.shape[1]:
        heads = converted["pos_embed.proj.weight"].shape[0] // rope.shape[1]
    config = infer_config(converted, tokens, arguments, heads, path)
    if "sample_size" not in config:
        if not beside:
            raise ValueError(
                f"Checkpoint {path} has no {source.computed[0]!r} to read the latent size off, and no config.json "
                "beside it."
            )
        config["sample_size"] = beside["sample_size"]
    if rope is not None:
        config["position_embedding"] = "sincos+rope"
    if source.flow_matching:
        config["timestep_scale"] = 0.001
    return Checkpoint(source, config, original, converted, aside)


def _choose_family(asked, looks, path):
    """The family that was asked for, if the keys allow it, or the one they look like."""
    if asked == "auto":
        if looks == "dit":
            logger.warning(
                "This checkpoint is read as `dit`. SiT's keys are the same: pass `--family sit` if it is one."
            )
        return FAMILIES[looks]
    alike = ("dit", "sit", "lightningdit")  # with LightningDiT's options off, all have the same keys
    if asked != looks and not (asked in alike and looks in ("dit", "sit")):
        raise ValueError(f"Checkpoint {path} is no {asked} model; its keys look like {looks}.")
    return FAMILIES[asked]


def _find_file(path):
    """A checkpoint file and the stock `config.json` beside it (empty if there is none)."""
    if path.is_dir():
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        folders = (path, path / "transformer")
        found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
        if not found:
            raise ValueError(f"There is no {names[0]} in {path} or in {path / 'transformer'}.")
        path = found[0]
    config = path.with_name("config.json")
    try:
        beside = json.loads(config.read_text()) if config.is_file() else {}
        is_stock = isinstance(beside, dict) and diffusers_dit.CONFIG_MARK in beside
        return path, diffusers_dit.our_config(beside) if is_stock else {}
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None


def check_strictly(checkpoint: Checkpoint, model, path: str | Path) -> None:
    """
    That a checkpoint has every key of a model in the shape it needs, and no other.

    Args:
        checkpoint (`Checkpoint`): From [`understand`].
        model (`DiTTransformer2DModel`): Built from its config.
        path (`str` or `Path`): Named in errors.

    Raises:
        ValueError: naming the first key that is missing, unknown or of another shape, in the original's words.
    """
    source, original = checkpoint.family, checkpoint.original
    table = source.key_table(checkpoint.config["num_layers"])
    needed = model.state_dict()
    missing = sorted(
        key for key, names in table.items() if key not in original and any(name in needed for name in names)
    )
    stray = {key for key, names in table.items() if not any(name in needed for name in names)}
    known = set(table) - stray | set(source.computed)
    if source.name == "diffusers":
        blocks = range(checkpoint.config["num_layers"])
        known |= {f"transformer_blocks.{index}.{name}" for index in blocks for name in diffusers_dit.EMBEDDERS}
    unknown = sorted(set(original) - known)
    for keys, what in ((missing, "is missing"), (unknown, "is unknown")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"Checkpoint {path}: the key {keys[0]!r} {what}{more}.")
    for key, names in table.items():
        shapes = [tuple(needed[name].shape) for name in names if name in needed]
        if shapes:
            shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            if not original[key].is_floating_point():
                raise ValueError(
                    f"Checkpoint {path}: {key!r} holds {original[key].dtype}, not floating-point numbers."
                )
            if tuple(original[key].shape) != shape:
                given = tuple(original[key].shape)
                raise ValueError(f"Checkpoint {path}: {key!r} has shape {given}, where {shape} is needed.")
    for name, expected in computed_tables(source, model).items():
        if name in original and not _is_close(original[name], expected):
            raise ValueError(f"Checkpoint {path}: {name!r} is not the table that {source.name} computes.")


def _is_close(given, expected):
    tolerance = 1e-5 if given.dtype == torch.float32 else 1e-2
    return given.shape == expected.shape and torch.allclose(given.float(), expected, rtol=0, atol=tolerance)


def computed_tables(family: Family, model) -> dict[str, torch.Tensor]:
    """
    The tables of a family's checkpoints that are computed from the configuration.

    Args:
        family (`Family`): Of the checkpoint.
        model (`DiTTransformer2DModel`): Whose positions are wanted.

    Returns:
        `dict[str, torch.Tensor]`: in the original's words; rotary tables only if the model has them.
    """
    tables = {family.computed[0]: model.pos_embed.positions}
    if len(family.computed) > 1 and model.rotary_embed is not None:
        angles = model.rotary_embed(*model.pos_embed.base_size, torch.device("cpu"))
        tables |= dict(zip(family.computed[1:], angles, strict=True))
    return tables


def build_model(model_class, checkpoint: Checkpoint, path: str | Path, dtype: torch.dtype | None = None):
    """
    Builds the model of a checkpoint that has been understood.

    Args:
        model_class (`type`): `DiTTransformer2DModel`.
        checkpoint (`Checkpoint`): From [`understand`].
        path (`str` or `Path`): Named in errors.
        dtype (`torch.dtype`, *optional*):
            Type of the weights, float32 if not given; the timestep embedding stays in float32, as with
            `from_pretrained`.

    Returns:
        `DiTTransformer2DModel`: in eval mode.

    Raises:
        ValueError: if a key is missing, unknown or of another shape.
    """
    try:
        with init_empty_weights():
            model = model_class(**checkpoint.config)
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    check_strictly(checkpoint, model, path)
    # Key by key and with a copy of its own, so that the file may go and no weight is in memory twice.
    for name in model.state_dict():
        kept = name.split(".")[0] in model_class._keep_in_fp32_modules
        weight = checkpoint.weights[name].to(torch.float32 if kept else dtype or torch.float32, copy=True)
        model.load_state_dict({name: weight.contiguous()}, strict=False, assign=True)
    return model.eval()


def load_model(
    model_class,
    path: str | Path,
    num_attention_heads: int | None = None,
    family: str = "auto",
    weights: str = "ema",
    dtype: torch.dtype | None = None,
):
    """
    Builds the model that a checkpoint file holds.

    Args:
        model_class (`type`): `DiTTransformer2DModel`.
        path, num_attention_heads, family, weights: As [`understand`] takes them.
        dtype (`torch.dtype`, *optional*): As [`build_model`] takes it.

    Returns:
        `DiTTransformer2DModel`: in eval mode.

    Raises:
        ValueError: if the file is no such checkpoint; the message names the file and the key.
    """
    return build_model(model_class, understand(path, num_attention_heads, family, weights), path, dtype)
