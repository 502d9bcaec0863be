"""Configurations of files: checked before a model of their size is built."""

import math
from collections.abc import Mapping
from pathlib import Path

from ..files import check_file, read_json


# Far beyond every published model; a few bytes of JSON must not fill the memory, or build blocks for hours.
LARGEST = {
    **{"num_layers": 1000, "num_attention_heads": 1024, "attention_head_dim": 4096, "num_classes": 10**8},
    **{"sample_size": 2**15, "patch_size": 2**10, "in_channels": 2**16},
}
LARGEST_MLP_RATIO = 64
# Positions are a table of (sample_size / patch_size)² rows, computed when the model is built.
LARGEST_TABLE = 2**28
WEIGHT_FILES = ("*.safetensors", "*.bin")


def check_config(config: Mapping, place: str | Path, file_bytes: int | None = None) -> None:
    """
    Refuses a configuration that no model can have, or whose model is larger than its file of weights.

    Args:
        config (`Mapping`): Arguments of `DiTTransformer2DModel`; those that are missing have defaults.
        place (`str` or `Path`): Named in errors.
        file_bytes (`int`, *optional*): Of its weights, if they are on this machine.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    for name, largest in LARGEST.items():
        value = config.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise ValueError(f"{place} has {name}={_short(value)}; it must be a whole number from 1 to {largest:,}.")
    ratio = config.get("mlp_ratio", 4.0)
    if not isinstance(ratio, int | float) or not 0 < ratio <= LARGEST_MLP_RATIO:  # NaN too
        raise ValueError(
            f"{place} has mlp_ratio={_short(ratio)}; it must be above 0, and {LARGEST_MLP_RATIO} at most."
        )
    width = config.get("num_attention_heads", 1) * config.get("attention_head_dim", 1)
    numbers = math.ceil(config.get("sample_size", 1) / config.get("patch_size", 1)) ** 2 * width
    if numbers > LARGEST_TABLE:
        raise ValueError(
            f"{place} has sample_size={config['sample_size']} with patch_size={config.get('patch_size', 1)} and a "
            f"width of {width}: its table of positions would have {numbers:,} numbers; at most {LARGEST_TABLE:,} are "
            "possible."
        )
    # The attention's four matrices and the class table, in four bits at least.
    needed = (4 * config.get("num_layers", 1) * width**2 + config.get("num_classes", 1) * width) // 2
    if file_bytes is not None and needed > file_bytes:
        raise ValueError(
            f"{place} says num_layers={config.get('num_layers')}, num_classes={config.get('num_classes')} and a width "
            f"of {width}, which needs {needed:,} bytes at least; its weights have {file_bytes:,}."
        )


def weight_bytes(folder: str | Path) -> int | None:
    """
    Bytes of the weights of a model's folder.

    Args:
        folder (`str` or `Path`): A folder, or the id of a repository.

    Returns:
        `int`: of all files of weights in it; None if there are none, or no such folder.
    """
    files = [file for pattern in WEIGHT_FILES for file in Path(folder).glob(pattern)]
    return sum(file.stat().st_size for file in files if file.is_file()) or None


def check_shards(folder: str | Path) -> None:
    """
    That the indexes of sharded weights name files of their own folder, all of which are there.

    Args:
        folder (`str` or `Path`): A model's folder, or the id of a repository, whose files are not here.

    Raises:
        ValueError: naming the index and the file.
    """
    for index in Path(folder).glob("*.index*.json"):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no `weight_map`, an object of key to file.")
        for key, name in weight_map.items():
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise ValueError(f"{index}: the file of {key!r} is {_short(name)}; it must be a name in that folder.")
        for name in sorted(set(weight_map.values())):
            check_file(index.with_name(name))


def _short(value):
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
