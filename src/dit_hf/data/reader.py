"""A dataset's rows as tensors, one at a time; images that can't be decoded are skipped and named.

Shapes: `S` pixels per side, `H W` pixels.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice

import torch
from datasets import Image as ImageFeature
from datasets import IterableDataset
from PIL import Image

from .encoded import image_bytes
from .folders import listed, normalize_name
from .images import check_column
from .pixels import center_crop, to_rgb, to_tensor


class ImageReader:
    """
    Decodes and crops a dataset's rows, and names those it can't decode.

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
            feature = check_column(dataset, label_column, "--label_column")
            columns.append(label_column)
        # Undecoded, so that one damaged image does not end the run.
        self.dataset = dataset.select_columns(columns).cast_column(image_column, ImageFeature(decode=False))
        self.names, self.resolution = names, resolution
        self.image_column, self.label_column = image_column, label_column
        self._holds_ids = hasattr(feature, "names")
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
        stored = row[self.image_column]
        name = f"image {position} ({(stored or {}).get('path') or 'in the dataset'})"
        content = image_bytes(stored, name)
        try:
            stored_image = Image.open(BytesIO(content))
            image = to_rgb(stored_image) if self.resolution is None else center_crop(stored_image, self.resolution)
        except Exception as error:  # decoders raise all kinds
            raise OSError(f"{name}: {error}") from error
        return to_tensor(image), label

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

    def label_id(self, label: int | str | None, position: int) -> int:
        """The id of a class given by id or name; `ValueError` names the image whose label is neither."""
        if self._holds_ids and isinstance(label, int):
            key = label if 0 <= label < len(self.names) else None
        else:
            key = None if label is None else self._ids.get(normalize_name(str(label)))
        if key is None:
            classes = f"0 to {len(self.names) - 1}" if self._holds_ids else listed(self.names)
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
        if isinstance(self.dataset, IterableDataset):
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

    def shards(self, size: int) -> Iterator[Iterable[dict]]:
        """Successive slices of the rows, in the dataset's order; those of a stream are read in advance."""
        if isinstance(self.dataset, IterableDataset):
            rows = iter(self.dataset)
            while shard := list(islice(rows, size)):
                yield shard
        else:
            for start in range(0, len(self.dataset), size):
                yield self.dataset.select(range(start, min(start + size, len(self.dataset))))
