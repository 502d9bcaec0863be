"""A dataset's rows as tensors, one at a time; images that can't be decoded are skipped and named.

Shapes: `N` images, `S` pixels per side, `H W` pixels.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import islice

import torch
from diffusers.utils import logging

from .encoded import image_bytes
from .folders import listed, normalize_name
from .images import check_column, rows_of
from .library import datasets
from .pixels import center_crop, open_image, to_rgb, to_tensor


logger = logging.get_logger(__name__)

# More undecodable images than this fraction are no accident.
MAX_UNREADABLE = 0.1
# Undecodable images that a warning names.
MAX_NAMED = 20


class ImageReader:
    """
    Decodes and crops the images of a dataset, and lists those that can't be decoded.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        names (`list[str]`, *optional*):
            Class names by id, from [`~dit_hf.data.images.label_names`]. If not given, labels are not read.
        resolution (`int`, *optional*): Pixels per side; images keep their size if not given.
        image_column (`str`, defaults to `"image"`): Column with images.
        label_column (`str`, defaults to `"label"`): Column with class ids or names.

    Raises:
        ValueError: if a column is missing.
    """

    def __init__(self, dataset, names=None, resolution=None, image_column="image", label_column="label"):
        columns = [image_column]
        check_column(dataset, image_column, "--image_column")
        feature = None
        if names is not None:
            if image_column == label_column:
                raise ValueError(f"--image_column and --label_column are both {image_column!r}.")
            feature = check_column(dataset, label_column, "--label_column")
            columns.append(label_column)
        # Undecoded, so that one damaged image does not end the run.
        self.dataset = dataset.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))
        self.names, self.resolution = names, resolution
        self.image_column, self.label_column = image_column, label_column
        self._feature_names = getattr(feature, "names", None)
        self._ids = {name: key for key, name in enumerate(names or ())}

    def read(self, row: dict, position: int) -> tuple[torch.Tensor, int | None]:
        """
        One image and its class.

        Args:
            row (`dict`): Of `self.dataset`.
            position (`int`): Its position in the dataset, for messages.

        Returns:
            `tuple[torch.Tensor, int or None]`: `(3, S, S)` or `(3, H, W)`, uint8, and the class's id, None without
            names.

        Raises:
            OSError: if the image can't be decoded; the message names it.
            ValueError: if the label is none of the classes, or a server does not deliver the image.
        """
        label = None if self.names is None else self.label_id(row[self.label_column], position)
        name = self.name(row, position)
        content = image_bytes(row[self.image_column], name)
        try:
            stored_image = open_image(BytesIO(content))
            image = to_rgb(stored_image) if self.resolution is None else center_crop(stored_image, self.resolution)
        except ValueError as error:
            raise OSError(f"{name}: {error}") from error
        return to_tensor(image), label

    def name(self, row: dict, position: int) -> str:
        """What messages call an image."""
        return f"image {position} ({(row[self.image_column] or {}).get('path') or 'in the dataset'})"

    def load(self, row: dict, position: int) -> dict:
        """A row with its encoded image in memory; one without an image as it is."""
        try:
            content = image_bytes(row[self.image_column], self.name(row, position))
        except OSError:
            return row
        return row | {self.image_column: row[self.image_column] | {"bytes": content}}

    def digest(self, row: dict, position: int) -> int:
        """64 bits of a hash of the encoded image, 0 without one."""
        content = (self.load(row, position)[self.image_column] or {}).get("bytes")
        return 0 if content is None else int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)

    def readable(
        self, rows: Iterable[dict], skipped: list[tuple[str, int | None]], start: int = 0
    ) -> Iterator[tuple[torch.Tensor, int | None]]:
        """
        Images and classes of those rows whose image can be decoded.

        Args:
            rows (`Iterable[dict]`): Of `self.dataset`, or that itself.
            skipped (`list[tuple[str, int or None]]`): The message and the class of each other row are added to it.
            start (`int`, defaults to 0): Position of the first row in the dataset.

        Returns:
            `Iterator[tuple[torch.Tensor, int or None]]`: as [`read`] returns them.
        """
        for position, row in enumerate(rows, start=start):
            try:
                yield self.read(row, position)
            except OSError as error:
                label = None if self.names is None else self.label_id(row[self.label_column], position)
                skipped.append((str(error), label))

    def stack(self) -> tuple[torch.Tensor, list[int | None]]:
        """
        All images that can be decoded, of a dataset that fits in memory; a warning names the others.

        Returns:
            `tuple[torch.Tensor, list[int or None]]`: `(N, 3, S, S)`, uint8, and the N classes' ids.

        Raises:
            ValueError: if there are no images, or more than a tenth can't be decoded.
        """
        skipped: list[tuple[str, int | None]] = []
        images = torch.empty(len(self.dataset), 3, self.resolution, self.resolution, dtype=torch.uint8)
        labels: list[int | None] = []
        for image, label in self.readable(self.dataset, skipped):
            images[len(labels)] = image
            labels.append(label)
        check_skipped([message for message, _ in skipped], len(labels))
        return images[: len(labels)], labels

    def label_id(self, label: int | str | None, position: int) -> int:
        """The id of a class given by id or name; `ValueError` names the image whose label is neither."""
        known, name = self._feature_names, label
        if known is not None and isinstance(
            label, int
        ):  # by name, as the splits of a dataset may number them differently
            name = known[label] if 0 <= label < len(known) else None
        key = None if name is None else self._ids.get(normalize_name(str(name)))
        if key is None:
            classes = listed(self.names) if known is None else f"0 to {len(self.names) - 1}"
            raise ValueError(
                f"Image {position} has the label {label!r}; the classes are {classes}. Remove such images, or pass "
                "another --label_column."
            )
        return key

    def label_ids(self) -> list[int]:
        """The class of each row of a dataset that is not streamed."""
        return [self.label_id(label, position) for position, label in enumerate(self.dataset[self.label_column])]

    def describe(self) -> str:
        """
        What is read, to be printed before work starts.

        Returns:
            `str`: a few lines: the images per class, and of a folder its splits and its skipped files.
        """
        description = self.dataset.info.description
        if isinstance(self.dataset, datasets.IterableDataset):
            classes = "" if self.names is None else f" in {len(self.names)} classes: {listed(self.names)}"
            lines = [f"a stream of images{classes}"]
        elif self.names is None:
            lines = [f"{len(self.dataset)} images"]
        else:
            counts = Counter(self.label_ids())
            classes = listed(f"{name} {counts[key]}" for key, name in enumerate(self.names))
            lines = [f"{len(self.dataset)} images in {len(self.names)} classes: {classes}"]
            empty = [name for key, name in enumerate(self.names) if not counts[key]]
            if empty:
                lines.append(f"{len(empty)} of {len(self.names)} classes have no images: {listed(empty)}")
        return "\n".join([*lines, *filter(None, [description])])

    def shards(self, size: int) -> Iterator[Sequence[dict]]:
        """Successive slices of the rows, in the dataset's order; those of a stream are read in advance."""
        if isinstance(self.dataset, datasets.IterableDataset):
            rows = rows_of(self.dataset)
            while shard := list(islice(rows, size)):
                yield shard
        else:
            for start in range(0, len(self.dataset), size):
                yield self.dataset.select(range(start, min(start + size, len(self.dataset))))


def check_skipped(messages: list[str], count: int) -> None:
    """
    Warns of images that can't be decoded.

    Args:
        messages (`list[str]`): What [`ImageReader.read`] said of each.
        count (`int`): Number of images that can be decoded.

    Raises:
        ValueError: if they are more than a tenth of all images, or there are no images.
    """
    total = count + len(messages)
    if messages:
        logger.warning(f"{len(messages)} of {total} images can't be read and are skipped:")
        for message in messages[:MAX_NAMED]:
            logger.warning(message)
    if len(messages) > MAX_UNREADABLE * total:
        raise ValueError(f"{len(messages)} of {total} images can't be read, such as {messages[0]}")
    if count == 0:
        raise ValueError("The dataset has no images.")


def check_classes(names: list[str], labels: Iterable[int], skipped: Iterable[tuple[str, int | None]]) -> None:
    """
    Warns of classes without images, as in a subset of a larger dataset.

    Args:
        names (`list[str]`): Class names by id.
        labels (`Iterable[int]`): Classes of the images that can be read.
        skipped (`Iterable[tuple[str, int or None]]`): Message and class of each other image.

    Raises:
        ValueError: if a class has images, but none that can be read.
    """
    missing = set(range(len(names))) - set(labels)
    for message, label in skipped:
        if label in missing:
            raise ValueError(f"No image of the class {names[label]!r} can be read, such as {message}")
    if missing:
        logger.warning(
            f"{len(missing)} of {len(names)} classes have no images and keep their ids: "
            f"{listed(names[label] for label in sorted(missing))}"
        )
