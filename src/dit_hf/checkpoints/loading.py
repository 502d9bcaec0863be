"""Reading checkpoint files safely, and what their weights say about the model."""

import argparse
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..presets import PRESETS
from . import dit


# Width -> heads of the paper's sizes: heads leave no trace in the weights.
KNOWN_HEADS = {
    preset.num_attention_heads * preset.attention_head_dim: preset.num_attention_heads for preset in PRESETS.values()
}
FAMILIES = ("auto", "dit")
# Axes of the weights that the dimensions are read off.
RANKS = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    dit.POSITIONS: 3,
}


def read_checkpoint(path: str | Path) -> dict:
    """
    Opens a `.pt` or `.safetensors` file without executing anything in it.

    Args:
        path (`str` or `Path`): The file. In a pickle, tensors, plain values and `argparse.Namespace` are allowed.

    Returns:
        `dict`: what was saved.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything else; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways inside of torch and pickle
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        refused = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global|operand) \S+", str(error))
        if refused:
            reason = f"it holds {refused.group(1) or refused.group(0)}, which is neither a tensor nor a plain value"
        raise ValueError(f"Can't read checkpoint {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def select_weights(content: dict, weights: str, path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict inside a checkpoint: the file itself, or the `ema` or `model` entry of a training checkpoint.

    Args:
        content (`dict`): From [`read_checkpoint`].
        weights (`str`): `"ema"` or `"model"`; ignored if the file holds one state dict only.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict[str, torch.Tensor]`

    Raises:
        ValueError: if there are no such weights.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"`weights` is {weights!r}; it must be 'ema' or 'model'.")
    if "ema" in content or "model" in content:
        if weights not in content:
            have = ", ".join(sorted(content))
            raise ValueError(f"Checkpoint {path} has no {weights!r} weights; it holds {have}.")
        content = content[weights]
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path}: its {weights!r} entry is a {type(content).__name__}, not a dictionary.")
    stray = [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if stray:
        raise ValueError(f"Checkpoint {path}: {stray[0]!r} is not a tensor.")
    return content


def infer_config(state_dict: dict[str, torch.Tensor], num_attention_heads: int | None, path: str | Path) -> dict:
    """
    Reads a DiT's dimensions off its weights.

    Args:
        state_dict (`dict[str, torch.Tensor]`): In the original's words.
        num_attention_heads (`int`, *optional*): Needed if the width is none of the paper's.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict`: arguments of `DiTTransformer2DModel`.

    Raises:
        ValueError: if a weight is missing or does not fit, or the heads can't be known.
    """
    for key in (*dit.KEYS, dit.POSITIONS, "blocks.0.mlp.fc1.weight"):
        if key not in state_dict:
            raise ValueError(f"Checkpoint {path} is no DiT: the key {key!r} is missing.")
    for key, axes in RANKS.items():
        if state_dict[key].ndim != axes or 0 in state_dict[key].shape:
            shape = tuple(state_dict[key].shape)
            raise ValueError(f"Checkpoint {path}: {key!r} has shape {shape}, where {axes} axes are needed.")
    dim, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    heads = num_attention_heads or KNOWN_HEADS.get(dim)
    if heads is None:
        known = ", ".join(map(str, KNOWN_HEADS))
        raise ValueError(
            f"Checkpoint {path}: the heads of a model of width {dim} are unknown (known widths: {known}); "
            "pass num_attention_heads."
        )
    if dim % heads:
        raise ValueError(f"Checkpoint {path}: the width {dim} is not divisible by {heads} attention heads.")
    tokens = state_dict[dit.POSITIONS].shape[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"Checkpoint {path}: {dit.POSITIONS!r} has {tokens} tokens, which is no square.")
    out_channels = state_dict["final_layer.linear.weight"].shape[0] // patch_size**2
    layers = {int(match.group(1)) for key in state_dict if (match := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": max(layers) + 1,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": state_dict["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def convert_state_dict(state_dict: dict[str, torch.Tensor], num_layers: int, path: str | Path) -> dict:
    """
    Renames an original's weights into ours, strictly: no key may be missing or left over.

    Args:
        state_dict (`dict[str, torch.Tensor]`): In the original's words.
        num_layers (`int`): Blocks of the model.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict[str, torch.Tensor]`: in ours.

    Raises:
        ValueError: naming the first key that is missing or unknown.
    """
    table = dit.key_table(num_layers)
    missing = sorted(table.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - table.keys() - {dit.POSITIONS})
    for keys, what in ((missing, "is missing"), (unknown, "is unknown")):
        if keys:
            raise ValueError(f"Checkpoint {path}: the key {keys[0]!r} {what} ({len(keys)} such keys).")
    converted: dict[str, torch.Tensor] = {}
    for original, ours in table.items():
        names = (ours,) if isinstance(ours, str) else ours
        parts = state_dict[original].chunk(len(names)) if len(names) > 1 else (state_dict[original],)
        converted.update((name, part.clone()) for name, part in zip(names, parts, strict=True))
    return converted


def load_model(
    model_class, path: str | Path, num_attention_heads: int | None = None, family: str = "auto", weights: str = "ema"
):
    """
    Builds the model that a checkpoint file holds.

    Args:
        model_class (`type`): `DiTTransformer2DModel`.
        path (`str` or `Path`): A local `.pt` or `.safetensors` file.
        num_attention_heads (`int`, *optional*): Needed if the width is none of the paper's.
        family (`str`, defaults to `"auto"`): `"auto"` or `"dit"`.
        weights (`str`, defaults to `"ema"`): Which weights of a training checkpoint.

    Returns:
        `DiTTransformer2DModel`

    Raises:
        ValueError: if the file is no such checkpoint; the message names the file and the key.
    """
    if family not in FAMILIES:
        raise ValueError(f"`family` is {family!r}; it must be one of {', '.join(FAMILIES)}.")
    original = select_weights(read_checkpoint(path), weights, path)
    config = infer_config(original, num_attention_heads, path)
    state_dict = convert_state_dict(original, config["num_layers"], path)
    model = model_class(**config)
    for key, expected in model.state_dict().items():
        if state_dict[key].shape != expected.shape:
            given, needed = tuple(state_dict[key].shape), tuple(expected.shape)
            raise ValueError(f"Checkpoint {path}: {key!r} has shape {given}, where {needed} is needed.")
    positions = original[dit.POSITIONS]
    if positions.shape != model.pos_embed.positions.shape or not torch.allclose(
        positions.float(), model.pos_embed.positions, atol=1e-2
    ):
        raise ValueError(f"Checkpoint {path}: {dit.POSITIONS!r} is not the sine-cosine table that DiT computes.")
    model.load_state_dict(state_dict, strict=True)
    return model
