"""Class-labelled images from `datasets`: load, centre-crop, stack.

Shapes: `N` images, `S` pixels a side.
"""

import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


def load_image_dataset(
    dataset_name: str | None = None,
    split: str = "train",
    train_data_dir: str | Path | None = None,
    streaming: bool = False,
):
    """
    Loads labelled images by Hub id, from a local dataset, or from a folder.

    Args:
        dataset_name (`str`, *optional*): Anything `datasets.load_dataset` takes.
        split (`str`, defaults to `"train"`): Name of the split.
        train_data_dir (`str` or `Path`, *optional*):
            Instead of a dataset's name: a folder with one folder of images a class, or with WebDataset (`.tar`) or
            Parquet shards.
        streaming (`bool`, defaults to `False`): Whether to read while training goes on, without a copy on this machine.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streaming.

    Raises:
        ValueError: if the dataset or the split can't be found; the message says what was tried.
    """
    from datasets import load_dataset

    source = dataset_name or train_data_dir
    if source is None or (dataset_name and train_data_dir):
        raise ValueError("Pass either --dataset_name or --train_data_dir.")
    if Path(source).is_dir() and not any(path.is_file() for path in Path(source).rglob("*")):
        raise ValueError(f"The dataset folder {str(source)!r} is empty.")
    arguments: dict[str, Any] = {"path": dataset_name} if train_data_dir is None else _folder_arguments(train_data_dir)
    try:
        return load_dataset(**arguments, split=split, streaming=streaming)
    except Exception as error:
        hint = " Folders named by split, above the class folders, are splits." if Path(source).is_dir() else ""
        raise ValueError(f"Can't load split {split!r} of dataset {str(source)!r}: {error}{hint}") from error


def _folder_arguments(folder):
    """What `load_dataset` needs for a folder of shards or of images."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    for builder, suffix in (("webdataset", ".tar"), ("parquet", ".parquet")):
        if next(folder.glob(f"*{suffix}"), None) or next(folder.glob(f"*/*{suffix}"), None):
            return {"path": builder, "data_dir": str(folder)}
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{str(folder)!r} has no folders, one a class, and no .tar or .parquet shards.")
    splits = [path.name for path in classes if path.name in SPLITS]
    if len(splits) == len(classes):
        return {"path": "imagefolder", "data_dir": str(folder), "drop_labels": False}
    if len(splits) > 1:
        other = next(path.name for path in classes if path.name not in SPLITS)
        raise ValueError(
            f"{str(folder)!r} has the splits {', '.join(splits)} and beside them {other!r}: move it away."
        )
    # Named one by one, or a class whose name sounds like a split's would be taken for one.
    files = [f"{glob.escape(str(path))}/**" for path in classes]
    return {"path": "imagefolder", "data_files": {"train": files}, "drop_labels": False}


def label_names(dataset, label_column: str = "label") -> list[str]:
    """
    Class names in the order of their ids.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        label_column (`str`, defaults to `"label"`):
            Column with a `ClassLabel` feature, or with integers or strings, which are then read through once; integers
            are ids named by themselves, strings get ids in sorted order.

    Returns:
        `list[str]`

    Raises:
        ValueError: if the column is missing, holds something else, or there are not at least two classes.
    """
    feature = check_column(dataset, label_column, "--label_column")
    if hasattr(feature, "names"):
        names = list(feature.names)
    else:
        found = set()
        for row in dataset.select_columns(label_column):
            label = row[label_column]
            if not isinstance(label, str) and (not isinstance(label, int) or label < 0):
                raise ValueError(
                    f"Column {label_column!r} holds {label!r}; a label is a class's id, from 0, or its name."
                )
            found.add(label)
        if len({type(label) for label in found}) > 1:
            raise ValueError(f"Column {label_column!r} holds numbers and names; use one of them.")
        are_ids = isinstance(next(iter(found), ""), int)
        names = [str(label) for label in range(max(int(label) for label in found) + 1)] if are_ids else sorted(found)
    if len(names) < 2:
        raise ValueError(
            f"Column {label_column!r} has one class, {names}; a class-conditional model needs at least two."
        )
    return names


def check_column(dataset, column: str, flag: str):
    """
    The feature of a column.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        column (`str`): Its column.
        flag (`str`): The command line's flag that names the column, for the message.

    Returns:
        The column's feature, None where a stream does not know it.

    Raises:
        ValueError: if there is no such column.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if column not in columns:
        raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(columns)}. Pass {flag}.")
    return (dataset.features or {}).get(column)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Any image as one sees it.

    Args:
        image (`PIL.Image.Image`): Any mode; turned as its EXIF says; what is transparent becomes white.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    The crop of ADM and DiT: halve with a box filter while possible, resize the short side, cut the middle.

    Args:
        image (`PIL.Image.Image`): Any size and mode; turned as its EXIF says; what is transparent becomes white.
        size (`int`): Pixels a side of the result.

    Returns:
        `PIL.Image.Image`: RGB, `size` × `size`.
    """
    image = to_rgb(image)
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
    check_column(dataset, image_column, "--image_column")
    images = torch.empty(len(dataset), 3, resolution, resolution, dtype=torch.uint8)
    for index, image in enumerate(dataset[image_column]):
        images[index] = to_tensor(center_crop(image, resolution))
    return images


def to_tensor(image: Image.Image) -> torch.Tensor:
    """
    Pixels as a tensor.

    Args:
        image (`PIL.Image.Image`): RGB, of height H and width W.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`, uint8.
    """
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """
    8-bit pixels to the VAE's range.

    Args:
        images (`torch.Tensor`): uint8, any shape.

    Returns:
        `torch.Tensor`: float32 in [-1, 1], same shape.
    """
    return images.float() / 127.5 - 1.0
