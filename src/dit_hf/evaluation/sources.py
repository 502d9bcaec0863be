"""Where images to be measured come from: ADM's `.npz`, folders of pictures, and `datasets`; and statistics in ADM's format.

Shapes: `N` images, `H W` pixels.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import Image

from ..data.images import check_column, load_image_dataset
from ..data.pixels import center_crop, to_rgb, to_tensor
from .extractors import Features
from .metrics import gaussian
from .statistics import GaussianStatistics


# What `sample.py` calls its set.
SAMPLES = "samples.npz"
# Parts of `Features`, and how ADM's reference files call their statistics.
STATISTICS = {"features": "", "spatial": "_s"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEND = "pass --resolution to crop them as training does"


class ImageSource:
    """
    Images of one size, read a batch at a time.

    Args:
        source (`str` or `Path`): An `.npz` with `arr_0` (uint8, NHWC), a folder of pictures, or a dataset.
        split (`str`, defaults to `"test"`): Of a dataset.
        image_column (`str`, defaults to `"image"`): Of a dataset.
        resolution (`int`, *optional*):
            Pixels a side that pictures of folders and datasets are cropped to, as training does; none are if not given.

    Raises:
        ValueError: naming the file, if there are no images, or what is there is something else.
    """

    def __init__(
        self, source: str | Path, split: str = "test", image_column: str = "image", resolution: int | None = None
    ):
        self.source, self.resolution = Path(source), resolution
        if self.source.suffix == ".npz":
            self._read = self._npz
        elif files := pictures(self.source):
            self._files = files
            self._read = self._folder
        else:
            self._dataset = load_image_dataset(str(source), split)
            if not isinstance(check_column(self._dataset, image_column, "--image_column"), ImageFeature):
                raise ValueError(f"Column {image_column!r} of {source} holds no images. Pass --image_column.")
            self._column = image_column
            self._read = self._rows

    def batches(self, size: int = 64) -> Iterator[torch.Tensor]:
        """
        All images, in order.

        Args:
            size (`int`, defaults to 64): Images at once.

        Returns:
            `Iterator[torch.Tensor]`: `(N, 3, H, W)`, uint8.
        """
        shape = None
        try:
            for batch in self._read(size):
                if shape is not None and batch.shape[1:] != shape:
                    sizes = f"{tuple(shape)} and {tuple(batch.shape[1:])}"
                    raise ValueError(f"its images are of different sizes, {sizes}: {MEND}")
                shape = batch.shape[1:]
                yield batch
        except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            raise ValueError(f"{self.source} can't be used: {error}") from error
        if shape is None:
            raise ValueError(f"{self.source} holds no images.")

    def labels(self) -> list[str] | None:
        """
        Class names of the images, in order, where they are known: of a dataset with a column `label`, and of what `sample.py`
        has drawn (`arr_1` of the `.npz`, and `classes` of the `recipe.json` beside it).
        """
        if self._read == self._rows:
            names = getattr(self._dataset.features.get("label"), "names", None)
            if names is None:
                return None
            labels = self._dataset["label"]
            if any(label is None or label < 0 for label in labels):
                raise ValueError(f"{self.source} has images without a class.")
            return [names[label] for label in labels]
        names = sampling_recipe(self.source).get("classes")
        if self._read != self._npz or not names:
            return None
        with np.load(self.source, allow_pickle=False) as arrays:
            ids = [str(label) for label in arrays["arr_1"].tolist()] if "arr_1" in arrays else []
        if unknown := sorted(set(ids) - set(names)):
            raise ValueError(f"{self.source} has images of class {unknown[0]}, which its recipe.json does not name.")
        return [names[label] for label in ids] or None

    def digest(self) -> str:
        """A hash of all pixels, in order; reads the images once."""
        digest = hashlib.sha256()
        for batch in self.batches():
            digest.update(str(tuple(batch.shape[1:])).encode() + batch.numpy().tobytes())
        return digest.hexdigest()

    def _npz(self, size):
        with open_npz(self.source) as archive, archive.open("arr_0.npy") as file:
            shape, dtype = npy_header(file, self.source)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"{self.source}: `arr_0` is {dtype} of shape {shape}; it must be uint8 (N, H, W, 3).")
            image_bytes = int(np.prod(shape[1:]))
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                content = file.read(count * image_bytes)
                if len(content) != count * image_bytes:
                    raise ValueError(f"{self.source} ends after {start} of {shape[0]} images.")
                pixels = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()

    def _folder(self, size):
        for start in range(0, len(self._files), size):
            yield self._stack([(path, Image.open(path)) for path in self._files[start : start + size]])

    def _rows(self, size):
        for start in range(0, len(self._dataset), size):
            images = self._dataset[start : start + size][self._column]
            yield self._stack([(f"image {start + index}", image) for index, image in enumerate(images)])

    def _stack(self, images):
        tensors = []
        for name, image in images:
            try:
                if image is None:
                    raise OSError("there is none")
                image = to_rgb(image) if self.resolution is None else center_crop(image, self.resolution)
            except OSError as error:
                raise ValueError(f"{name} of {self.source} can't be read: {error}") from error
            tensors.append(to_tensor(image))
            if tensors[-1].shape != tensors[0].shape:
                raise ValueError(f"{name} of {self.source} is {image.size}; others are of another size: {MEND}.")
        return torch.stack(tensors)


def pictures(folder: str | Path) -> list[Path]:
    """
    Pictures that lie in a folder, sorted by name.

    Args:
        folder (`str` or `Path`): Without its subfolders, which may be a dataset's classes or splits.

    Returns:
        `list[Path]`
    """
    folder = Path(folder)
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES) if folder.is_dir() else []


def sampling_recipe(source: str | Path) -> dict:
    """
    How a set of samples was drawn.

    Args:
        source (`str` or `Path`): The set.

    Returns:
        `dict`: what `sample.py` has written into the `recipe.json` beside its `samples.npz`; empty for other sets.

    Raises:
        ValueError: if that file is damaged.
    """
    file = Path(source).parent / "recipe.json"
    try:
        return json.loads(file.read_text()) if Path(source).name == SAMPLES and file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} can't be read: {error}") from error


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """
    Opens an `.npz`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `zipfile.ZipFile`

    Raises:
        ValueError: if it is none.
    """
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no npz file: {error}") from error


def npy_header(file, path):
    """Shape and type of an array in an `.npz`, without what is pickled."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise ValueError(f"{path} holds no array: {error}") from error
    if fortran or dtype.hasobject:
        raise ValueError(f"{path}: `arr_0` is stored in an order or type that is not read.")
    return shape, dtype


def reference_statistics(path: str | Path) -> tuple[dict[str, GaussianStatistics], dict | None] | None:
    """
    What ADM's reference files hold instead of images.

    Args:
        path (`str` or `Path`): An `.npz` with `mu`, `sigma` and perhaps `mu_s`, `sigma_s`.

    Returns:
        `tuple[dict[str, GaussianStatistics], dict or None]`: for `features` and perhaps `spatial`, and the extractor, where
        the file names it (ADM's do not; theirs is Inception). None if the file holds images only.

    Raises:
        ValueError: if the file is damaged or the statistics are not finite.
    """
    with open_npz(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if "mu" not in names:
        if "arr_0" not in names:
            raise ValueError(f"{path} has neither `arr_0` nor `mu` and `sigma`; it has {', '.join(sorted(names))}.")
        return None
    found = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            extractor = json.loads(str(arrays["extractor"])) if "extractor" in names else None
            count = int(arrays["count"]) if "count" in names else None
            for part, suffix in STATISTICS.items():
                if f"mu{suffix}" in names:
                    mean, covariance = (torch.from_numpy(arrays[f"{name}{suffix}"]) for name in ("mu", "sigma"))
                    finite = torch.isfinite(mean).all() and torch.isfinite(covariance).all()
                    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not finite:
                        raise ValueError(f"`mu{suffix}` and `sigma{suffix}` are not a finite mean and covariance.")
                    found[part] = GaussianStatistics.from_moments(mean, covariance, count)
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    return found, extractor


def save_statistics(features: Features, path: str | Path) -> None:
    """
    Writes what [`reference_statistics`] reads, in ADM's format with two more entries: `count` and `extractor`.

    Args:
        features (`Features`): Of the reference.
        path (`str` or `Path`): The `.npz`.
    """
    arrays = {"count": np.array(len(features.features)), "extractor": np.array(json.dumps(features.extractor))}
    for part, suffix in STATISTICS.items():
        if (tensor := getattr(features, part)) is not None:
            statistics = gaussian(tensor)
            arrays |= {f"mu{suffix}": statistics.mean.numpy(), f"sigma{suffix}": statistics.covariance.numpy()}
    partial = Path(path).with_name(f"partial-{Path(path).name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)
