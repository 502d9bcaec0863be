"""Statistics of a reference in the format of ADM's reference files: means and covariances instead of images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import reading, writing
from .extractors import INCEPTION, PRECOMPUTED, Features
from .npz import array_names, open_npz, read_array
from .statistics import GaussianStatistics, check_moments, gaussian


# Parts of `Features`, and the suffix that ADM's files give their statistics.
SUFFIXES = {"features": "", "spatial": "_s"}
# Of a mean that is read: four times Inception's, whose covariance has 512 MB.
MAX_CHANNELS = 8192
MAX_TEXT_BYTES = 2**20


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


def reference_statistics(path: str | Path) -> ReferenceStatistics | None:
    """
    Reads the statistics of a reference file.

    Args:
        path (`str` or `Path`): An `.npz` with `mu`, `sigma` and perhaps `mu_s`, `sigma_s`; or with images alone.

    Returns:
        `ReferenceStatistics`: or None, if the file holds images only.

    Raises:
        ValueError: if the file is damaged, or the statistics are not a finite mean and a symmetric covariance.
    """
    with open_npz(path) as archive:
        names = array_names(archive)
        if "mu" not in names:
            if "arr_0" not in names:
                raise ValueError(
                    f"{path} has neither `arr_0` nor `mu` and `sigma`; it has {', '.join(names) or 'none'}."
                )
            return None
        extractor = read_extractor(archive) if "extractor" in names else None
        count = read_counts(archive, "count", ())[0] if "count" in names else None
        size = read_counts(archive, "image_size", (2,)) if "image_size" in names else None
        if count is not None and count < 2:
            raise ValueError(f"{path}: `count` is {count}; a covariance needs at least 2 images.")
        parts = {}
        for part, suffix in SUFFIXES.items():
            if f"mu{suffix}" in names:
                mean, covariance = (read_moment(archive, f"{name}{suffix}") for name in ("mu", "sigma"))
                try:
                    check_moments(mean, covariance)
                except ValueError as error:
                    raise ValueError(f"{path}: `mu{suffix}` and `sigma{suffix}` can't be used: {error}") from None
                parts[part] = GaussianStatistics.from_moments(mean, covariance, count)
    return ReferenceStatistics(parts, extractor, (size[0], size[1]) if size else None, "arr_0" in names)


def read_moment(archive, name):
    """A mean or a covariance."""
    array = read_array(archive, name, 8 * MAX_CHANNELS**2)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{archive.filename}: `{name}` is {array.dtype}; it must be real numbers.")
    return torch.from_numpy(array.astype(np.float64))


def read_counts(archive, name, shape):
    """Whole numbers, not negative, as a tuple."""
    array = read_array(archive, name, 16)
    if array.shape != shape or array.dtype.kind not in "iu" or (array < 0).any():
        what = "a number" if shape == () else "two numbers"
        raise ValueError(f"{archive.filename}: `{name}` must be {what} from 0; it is {array.dtype} of {array.shape}.")
    return tuple(array.reshape(-1).tolist())


def read_extractor(archive):
    """The description of the extractor, JSON in an array of one text."""
    array = read_array(archive, "extractor", MAX_TEXT_BYTES)
    description = None
    if array.dtype.kind == "U" and array.size == 1:
        with reading(archive.filename, "statistics of an extractor"):
            description = json.loads(str(array.reshape(())))
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise ValueError(f"{archive.filename}: `extractor` must hold a JSON object with a `name`.")
    return description


def save_statistics(features: Features, path: str | Path) -> None:
    """
    Writes what [`reference_statistics`] reads: ADM's format, and the entries `count`, `extractor` and `image_size`.

    Args:
        features (`Features`): Of the reference.
        path (`str` or `Path`): The `.npz`.

    Raises:
        OSError: if it can't be written; what was there before is unchanged.
    """
    arrays = {"count": np.array(len(features.features)), "extractor": np.array(json.dumps(features.extractor))}
    if features.image_size is not None:
        arrays["image_size"] = np.array(features.image_size)
    for part, suffix in SUFFIXES.items():
        if (tensor := getattr(features, part)) is not None:
            statistics = gaussian(tensor)
            arrays |= {f"mu{suffix}": statistics.mean.numpy(), f"sigma{suffix}": statistics.covariance.numpy()}
    with writing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
