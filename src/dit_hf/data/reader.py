"""A dataset's rows as tensors, one at a time; damaged images do not end a run.

Shapes: `S` pixels a side.
"""

from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from datasets import Image as ImageFeature
from datasets import IterableDataset
from datasets.utils.file_utils import xopen
from PIL import Image

from .images import center_crop, check_column, to_tensor


def fetch(address: str, name: str) -> bytes:
    """What a server or archive holds; `OSError` if there is no such file, `ValueError` if it was not to be had."""
    try:
        with xopen(address, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise OSError(f"{name}: {error}") from error
    except Exception as error:  # of whichever library fetches; it may come another time, and is not left out for good
        raise ValueError(f"{name} was not to be had: {error}. Do the same again.") from error


class ImageReader:
    """
    Decodes and crops a dataset's rows, and counts and names those it can't use.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        names (`list[str]`): Class names, by id.
        resolution (`int`): Pixels a side.
        image_column (`str`, defaults to `"image"`): Column with images.
        label_column (`str`, defaults to `"label"`): Column with class ids or names.

    Raises:
        ValueError: if a column is missing.
    """

    def __init__(self, dataset, names, resolution, image_column="image", label_column="label"):
        for column, flag in ((image_column, "--image_column"), (label_column, "--label_column")):
            check_column(dataset, column, flag)
        # Undecoded, so that one damaged image does not end the run.
        self.dataset = dataset.select_columns([image_column, label_column]).cast_column(
            image_column, ImageFeature(decode=False)
        )
        self.names, self.resolution = names, resolution
        self.image_column, self.label_column = image_column, label_column
        self._ids = {name: key for key, name in enumerate(names)}

    def read(self, row: dict, position: int) -> tuple[torch.Tensor, int]:
        """
        One image and its class.

        Args:
            row (`dict`): Of `self.dataset`.
            position (`int`): Its place in the dataset, for messages.

        Returns:
            `tuple[torch.Tensor, int]`: `(3, S, S)`, uint8, and the class's id.

        Raises:
            OSError: if the image can't be read; the message names it.
            ValueError: if the label is none of the classes, or a server does not give the image.
        """
        label = self.label_id(row[self.label_column], position)
        stored = row[self.image_column] or {"path": None, "bytes": None}
        path, content = stored["path"], stored["bytes"]
        name = f"image {position} ({path or 'in the dataset'})"
        if content is None and "://" in str(path):
            content = fetch(path, name)
        try:
            content = Path(path).read_bytes() if content is None else content
            return to_tensor(center_crop(Image.open(BytesIO(content)), self.resolution)), label
        except Exception as error:  # decoders raise all kinds
            raise OSError(f"{name}: {error}") from error

    def label_id(self, label: int | str, position: int) -> int:
        """The id of a class given by id or name; `ValueError` names the image whose label is neither."""
        key = self._ids.get(label, label)
        if not isinstance(key, int) or not 0 <= key < len(self.names):
            raise ValueError(
                f"Image {position} has the label {label!r}; the classes are 0 to {len(self.names) - 1}. "
                "Leave such images out, or name another --label_column."
            )
        return key

    def shards(self, size: int) -> Iterator[Iterable[dict]]:
        """Stretches of rows, in the dataset's order; those of a stream are read, others when they are gone through."""
        if isinstance(self.dataset, IterableDataset):
            rows = iter(self.dataset)
            while shard := list(islice(rows, size)):
                yield shard
        else:
            for start in range(0, len(self.dataset), size):
                yield self.dataset.select(range(start, min(start + size, len(self.dataset))))
