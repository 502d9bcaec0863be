"""Hashes that change when data or weights do."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from .folders import LISTED, is_file, listed, walk


# Incremented when the same data would give other images, labels or pixels than before.
PREPROCESSING = 2


def checksum(module: torch.nn.Module, exclude: tuple[str, ...] = ()) -> str:
    """
    A hash of a network's weights.

    Args:
        module (`torch.nn.Module`): The network.
        exclude (`tuple[str, ...]`): Prefixes of parameter names that are not hashed.

    Returns:
        `str`
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(exclude):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def cache_settings(dataset, source: str | Path, **settings: Any) -> dict[str, Any]:
    """
    What latents depend on.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data.
        source (`str` or `Path`):
            Where they come from. The files of a local folder, also behind links, count by path in it, size and date,
            not by content, which [`~dit_hf.data.latents.check_images`] compares. The path of the folder itself does
            not count.
        settings: Whatever else the latents depend on, as JSON, such as the split, the held-out fraction, and the
            checksums of autoencoder and encoder.

    Returns:
        `dict[str, Any]`: the settings, and `data` and `preprocessing`.
    """
    data: Any
    if Path(source).is_dir():
        data = folder_state(source)
    elif hasattr(dataset, "_fingerprint"):
        data = [str(source), dataset._fingerprint]
    else:
        data = [str(source), HfApi().dataset_info(str(source)).sha]
    return settings | {"preprocessing": PREPROCESSING, "data": data}


def fingerprint_of(settings: dict[str, Any]) -> str:
    """The hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def cache_fingerprint(dataset, source: str | Path, **settings: Any) -> str:
    """
    Changes when the data or what is done to them change.

    Args:
        dataset, source, settings: As [`cache_settings`] takes them.

    Returns:
        `str`
    """
    return fingerprint_of(cache_settings(dataset, source, **settings))


def summary(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Settings as a cache records them: of a long list, such as the state of all files, its length and hash. `undated` is
    that state without dates, which a copy of the files may not keep.
    """
    if _are_files(settings.get("data")):
        settings = settings | {"undated": [file[:2] for file in settings["data"]]}
    long = {key: value for key, value in settings.items() if isinstance(value, list) and len(value) > LISTED}
    short = {key: {"count": len(value), "sha256": fingerprint_of({"": value})} for key, value in long.items()}
    return json.loads(json.dumps(settings | short, default=str))


def _are_files(data):
    return isinstance(data, list) and all(isinstance(file, tuple) for file in data)


def differ_by_dates(before: Any, now: dict[str, Any]) -> bool:
    """
    Whether files have at most other dates than those of a cache, and all else is the same.

    Args:
        before: The [`summary`] that the cache recorded; a release before 0.3 recorded no `undated`.
        now (`dict`): The settings of today.

    Returns:
        `bool`
    """
    found = summary(now)
    same = isinstance(before, dict) and all(before.get(key) == found[key] for key in found if key != "data")
    return same and "undated" in found


def describe_change(before: dict[str, Any] | None, now: dict[str, Any] | None, date: float = 0.0) -> str:
    """
    What has changed, for the message that refuses to overwrite a cache.

    Args:
        before (`dict`, *optional*): The [`summary`] that the cache recorded.
        now (`dict`, *optional*): The settings of today.
        date (`float`, defaults to 0.0): When the cache was written; files of later are named.

    Returns:
        `str`
    """
    if not isinstance(before, dict) or now is None:
        return "its images or settings differ"
    found = summary(now)
    changes = [
        f"{key} was {before.get(key)}, now {found[key]}"
        for key in found
        if key not in ("data", "undated") and before.get(key) != found[key]
    ]
    if before.get("data") != found["data"]:
        files = now["data"] if _are_files(now["data"]) else []
        newer = [path for path, _, changed in files if changed > date * 1e9]
        which = f" ({listed(newer)} changed since)" if newer else ""
        changes.append(
            f"names, sizes or dates of the image files have changed{which}" if files else "the dataset changed"
        )
    return "; ".join(changes) or "its settings differ"


def folder_state(folder: str | Path) -> list[tuple[str, int, int]]:
    """Path in the folder, size and date of every file below it; a link counts as the file it leads to."""
    state = []
    for _, _, files in walk(folder):
        for entry in files:
            status = entry.stat(follow_symlinks=is_file(entry))
            state.append((os.path.relpath(entry.path, folder), status.st_size, status.st_mtime_ns))
    return state
