"""Statistics of a reference in the format of ADM's reference files: means and covariances instead of images."""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .extractors import INCEPTION, PRECOMPUTED, Features
from .statistics import GaussianStatistics, gaussian


# Parts of `Features`, and the suffix that ADM's files give their statistics.
SUFFIXES = {"features": "", "spatial": "_s"}


@dataclass(frozen=True)
class ReferenceStatistics:
    """
    What a file of statistics holds.

    Args:
        parts (`dict[str, GaussianStatistics]`): Of `features`, and perhaps of `spatial`.
        extractor (`dict`, *optional*): Name, weights, resize rule; ADM's files name none, theirs is Inception.
        image_size (`tuple[int, int]`, *optional*): Height and width of the images, where the file says.
        has_images (`bool`): Whether the file holds the images (`arr_0`) as well.
    """

    parts: dict[str, GaussianStatistics]
    extractor: dict[str, Any] | None
    image_size: tuple[int, int] | None
    has_images: bool

    def is_of(self, extractor: dict[str, Any]) -> bool:
        """Whether they compare with features of an extractor."""
        return extractor["name"] in (INCEPTION, PRECOMPUTED) if self.extractor is None else self.extractor == extractor


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """
    Opens an `.npz`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `zipfile.ZipFile`

    Raises:
        ValueError: if it can't be opened, or is something else.
    """
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no npz file: {error}") from error


def reference_statistics(path: str | Path) -> ReferenceStatistics | None:
    """
    Reads the statistics of a reference file.

    Args:
        path (`str` or `Path`): An `.npz` with `mu`, `sigma` and perhaps `mu_s`, `sigma_s`; or with images alone.

    Returns:
        `ReferenceStatistics`: or None, if the file holds images only.

    Raises:
        ValueError: if the file is damaged or the statistics are not finite.
    """
    with open_npz(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if "mu" not in names:
        if "arr_0" not in names:
            raise ValueError(f"{path} has neither `arr_0` nor `mu` and `sigma`; it has {', '.join(sorted(names))}.")
        return None
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            extractor = json.loads(str(arrays["extractor"])) if "extractor" in names else None
            count = int(arrays["count"]) if "count" in names else None
            size = tuple(arrays["image_size"].tolist()) if "image_size" in names else None
            for part, suffix in SUFFIXES.items():
                if f"mu{suffix}" in names:
                    mean, covariance = (torch.from_numpy(arrays[f"{name}{suffix}"]) for name in ("mu", "sigma"))
                    finite = torch.isfinite(mean).all() and torch.isfinite(covariance).all()
                    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not finite:
                        raise ValueError(f"`mu{suffix}` and `sigma{suffix}` are not a finite mean and covariance.")
                    parts[part] = GaussianStatistics.from_moments(mean, covariance, count)
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    return ReferenceStatistics(parts, extractor, size, "arr_0" in names)


def save_statistics(features: Features, path: str | Path) -> None:
    """
    Writes what [`reference_statistics`] reads: ADM's format, and the entries `count`, `extractor` and `image_size`.

    Args:
        features (`Features`): Of the reference.
        path (`str` or `Path`): The `.npz`.
    """
    arrays = {"count": np.array(len(features.features)), "extractor": np.array(json.dumps(features.extractor))}
    if features.image_size is not None:
        arrays["image_size"] = np.array(features.image_size)
    for part, suffix in SUFFIXES.items():
        if (tensor := getattr(features, part)) is not None:
            statistics = gaussian(tensor)
            arrays |= {f"mu{suffix}": statistics.mean.numpy(), f"sigma{suffix}": statistics.covariance.numpy()}
    partial = Path(path).with_name(f"partial-{Path(path).name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)
