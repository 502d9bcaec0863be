"""Images to be measured: ADM's `.npz`, folders of images, and `datasets`.

Shapes: `N` images, `H W` pixels.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.folders import IMAGE_SUFFIXES, normalize_name
from ..data.pixels import center_crop, check_pixels, open_image, to_rgb, to_tensor
from ..files import check_file, first_line
from .npz import array_names, open_array, open_npz, read_array
from .samples import check_recipe, sampling_recipe


INSTALL = "pip install 'dit_hf[evaluate]'."
FIX = "pass --resolution to crop them as training does"
# Of a batch of images; large ones come in smaller batches.
MAX_BATCH_BYTES = 2**27
# Of the class ids of an `.npz`.
MAX_LABEL_BYTES = 2**27


class ImageSource:
    """
    Images of one size, read a batch at a time. Images that can't be read are skipped and named in `skipped`.

    Args:
        source (`str` or `Path`): An `.npz` with `arr_0` (uint8, NHWC), a folder of images, or a dataset.
        split (`str`, defaults to `"test"`): Of a dataset.
        image_column (`str`, defaults to `"image"`): Of a dataset.
        resolution (`int`, *optional*): Pixels per side to crop images to, as training does; none by default.
        holdout (`float`, defaults to 0.0): Of a dataset with one split, the fraction that is its `test` split.

    Attributes:
        skipped (`dict[int, str]`): Position and reason of each image that the last reading skipped.
        image_size (`tuple[int, int]`, *optional*): Height and width, once an image has been read.
        count (`int`): Images that can be read, once [`digest`] has read them.

    Raises:
        ValueError: naming the file, if there are no images, or it holds something else.
    """

    def __init__(
        self,
        source: str | Path,
        split: str = "test",
        image_column: str = "image",
        resolution: int | None = None,
        holdout: float = 0.0,
    ):
        self.source, self.resolution = Path(source), resolution
        self.skipped: dict[int, str] = {}
        self.image_size: tuple[int, int] | None = None
        self.count = 0
        self._digest: str | None = None
        if str(source) == "":
            raise ValueError("A set of images has an empty name; pass an .npz, a folder of images or a dataset.")
        if self.source.suffix == ".npz":
            self._check_npz()
            self._read = self._npz
        elif is_file(self.source):
            raise ValueError(
                f"{source} is a file that is not read: pass an .npz, a folder of images or a dataset; a .safetensors "
                "of features goes with --feature_extractor precomputed."
            )
        elif files := image_files(self.source):
            self._files = files
            self._read = self._folder
        else:
            self._dataset, self._reader = open_dataset(str(source), split, image_column, resolution, holdout)
            self._read = self._rows

    def batches(self, size: int = 64) -> Iterator[torch.Tensor]:
        """
        All images that can be read, in order.

        Args:
            size (`int`, defaults to 64): Images in a batch.

        Returns:
            `Iterator[torch.Tensor]`: `(N, 3, H, W)`, uint8.

        Raises:
            ValueError: if there are none, they are of different sizes, or the file is damaged.
        """
        self.skipped, self.image_size = {}, None
        batch: list[torch.Tensor] = []
        try:
            for position, (name, decode) in enumerate(self._read()):
                try:
                    image = decode()
                except OSError as error:
                    self.skipped[position] = str(error)
                    continue
                self._check_size(name, image)
                batch.append(image)
                if len(batch) == size or len(batch) * image.numel() >= MAX_BATCH_BYTES:
                    yield torch.stack(batch)
                    batch = []
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            raise ValueError(f"{self.source} can't be used: {first_line(error)}") from error
        if batch:
            yield torch.stack(batch)
        if self.image_size is None:
            reason = f" that can be read ({next(iter(self.skipped.values()))})" if self.skipped else ""
            raise ValueError(f"{self.source} holds no images{reason}.")

    def digest(self) -> str:
        """A hash of all pixels, in order; reads the images once."""
        if self._digest is None:
            digest = hashlib.sha256()
            for batch in self.batches():
                if self.count == 0:
                    digest.update(str(tuple(batch.shape[1:])).encode())
                digest.update(batch.numpy().tobytes())
                self.count += len(batch)
            self._digest = digest.hexdigest()
        return self._digest

    @property
    def is_dataset(self) -> bool:
        """Whether it is a dataset, which has splits and columns."""
        return self._read == self._rows

    def labels(self) -> list[str] | None:
        """
        Class names of the images that [`batches`] gave, in order: of a dataset with a column `label`, or of a set that
        `sample.py` wrote (`arr_1` of the `.npz`, and `classes` of the `recipe.json` beside it).

        Returns:
            `list[str]`: or None, if the class of an image is not known.

        Raises:
            ValueError: if a sample is of a class that the `recipe.json` does not name.
        """
        if self._read == self._rows:
            labels = dataset_labels(self._dataset)
        elif self._read == self._npz:
            labels = self._sampled_labels()
        else:
            labels = None
        return labels and [label for position, label in enumerate(labels) if position not in self.skipped]

    def _sampled_labels(self):
        names = sampling_recipe(self.source).get("classes")
        if not names:
            return None
        with open_npz(self.source) as archive:
            has_labels = "arr_1" in array_names(archive)
            found = read_array(archive, "arr_1", MAX_LABEL_BYTES) if has_labels else np.zeros(0, np.int64)
            images = open_array(archive, "arr_0")[1][0]
        if has_labels and (found.dtype.kind not in "iu" or found.shape != (images,)):
            raise ValueError(f"{self.source}: `arr_1` is {found.dtype} of {found.shape}, not {images} class ids.")
        ids = [str(label) for label in found.tolist()]
        if unknown := sorted(set(ids) - set(names)):
            raise ValueError(f"{self.source} has images of class {unknown[0]}, which its recipe.json does not name.")
        return [normalize_name(names[label]) for label in ids] or None

    def _check_npz(self):
        """The header of the images, and the recipe beside them, before anything is read."""
        with open_npz(self.source) as archive:
            _, shape, dtype = open_array(archive, "arr_0")
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
                raise ValueError(f"{self.source}: `arr_0` is {dtype} of shape {shape}; it must be uint8 (N, H, W, 3).")
            check_pixels(f"{self.source}: an image", shape[2], shape[1])
            if shape[0] == 0:
                raise ValueError(f"{self.source} holds no images.")
        check_recipe(self.source, shape[0])

    def _npz(self):
        with open_npz(self.source) as archive:
            file, shape, _ = open_array(archive, "arr_0")
            image_bytes = shape[1] * shape[2] * shape[3]
            for position in range(shape[0]):
                content = file.read(image_bytes)
                if len(content) != image_bytes:
                    raise ValueError(f"{self.source} ends after {position} of {shape[0]} images.")
                image = Image.fromarray(np.frombuffer(content, np.uint8).reshape(shape[1:]))
                yield f"image {position}", partial(self._pixels, image)

    def _folder(self):
        for path in self._files:
            yield path.name, partial(self._open, path)

    def _rows(self):
        for position, row in enumerate(self._reader.dataset):
            yield f"image {position}", lambda row=row, position=position: self._reader.read(row, position)[0]

    def _open(self, path):
        try:
            return self._pixels(open_image(path))
        except ValueError as error:
            raise OSError(f"{path.name}: {error}") from error

    def _pixels(self, image):
        return to_tensor(to_rgb(image) if self.resolution is None else center_crop(image, self.resolution))

    def _check_size(self, name, image):
        size = (image.shape[1], image.shape[2])
        self.image_size = self.image_size or size
        if size != self.image_size:
            sizes = " and ".join(f"{height}×{width}" for height, width in (self.image_size, size))
            raise ValueError(f"{name} is of another size, {sizes} pixels: {FIX}")


def is_file(path: Path) -> bool:
    """Whether it exists and is not a folder; `ValueError` if it is a pipe or a device, or can't be opened."""
    try:
        exists = path.exists() and not path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or with a null byte
        raise ValueError(f"{path} can't be opened: {getattr(error, 'strerror', None) or error}.") from None
    if exists:
        check_file(path)
    return exists


def image_files(folder: str | Path) -> list[Path]:
    """
    Images of a folder, sorted by name.

    Args:
        folder (`str` or `Path`): A folder of images, or any other path.

    Returns:
        `list[Path]`: empty where there are none, as in a dataset's folder of class folders.

    Raises:
        ValueError: if there are folders of images beside images, and so it is not clear what is meant.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    for inner in folder.iterdir() if files else ():
        if inner.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in inner.rglob("*")):
            raise ValueError(
                f"{folder} has images ({files[0].name}) and a folder of images ({inner.name}): move one of them away."
            )
    return files


def open_dataset(source: str, split: str, image_column: str, resolution: int | None, holdout: float):
    """A dataset and the reader of its images, which needs the `datasets` library."""
    try:
        from datasets import Image as ImageFeature

        from ..data.images import check_column, load_image_dataset
        from ..data.reader import ImageReader
    except ModuleNotFoundError as error:
        raise ImportError(f"{source} is read as a dataset, which needs {error.name}: {INSTALL}") from error
    dataset = load_image_dataset(source, split, holdout=holdout)
    if not isinstance(check_column(dataset, image_column, "--image_column"), ImageFeature):
        raise ValueError(f"Column {image_column!r} of {source} holds no images. Pass --image_column.")
    return dataset, ImageReader(dataset, None, resolution, image_column)


def dataset_labels(dataset) -> list[str] | None:
    """
    Class names of a dataset's rows.

    Args:
        dataset (`datasets.Dataset`): The dataset.

    Returns:
        `list[str]`: or None, if it has no column `label`, or an image has no class.
    """
    if "label" not in dataset.column_names:
        return None
    names = getattr(dataset.features["label"], "names", None)
    labels = list(dataset["label"])
    if any(label is None or (names is not None and label < 0) for label in labels):
        return None
    return [normalize_name(str(label) if names is None else names[label]) for label in labels]
