"""Datasets of class-labelled images: from the Hub, from shards, from folders."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.utils import logging

from ..files import MAX_JSON_BYTES, check_file, first_line, read_json, reading
from .archives import check_archive
from .folders import (
    IMAGE_SUFFIXES,
    canonical_split,
    find_image_folders,
    is_file,
    listed,
    normalize_name,
    read_tree,
    split_folders,
    split_name,
    walk,
)
from .holdout import hold_out
from .library import datasets


logger = logging.get_logger(__name__)

SHARDS = {".tar": "webdataset", ".parquet": "parquet"}
# Other formats that `datasets` reads.
TABLES = (".arrow", ".csv", ".json", ".jsonl", ".zip")
# Classes at most, whose table of embeddings fits in memory; and if most have one image: a column of numbers is then
# one of ids or sizes, one of text may hold names.
MAX_CLASSES = 1_000_000
MAX_RARE_CLASSES = {int: 1000, str: 10_000}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load_image_dataset(
    dataset_name: str | None = None,
    split: str = "train",
    train_data_dir: str | Path | None = None,
    streaming: bool = False,
    holdout: float = 0.0,
):
    """
    Loads labelled images by Hub id, from a local dataset, or from a folder.

    Args:
        dataset_name (`str`, *optional*):
            Anything that `datasets.load_dataset` takes, or a local folder as for `train_data_dir`.
        split (`str`, defaults to `"train"`): Name of the split.
        train_data_dir (`str` or `Path`, *optional*):
            Instead of a dataset's name: a folder with one folder of images per class, as described in
            [`find_image_folders`], with WebDataset (`.tar`) or Parquet shards, or written by `save_to_disk`.
        streaming (`bool`, defaults to `False`): Whether to read during training, without a copy on this machine.
        holdout (`float`, defaults to 0.0):
            Fraction of the images to hold out, for data with one split: split `"train"` is without them, split
            `"test"` consists of them. A hash of each image's bytes decides, so they are the same in any order or
            format. A stream's images then stay encoded, as [`~dit_hf.data.reader.ImageReader`] reads them.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streaming. Images without class folders have no column
        `label`. Of a folder of images, `info.description` states the splits and the skipped files.

    Raises:
        ValueError: if the dataset or the split can't be found; the message says what was tried.
    """
    source = dataset_name or train_data_dir
    if source is None or (dataset_name and train_data_dir):
        raise ValueError("Pass either --dataset_name or --train_data_dir.")
    if train_data_dir is not None and not Path(train_data_dir).is_dir():
        raise ValueError(f"There is no folder {str(train_data_dir)!r}.")
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout {holdout} must be at least 0 and less than 1, such as 0.1.")
    if holdout and split not in ("train", "test"):
        raise ValueError(f"--holdout makes the splits train and test; there is no split {split!r}.")
    wanted = None if holdout else split
    if Path(source).is_dir():
        dataset = _load_local(Path(source), wanted, streaming)
    else:
        dataset = _load_library(str(source), wanted, streaming, path=str(source))
    return hold_out(dataset, split, holdout) if holdout else dataset


def _load_local(folder, split, streaming):
    """A split of a local dataset; its only one if none is given."""
    files = [entry for _, _, entries in walk(folder) for entry in entries]
    if not files:
        raise ValueError(f"The dataset folder {str(folder)!r} is empty.")
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _load_saved(folder, split, streaming)
    readme = folder / "README.md"
    if readme.exists() and b"\nconfigs:" in check_file(readme, MAX_JSON_BYTES).read_bytes():
        return _load_library(str(folder), split, streaming, path=str(folder))
    root, _ = read_tree(folder)
    if any(path.name in METADATA for pattern in ("metadata.*", "*/metadata.*") for path in folder.glob(pattern)):
        parts = split_folders(root) or {"train": root}
        images = {name: f"{glob.escape(part.path)}/**" for name, part in parts.items()}
        return _load_library(str(folder), canonical_split(split), streaming, path="imagefolder", data_files=images)
    for suffix in SHARDS:
        shards = sorted(path for pattern in (f"*{suffix}", f"*/*{suffix}") for path in folder.glob(pattern))
        if shards:
            return _load_shards(folder, root, shards, split, streaming)
    if not root.all_images and any(entry.name.endswith(TABLES) for entry in files):
        return _load_library(str(folder), split, streaming, path=str(folder))
    return _load_folders(folder, split, streaming)


def _load_shards(folder, root, shards, split, streaming):
    """A split of WebDataset or Parquet shards; image files beside them may be previews, but no class folders."""
    suffix = shards[0].suffix
    if sum(bool(inner.all_images) for inner in root.folders.values()) > 1:
        raise ValueError(f"{str(folder)!r} holds {suffix} shards and folders of images; move one kind away.")
    if root.all_images:
        logger.warning(f"Skipped images beside the {suffix} shards: {listed(root.all_images)}")
    files = _shards_by_split(folder, shards)
    return _load_library(str(folder), canonical_split(split), streaming, path=SHARDS[suffix], data_files=files)


def load_unlabelled_folder(folder: str | Path):
    """
    Loads all images below a folder without labels, in the order of their paths.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `datasets.Dataset`: with the column `image`.

    Raises:
        ValueError: if there is no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    root, _ = read_tree(folder)
    if not root.all_images:
        raise ValueError(f"{str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": root.all_images}, features=features)


def _load_folders(folder, split, streaming):
    """A split of a folder of images."""
    found = find_image_folders(folder)
    part = found.split(_only(found.splits) if split is None else split)
    features, columns = {"image": datasets.Image()}, {"image": part.unlabelled}
    if part.classes:
        names = found.names
        features["label"] = datasets.ClassLabel(names=names)
        columns = {"image": [path for name in names for path in part.classes.get(name, ())]}
        columns["label"] = [label for label, name in enumerate(names) for _ in part.classes.get(name, ())]
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.info.description = str(found)
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_saved(folder, split, streaming):
    """A split of what `save_to_disk` wrote."""
    _check_archives(str(path) for pattern in ("*.arrow", "*/*.arrow") for path in folder.glob(pattern))
    for file in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        read_json(file)
    with reading(folder, "a dataset of save_to_disk"):
        saved = datasets.load_from_disk(str(folder))
        for part in saved.values() if isinstance(saved, dict) else (saved,):
            part.data.table.validate(full=True)  # offsets beyond the data, which would read other memory
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}
    name = _only(saved) if split is None else split
    if name not in saved:
        raise ValueError(f"{str(folder)!r} has no split {name!r}; it has {', '.join(saved)}.")
    return saved[name].to_iterable_dataset() if streaming else saved[name]


def _load_library(source, split, streaming, **arguments):
    """A split as `datasets` finds it, which reads a damaged archive up to the damage."""
    if arguments["path"] in SHARDS.values():
        _check_archives(file for files in arguments["data_files"].values() for file in files)
    elif Path(source).is_dir():
        _check_archives(entry.path for _, _, files in walk(source) for entry in files if is_file(entry))
    load = datasets.load_dataset  # without the library it says so
    try:
        dataset = load(**arguments, split=split, streaming=streaming)
    except Exception as error:
        which = "" if split is None else f"split {split!r} of "
        reason = first_line(error) + (f" ({first_line(error.__cause__)})" if error.__cause__ else "")
        missing = "" if Path(source).exists() else " There is no folder of this name here."
        raise ValueError(f"Can't load {which}dataset {source!r}: {reason.rstrip('.')}.{missing}") from error
    return dataset[_only(dataset)] if split is None else dataset


def _check_archives(files):
    """Damage and bombs in archives, hidden ones excepted, by one process of each machine."""
    if torch.distributed.is_initialized() and torch.distributed.get_node_local_rank(0):
        return
    for file in files:
        if not os.path.basename(file).startswith("."):
            check_archive(file)


def _shards_by_split(folder, shards):
    """Shards by the split that their folder or else their own name is called for; all are training's if none is."""
    files: dict[str | None, list[str]] = {}
    for shard in shards:
        parts = (*shard.relative_to(folder).parts[:-1], shard.stem)
        found = next((named[0] for part in parts if (named := split_name(part))), None)
        files.setdefault(found, []).append(str(shard))
    if None in files and len(files) > 1:
        raise ValueError(f"{str(folder)!r} has splits, and shards whose names name none: {listed(files[None])}.")
    return {split or "train": found for split, found in files.items()}


def _only(splits):
    """The name of the only split."""
    if len(splits) > 1:
        raise ValueError(f"--holdout is for data with one split; there are {', '.join(splits)}. Omit --holdout.")
    return next(iter(splits))


def label_names(dataset, label_column: str = "label") -> list[str]:
    """
    Class names in the order of their ids.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        label_column (`str`, defaults to `"label"`):
            Column with a `ClassLabel` feature, whose ids are kept, or with integers or strings, which are then read
            once. The integers or strings that occur are the classes, in sorted order, and an integer is the name of
            its class. Strings are stripped and normalised to Unicode's NFC.

    Returns:
        `list[str]`

    Raises:
        ValueError: if the column is missing or holds something else, or there are no classes.
    """
    feature = check_column(dataset, label_column, "--label_column")
    if hasattr(feature, "names"):
        names = [normalize_name(name) for name in feature.names]
        if len(names) > MAX_CLASSES:
            raise ValueError(f"Column {label_column!r} has {len(names):,} classes; at most {MAX_CLASSES:,} are read.")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"Column {label_column!r} has classes whose names differ only by space or Unicode form, such as "
                f"{twice[0]!r}; rename one, or give both the same id."
            )
    else:
        names = _names_that_occur(dataset, label_column)
    if not names:
        raise ValueError(f"Column {label_column!r} has no classes: there are no images.")
    return names


def _names_that_occur(dataset, column):
    """Class names of a column of integers or strings."""
    found, count = set(), 0
    for count, row in enumerate(rows_of(dataset.select_columns(column)), start=1):
        label = row[column]
        if not isinstance(label, str) and (not isinstance(label, int) or label < 0):
            raise ValueError(
                f"Column {column!r} holds {str(label)[:80]!r} in row {count - 1}; a label is a class's id, from 0, or "
                "its name."
            )
        found.add(label)
        if len(found) > MAX_CLASSES:
            break
    rare = MAX_RARE_CLASSES[str if any(isinstance(label, str) for label in found) else int]
    if len(found) > min(MAX_CLASSES, max(rare, count // 2)):
        raise ValueError(
            f"Column {column!r} has {len(found):,} different values in {count:,} rows, such as "
            f"{max(map(str, found))!r}, which do not look like classes. Pass --label_column; if they are, make the "
            f"column a ClassLabel: `dataset.class_encode_column({column!r})`."
        )
    if len({type(label) for label in found}) > 1:
        raise ValueError(f"Column {column!r} holds numbers and names; use one of them.")
    if not isinstance(next(iter(found), ""), str):
        ids = sorted(found)
        if ids != list(range(len(ids))):
            logger.warning(
                f"Column {column!r} has the labels {listed(ids)}: they are the classes 0 to {len(ids) - 1} in this "
                "order, each named by its label."
            )
        return [str(label) for label in ids]
    forms: dict[str, list[str]] = {}
    for label in sorted(found):
        forms.setdefault(normalize_name(label), []).append(label)
    for name, labels in forms.items():
        if len(labels) > 1:
            logger.warning(f"The labels {listed(map(repr, labels))} are one class, {name!r}.")
    return sorted(forms)


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
    columns = dataset.column_names or list(next(rows_of(dataset), {}))
    if column not in columns:
        unlabelled = " Its images are not in class folders." if columns == ["image"] and column == "label" else ""
        raise ValueError(
            f"There is no column {column!r}; the dataset has {', '.join(columns)}.{unlabelled} Pass {flag}."
        )
    feature = (dataset.features or {}).get(column)
    if flag == "--label_column" and isinstance(feature, datasets.Image):  # reading it would decode
        raise ValueError(f"Column {column!r} holds images; a label is a class's id, from 0, or its name. Pass {flag}.")
    dtype = getattr(feature, "dtype", None) if isinstance(feature, (datasets.ClassLabel, datasets.Value)) else None
    if flag == "--image_column" and dtype not in (None, "string", "large_string", "binary", "large_binary"):
        raise ValueError(f"Column {column!r} holds {dtype}, not images. Pass {flag}.")
    return feature


def rows_of(dataset) -> Iterator[dict]:
    """
    The rows of a dataset, one at a time.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.

    Returns:
        `Iterator[dict]`

    Raises:
        ValueError: naming the row, if a file or server does not deliver it.
    """
    rows, position = iter(dataset), 0
    while True:
        with reading(f"Row {position} of the dataset", "a row"):
            row = next(rows, None)
        if row is None:
            return
        yield row
        position += 1
