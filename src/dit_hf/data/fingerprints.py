"""Hashes that change when data or weights do."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from .folders import is_file, walk


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


def cache_fingerprint(dataset, source: str | Path, **settings: Any) -> str:
    """
    Changes when the data or what is done to them change.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data.
        source (`str` or `Path`):
            Where they come from. The files of a local folder, also behind links, count by path in it, size and date.
            The path of the folder itself does not count.
        settings: Whatever else the latents depend on, as JSON, such as the split, the held-out fraction, and the
            checksums of autoencoder and encoder.

    Returns:
        `str`
    """
    data: Any
    if Path(source).is_dir():
        data = folder_state(source)
    elif hasattr(dataset, "_fingerprint"):
        data = [str(source), dataset._fingerprint]
    else:
        data = [str(source), HfApi().dataset_info(str(source)).sha]
    settings |= {"preprocessing": PREPROCESSING, "data": data}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def folder_state(folder: str | Path) -> list[tuple[str, int, int]]:
    """Path in the folder, size and date of every file below it; a link counts as the file it leads to."""
    state = []
    for _, _, files in walk(folder):
        for entry in files:
            status = entry.stat(follow_symlinks=is_file(entry))
            state.append((os.path.relpath(entry.path, folder), status.st_size, status.st_mtime_ns))
    return state
