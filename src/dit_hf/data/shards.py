"""The files of a cache of latents: which are ours, and whether they are what was written.

A shard's metadata carry the fingerprint of its cache, the index its checksum. A file without them is the user's.
"""

import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..files import PARTIAL, check_file, load_json, read_json, reading, remove, writing
from .fingerprints import describe_change, differ_by_dates, fingerprint_of, summary


INDEX = "index.json"
# One entry of metadata, as safetensors writes several in any order, and checksums are to be the same.
FACTS = "dit_hf"
# Images of a shard at most, whose labels are read at once.
MAX_SHARD_SIZE = 2**20
# Types of latents and labels, as safetensors names them.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
# Shards that a process has verified, with size, date and inode, so that they need not be read again while these stay.
VERIFIED = ".verified-{}.json"


def shard_path(cache_dir: str | Path, number: int) -> Path:
    """Where a shard lies."""
    return Path(cache_dir) / f"shard-{number:05d}.safetensors"


def shard_facts(path: Path) -> dict[str, Any]:
    """A shard's metadata; empty if there is no such file, a damaged one, or another's."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            facts = load_json((file.metadata() or {}).get(FACTS, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return {}
    ours = isinstance(facts, dict) and "fingerprint" in facts and "unreadable" in facts
    return facts if ours and all(check(facts[key]) for key, check in FACT_KEYS.items() if key in facts) else {}


def shard_labels(path: Path):
    """The classes of a shard's images."""
    with reading(path, "a shard of latents"), safe_open(path, "pt") as file:
        file.get_slice("label")  # which checks the header
        return RowReader(path).whole("label")


def shard_digests(path: Path):
    """Digests of a shard's encoded images, unreadable ones too; None in a cache of a release before 0.3."""
    with reading(path, "a shard of latents"), safe_open(path, "pt") as file:
        names = set(file.keys())
        return file.get_tensor("source") if "source" in names else None


def begun_dtype(cache_dir: str | Path, fingerprint: str) -> torch.dtype | None:
    """The type of the latents of a cache that was begun, single precision in older releases; None if it was not."""
    for path in sorted(Path(cache_dir).glob("shard-*.safetensors")):
        if shard_facts(path).get("fingerprint") == fingerprint and "mean" in (rows := RowReader(path)).dtypes:
            return rows.dtypes["mean"]
    return None


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowReader:
    """
    Single rows of a shard's tensors, each read at once: a map of the file would be read page by page. The file is not
    kept open, as a process may have few.

    Attributes:
        shapes (`dict[str, tuple[int, ...]]`): Of each tensor.
        dtypes (`dict[str, torch.dtype]`): Of each tensor.

    Args:
        path (`Path`): A shard that [`check_shards`] has accepted.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            self._state = self._state_of(file)
        header.pop("__metadata__", None)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: DTYPES[entry["dtype"]] for name, entry in header.items()}
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read_into(
        self, read: dict[str, torch.Tensor], places: list[int], rows: list[int], flipped: list[bool]
    ) -> None:
        """
        Reads rows into larger tensors.

        Args:
            read (`dict[str, torch.Tensor]`): By name, those of mirrored images under the name of the others.
            places (`list[int]`): Where each row goes.
            rows (`list[int]`): Which rows.
            flipped (`list[bool]`): Whether each row is that of the mirrored image.

        Raises:
            ValueError: if the file has changed.
        """
        buffers = {name: values.view(torch.uint8).flatten(1).numpy() for name, values in read.items()}
        with open(self.path, "rb", buffering=0) as file:
            if self._state_of(file) != self._state:
                raise ValueError(f"{self.path} has changed since it was opened; encode the images again.")
            for place, row, flip in zip(places, rows, flipped, strict=True):
                for name, buffer in buffers.items():
                    target = memoryview(buffer[place])
                    file.seek(self._starts[name + "_flipped" * flip] + row * len(target))
                    if file.readinto(target) != len(target):
                        raise ValueError(f"{self.path} is cut; encode the images again.")

    def whole(self, name: str) -> torch.Tensor:
        """A tensor that is small."""
        values = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._starts[name])
            buffer: Any = values.view(torch.uint8).numpy()
            file.readinto(buffer)
        return values

    @staticmethod
    def _state_of(file):
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ino


def read_index(cache_dir: str | Path) -> dict:
    """
    Reads a cache's `index.json`.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.

    Returns:
        `dict`

    Raises:
        ValueError: if there is none, or it is none of a cache; the message names file and key.
    """
    file = Path(cache_dir) / INDEX
    if not file.exists():
        raise ValueError(f"{cache_dir} holds no cache of latents ({INDEX} is missing); `dit-hf latents` makes one.")
    index = read_json(file)
    if index.get("checksum", checksum := index_checksum(index)) != checksum:  # older ones have none
        raise ValueError(
            f"{file} was changed since it was written; `dit-hf latents` writes it again if you delete it."
        )
    for key, check in INDEX_KEYS.items():
        if key not in index or not check(index[key]):
            raise ValueError(f"{file} is not the index of a latents cache: {key!r} is missing or has another type.")
    if len(index["latents_mean"]) != len(index["latents_std"]):
        raise ValueError(f"{file}: 'latents_mean' and 'latents_std' are of different lengths.")
    names = [shard["file"] for shard in index["shards"]]
    if names != [shard_path("", number).name for number in range(len(names))]:
        raise ValueError(f"{file}: 'shards' names other files than shard-00000.safetensors and so on.")
    if sum(shard["count"] for shard in index["shards"]) != index["count"]:
        raise ValueError(f"{file}: 'count' is not the sum of the shards' counts.")
    return index


def index_checksum(index: dict[str, Any]) -> str:
    """The SHA-256 of an index, without its own entry `checksum`."""
    content = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_count(value):
    return isinstance(value, int) and 0 <= value <= 2**48


def _is_shard(value):
    return (
        isinstance(value, dict)
        and isinstance(value.get("file"), str)
        and _is_count(value.get("count"))
        and value["count"] <= MAX_SHARD_SIZE
        and isinstance(value.get("sha256"), str)
    )


def _are_numbers(values):
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) > 0 and all(map(math.isfinite, values))


def _are_names(values):
    names = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return names and 0 < len(values) == len(set(values))


def _are_moments(value):
    sums = [value.get("sum"), value.get("squares")] if isinstance(value, dict) else [None]
    return all(map(_are_numbers, sums)) and len(sums[0]) == len(sums[1]) and _is_count(value.get("count"))


def _is_list_of(*kinds):
    return lambda value: isinstance(value, list) and all(isinstance(entry, kinds) for entry in value)


FACT_KEYS = {
    "fingerprint": lambda value: isinstance(value, str),
    "unreadable": _is_list_of(str),
    "unreadable_labels": _is_list_of(int, type(None)),
    "moments": _are_moments,
}
INDEX_KEYS = {
    "fingerprint": lambda value: isinstance(value, str),
    "count": lambda value: _is_count(value) and value > 0,
    "classes": _are_names,
    "latents_mean": _are_numbers,
    "latents_std": lambda value: _are_numbers(value) and min(value) > 0,
    "shards": lambda value: isinstance(value, list) and all(map(_is_shard, value)),
}


def known_fingerprint(cache_dir: str | Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """
    The fingerprint of a cache, which stays that of its first run where a copy has given the images other dates.

    Args:
        cache_dir (`str` or `Path`): The folder; it need not exist.
        settings (`dict`): What the latents depend on.

    Returns:
        `tuple[str, bool]`: the fingerprint, and whether every image has to be compared, as dates have changed.

    Raises:
        ValueError: if the index is damaged.
    """
    has_index = (Path(cache_dir) / INDEX).exists()
    facts = read_index(cache_dir) if has_index else shard_facts(shard_path(cache_dir, 0))
    before: Any = facts.get("settings") or {}
    if not differ_by_dates(before, settings):
        return fingerprint_of(settings), False
    return facts["fingerprint"], before["data"] != summary(settings)["data"]


def record_dates(cache_dir: str | Path, settings: dict[str, Any]) -> None:
    """
    Records the dates of images that have been compared.

    Args:
        cache_dir (`str` or `Path`): A complete cache.
        settings (`dict`): With the dates of today.
    """
    write_index(cache_dir, read_index(cache_dir) | {"settings": summary(settings)})


def write_index(cache_dir: str | Path, index: dict[str, Any]) -> None:
    """Writes `index.json`, and adds its checksum; `OSError` if it can't be written."""
    index["checksum"] = index_checksum(index)
    with writing(Path(cache_dir) / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_cache(cache_dir: str | Path, fingerprint: str, settings: dict[str, Any] | None = None) -> bool:
    """
    Checks that a folder can take a cache: nothing of another cache, and no file of the user, would be overwritten.

    Args:
        cache_dir (`str` or `Path`): The folder; it need not exist.
        fingerprint (`str`): Of the cache to be written.
        settings (`dict`, *optional*): What the fingerprint is of, to say what has changed.

    Returns:
        `bool`: whether the cache is there already, with all shards.

    Raises:
        ValueError: naming the file, or what has changed, and how to continue.
    """
    cache_dir, listed = Path(cache_dir), []
    another = "Choose another folder, or remove this one to encode again."
    if (cache_dir / INDEX).exists():
        index = read_index(cache_dir)
        if index["fingerprint"] != fingerprint:
            change = describe_change(index.get("settings"), settings, (cache_dir / INDEX).stat().st_mtime)
            raise ValueError(f"{cache_dir} holds a finished cache of other latents: {change}. {another}")
        listed = [shard["file"] for shard in index["shards"]]
    for path in sorted(cache_dir.glob("shard-*.safetensors")):
        facts = shard_facts(path)
        if facts.get("fingerprint") == fingerprint or path.name in listed or path.stat().st_size == 0:
            continue  # one of ours that is damaged is encoded again
        if "fingerprint" in facts:
            change = describe_change(facts.get("settings"), settings, path.stat().st_mtime)
            raise ValueError(f"{path} is of an unfinished cache of other latents: {change}. {another}")
        raise ValueError(f"{path} was not written by `dit-hf latents`, or is damaged. {another}")
    return bool(listed) and all((cache_dir / name).is_file() for name in listed)


def remove_partial_shards(cache_dir: Path) -> None:
    """Partial shards of killed processes of any machine; for a cache that is complete, when none can be in work."""
    for path in cache_dir.glob(f"{PARTIAL}*-shard-*.safetensors"):
        remove(path)


def check_shards(cache_dir: str | Path, index: dict) -> None:
    """
    Compares the layout and the labels of a cache with its index, without reading the latents.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.
        index (`dict`): From [`read_index`].

    Raises:
        ValueError: naming the shard that is missing, of another cache, or holds something else.
    """
    layout: dict[str, tuple] = {}
    for entry in index["shards"]:
        path = Path(cache_dir) / entry["file"]
        if shard_facts(path).get("fingerprint") != index["fingerprint"]:
            raise ValueError(f"{path} is missing, damaged or of another cache; delete it and encode the images again.")
        found = _layout(path, entry["count"])
        layout = layout or found
        if found and found != layout:
            raise ValueError(f"{path} holds other tensors than the shards before it: {found}, not {layout}.")
        labels = shard_labels(path)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(index["classes"]):
            raise ValueError(
                f"{path} has labels from {labels.min()} to {labels.max()}; there are {len(index['classes'])} classes."
            )


def check_checksums(cache_dir: str | Path, index: dict, rank: int = 0, count: int = 1, again: bool = False) -> None:
    """
    Compares the shards of a cache with the checksums of its index, and notes that in the cache.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.
        index (`dict`): From [`read_index`].
        rank (`int`, defaults to 0): This process, of those that share the work.
        count (`int`, defaults to 1): How many these are.
        again (`bool`, defaults to `False`): Whether to read shards whose size and date are as when they were verified.

    Raises:
        ValueError: naming the shard that is not what was written.
    """
    cache_dir = Path(cache_dir)
    known = {} if again else _read_verified(cache_dir)
    verified = {}
    for entry in tqdm(index["shards"][rank::count], desc="checksums", delay=5, mininterval=5):
        path = cache_dir / entry["file"]
        state = _state(path, entry)
        if known.get(path.name) != state and file_checksum(path) != entry["sha256"]:
            raise ValueError(f"{path} is not what was written; delete it and encode the images again.")
        verified[path.name] = state
    if verified != known:
        with suppress(OSError), writing(cache_dir / VERIFIED.format(rank)) as partial:  # it may be read-only
            partial.write_text(json.dumps(known | verified), encoding="utf-8")


def record_verified(cache_dir: str | Path, index: dict) -> None:
    """Notes that the shards are those of an index that has just been made from them, so that they need not be read."""
    verified = {entry["file"]: _state(Path(cache_dir, entry["file"]), entry) for entry in index["shards"]}
    with suppress(OSError), writing(Path(cache_dir) / VERIFIED.format(0)) as partial:
        partial.write_text(json.dumps(verified), encoding="utf-8")


def _state(path, entry):
    """What tells that a file has not changed since its checksum was compared."""
    status = check_file(path).stat()
    return [entry["sha256"], status.st_size, status.st_mtime_ns, status.st_ino]


def _read_verified(cache_dir):
    known = {}
    for path in cache_dir.glob(VERIFIED.format("*")):
        with suppress(ValueError):
            known |= read_json(path)
    return known


def _layout(path, count):
    """Shape of a row and type of each tensor of a shard, checked; empty if it has no rows."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        layout = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    if layout.get("label") != ((count,), "I64"):
        raise ValueError(f"{path}: 'label' must hold {count} classes; it holds {layout.get('label')}.")
    layout = {name: row for name, row in layout.items() if name not in ("label", "source")}
    expected = {name + suffix for name in ("mean", "std") for suffix in ("", "_flipped")}
    if "features" in layout:
        expected |= {"features", "features_flipped"}
    if count and set(layout) != expected:
        raise ValueError(f"{path} must hold {', '.join(sorted(expected))}; it holds {', '.join(sorted(layout))}.")
    for name, (shape, dtype) in layout.items():
        same = shape == layout["features" if name.startswith("features") else "mean"][0]
        if len(shape) != 4 or shape[0] != count or not same or dtype not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {name!r} is {dtype} of shape {shape}; it must be (N, C, h, w) of {count} images."
            )
    return {name: (shape[1:], dtype) for name, (shape, dtype) in layout.items()} if count else {}
