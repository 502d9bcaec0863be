"""Class-labelled images from `datasets`: load, centre-crop, stack.

Shapes: `N` images, `S` pixels a side.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def load_image_dataset(dataset_name: str, split: str = "train"):
    """
    Loads a dataset by Hub id, a local folder of Parquet files or images.

    Args:
        dataset_name (`str`): Anything `datasets.load_dataset` takes.
        split (`str`, defaults to `"train"`): Name of the split.

    Returns:
        `datasets.Dataset`

    Raises:
        ValueError: if the dataset or the split can't be found; the message says what was tried.
    """
    from datasets import load_dataset

    path = Path(dataset_name)
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"The dataset folder {dataset_name!r} is empty.")
    try:
        return load_dataset(dataset_name, split=split)
    except Exception as error:
        raise ValueError(f"Can't load split {split!r} of dataset {dataset_name!r}: {error}") from error


def label_names(dataset, label_column: str = "label") -> list[str]:
    """
    Class names in the order of their ids.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        label_column (`str`, defaults to `"label"`): Column with a `ClassLabel` feature.

    Returns:
        `list[str]`

    Raises:
        ValueError: if the column is missing or holds no `ClassLabel`.
    """
    feature = dataset.features.get(label_column)
    if feature is None:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"There is no column {label_column!r}; the dataset has {columns}. Pass --label_column.")
    if not hasattr(feature, "names"):
        raise ValueError(
            f"Column {label_column!r} is {feature}, not a ClassLabel; "
            f"call dataset.class_encode_column({label_column!r}) first."
        )
    return list(feature.names)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    The crop of ADM and DiT: halve with a box filter while possible, resize the short side, cut the middle.

    Args:
        image (`PIL.Image.Image`): Any size and mode; what is transparent becomes white.
        size (`int`): Pixels a side of the result.

    Returns:
        `PIL.Image.Image`: RGB, `size` × `size`.
    """
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def stack_images(dataset, resolution: int, image_column: str = "image") -> torch.Tensor:
    """
    Decodes a dataset that fits in memory.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        resolution (`int`): Pixels a side.
        image_column (`str`, defaults to `"image"`): Column with an `Image` feature.

    Returns:
        `torch.Tensor` of shape `(N, 3, S, S)`, uint8.

    Raises:
        ValueError: if there is no such column.
    """
    if image_column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"There is no column {image_column!r}; the dataset has {columns}. Pass --image_column.")
    images = torch.empty(len(dataset), 3, resolution, resolution, dtype=torch.uint8)
    for index, image in enumerate(dataset[image_column]):
        images[index] = torch.from_numpy(np.asarray(center_crop(image, resolution)).copy()).permute(2, 0, 1)
    return images


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """
    8-bit pixels to the VAE's range.

    Args:
        images (`torch.Tensor`): uint8, any shape.

    Returns:
        `torch.Tensor`: float32 in [-1, 1], same shape.
    """
    return images.float() / 127.5 - 1.0
