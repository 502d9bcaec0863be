"""A held-out split by hash of the images, for data with one split."""

import hashlib

from diffusers.utils import logging
from tqdm import tqdm

from .encoded import image_bytes
from .library import datasets


logger = logging.get_logger(__name__)


def is_held_out(content: bytes, holdout: float) -> bool:
    """
    Whether an image belongs to the held-out split.

    Args:
        content (`bytes`): The encoded image.
        holdout (`float`): Expected fraction of images that do.

    Returns:
        `bool`: the same for equal bytes, in any dataset, on any machine.
    """
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < holdout * 2**64


def hold_out(dataset, split: str, holdout: float):
    """
    The training or the held-out part of a dataset; reads every image once, without decoding.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): With one column of images, or one named `image`.
        split (`str`): `"train"` or `"test"`.
        holdout (`float`): Fraction of images in `"test"`.

    Returns:
        The same type as `dataset`; the images of a stream stay encoded, as [`~dit_hf.data.reader.ImageReader`] reads
        them. An image that can't be read belongs to `"train"`, which reports it.

    Raises:
        ValueError: if no column of images is found, or the part is empty.
    """
    column = image_column(dataset)
    encoded = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))

    def belongs(stored):
        try:
            return is_held_out(image_bytes(stored, "an image"), holdout) == (split == "test")
        except OSError:
            return split == "train"

    if not isinstance(dataset, datasets.Dataset):
        return dataset.cast_column(column, datasets.Image(decode=False)).filter(lambda row: belongs(row[column]))
    rows = tqdm(encoded, desc="hold out", mininterval=5)
    indices = [index for index, row in enumerate(rows) if belongs(row[column])]
    if not indices:
        raise ValueError(
            f"--holdout {holdout} leaves no image of {len(dataset)} in the split {split!r}; pass another fraction."
        )
    if len(indices) == len(dataset):
        logger.warning(f"--holdout {holdout} leaves no image of {len(dataset)} outside of the split {split!r}.")
    part = dataset.select(indices)
    note = f"holdout {holdout}: split {split} has {len(part)} of {len(dataset)} images"
    part.info.description = "\n".join(filter(None, [part.info.description, note]))
    return part


def image_column(dataset) -> str:
    """The column of images; `ValueError` if it is not clear which."""
    features = dataset.features or {}
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) == 1:
        return found[0]
    if "image" in features:
        return "image"
    raise ValueError(
        f"--holdout needs one column of images; the dataset has {', '.join(features) or 'unknown columns'}."
    )
