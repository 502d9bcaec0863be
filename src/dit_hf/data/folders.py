"""Folders of images: which files are images, which folders are classes and which are splits.

The rules are those of torchvision's `ImageFolder`: a class is a folder of the first level, images in its subfolders
belong to it, classes are sorted by name, links are followed, and a class without images is an error.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from diffusers.utils import logging


logger = logging.get_logger(__name__)

# torchvision's suffixes and those of other formats that Pillow decodes.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jfif", ".gif", ".avif", ".jp2", ".tga"),
)
# The names of splits in the Hub's datasets, and what some datasets call images without labels.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("pred", "predict"), "predict"),
}
# What may stand beside such a name in a folder's name.
AFFIXES = {"set", "data", "dataset", "images", "image", "imgs", "img", "split", "seg"}
# What archives, Python and file systems leave behind.
NOT_DATA = ("__MACOSX", "__pycache__", "lost+found")
# Names that a message lists before it only counts the others.
LISTED = 8
# Levels of folders, and ways by links to the same one: more are a mistake, or made to keep a reader busy.
MAX_DEPTH = 100
MAX_WAYS = 1000


def walk(folder: str | Path) -> Iterator[tuple[str, list[os.DirEntry], list[os.DirEntry]]]:
    """
    All folders below a folder, itself first, in the order of their names; links are followed, but not in circles.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `Iterator[tuple[str, list[os.DirEntry], list[os.DirEntry]]]`: its path, its folders, and all its other entries,
        broken links among them.

    Raises:
        ValueError: if folders are nested too deep, or links lead to the same one in too many ways.
    """
    waiting: list[tuple[str, tuple]] = [(str(folder), ())]
    ways = Counter[tuple[int, int]]()
    while waiting:
        path, parents = waiting.pop()
        status = os.stat(path)
        this = (status.st_dev, status.st_ino)
        if this in parents:
            continue
        ways[this] += 1
        if len(parents) >= MAX_DEPTH:
            raise ValueError(
                f"{str(folder)!r} has folders more than {MAX_DEPTH} levels deep: {path[:200]!r} …; move it up."
            )
        if ways[this] > MAX_WAYS:
            raise ValueError(f"{path!r} is reached in more than {MAX_WAYS} ways; remove links between folders.")
        parents = (*parents, this)
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        folders = [entry for entry in found if _leads_to(entry.is_dir)]
        yield path, folders, [entry for entry in found if not _leads_to(entry.is_dir)]
        waiting += [(entry.path, parents) for entry in reversed(folders)]


def is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a regular file, or a link to one."""
    return _leads_to(entry.is_file)


def _leads_to(test):
    """What an entry or the end of its links is; False for links that lead in a circle, which have no end."""
    try:
        return test()
    except OSError:
        return False


def check_name(entry: os.DirEntry) -> None:
    """`ValueError` for a name that is no Unicode, which a dataset can't hold."""
    try:
        entry.path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The name of {os.fsencode(entry.path)!r} is not UTF-8; rename it.") from None


def normalize_name(name: str) -> str:
    """The form in which class names are compared: without surrounding space, in Unicode's NFC."""
    return unicodedata.normalize("NFC", name.strip())


def listed(names) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(str(name) for name in names[:LISTED]) + more


@dataclass
class Folder:
    """A folder's images and the folders in it, hidden ones excepted."""

    path: str
    images: list[str] = field(default_factory=list)
    folders: dict[str, "Folder"] = field(default_factory=dict)

    @cached_property
    def all_images(self) -> list[str]:
        """Paths of the images here and in all folders below."""
        here = [os.path.join(self.path, name) for name in self.images]
        return here + [path for folder in self.folders.values() for path in folder.all_images]

    def wrapped(self) -> "Folder | None":
        """The folder that this one only wraps: its single folder, which holds folders and no images, like this one."""
        inner = next(iter(self.folders.values()), None)
        if inner is None or self.images or len(self.folders) > 1 or inner.images or not inner.folders:
            return None
        return inner


@dataclass
class Split:
    """The images of a split by class; of one without class folders, the images alone."""

    path: str
    classes: dict[str, list[str]]
    unlabelled: list[str]

    def __len__(self):
        return len(self.unlabelled) + sum(map(len, self.classes.values()))


@dataclass
class ImageFolders:
    """
    What was found in a folder.

    Args:
        path (`str`): The folder.
        splits (`dict[str, Split]`): By the name of the split; `"train"` alone where there are only class folders.
        skipped (`dict[str, list[str]]`): By reason, the paths that are no part of any split.
    """

    path: str
    splits: dict[str, Split]
    skipped: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """Class names by id: those of the training split, sorted, then those of other splits only."""
        first = self.splits.get("train")
        known = sorted(first.classes) if first else []
        return known + sorted({name for part in self.splits.values() for name in part.classes} - set(known))

    def split(self, name: str) -> Split:
        """A split by any of its names; `ValueError` says what is wrong with it."""
        part = self.splits.get(SPLIT_WORDS.get(name, name))
        if part is None:
            raise ValueError(f"{self.path!r} has no split {name!r}; it has {', '.join(self.splits)}.")
        if not len(part):
            raise ValueError(f"{part.path!r} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        if empty := [name for name, images in part.classes.items() if not images]:
            raise ValueError(
                f"{part.path!r} has class folders without images: {listed(empty)}. Add images "
                f"({', '.join(IMAGE_SUFFIXES)}) or remove the folders."
            )
        return part

    def __str__(self):
        lines = []
        for name, part in self.splits.items():
            classes = f"in {len(part.classes)} classes" if part.classes else "without class folders, so without labels"
            lines.append(f"split {name}: {len(part)} images {classes}, from {part.path}")
        train = self.splits.get("train")
        if train and train.classes and (extra := [name for name in self.names if name not in train.classes]):
            lines.append(f"classes that the split train does not have: {listed(extra)}")
        lines += [f"skipped {len(paths)} {reason}: {listed(paths)}" for reason, paths in self.skipped.items()]
        return "\n".join(lines)


def find_image_folders(folder: str | Path) -> ImageFolders:
    """
    Finds the splits and classes of a folder.

    Folders named for splits (`train` and `test`, `Training` and `Testing`, `seg_train` and `seg_test` …) are splits if
    all folders beside them are; otherwise folders are classes. A folder that holds nothing but one folder of folders
    is looked through.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `ImageFolders`

    Raises:
        ValueError: if there are no class folders, or if folders can be read as splits and as classes.
    """
    root, skipped = read_tree(folder)
    if not root.all_images:
        raise ValueError(f"{root.path!r} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    while not (named := split_folders(root)) and (inner := root.wrapped()):
        root = inner
    if not named and not root.folders:
        raise ValueError(f"{root.path!r} has no folders, one per class.")
    found = ImageFolders(str(folder), {}, skipped)
    for name, part in (named or {"train": root}).items():
        while inner := part.wrapped():
            part = inner
        found.splits[name] = read_split(part, skipped)
    if named:
        drop_foreign_classes(found)
        if root.images:
            note(skipped, "images beside the splits", [os.path.join(root.path, name) for name in root.images])
    return found


def read_tree(folder: str | Path) -> tuple[Folder, dict[str, list[str]]]:
    """The tree below a folder, and by reason the files in it that are not read."""
    root = Folder(str(folder))
    known, skipped = {root.path: root}, dict[str, list[str]]()
    for path, folders, files in walk(folder):
        if path not in known:
            continue
        for entry in folders:
            if not entry.name.startswith(".") and entry.name not in NOT_DATA:
                check_name(entry)
                known[entry.path] = known[path].folders[entry.name] = Folder(entry.path)
        for entry in files:
            if entry.name.startswith("."):
                continue
            if not is_file(entry):
                special = os.path.exists(entry.path)
                note(skipped, "pipes, sockets and devices" if special else "broken links", [entry.path])
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                check_name(entry)
                known[path].images.append(entry.name)
            else:
                note(skipped, "files without the suffix of an image", [entry.path])
    return root, skipped


def read_split(folder: Folder, skipped: dict[str, list[str]]) -> Split:
    """The classes of a folder; names that are equal once normalised are one class."""
    if not any(inner.all_images for inner in folder.folders.values()):
        return Split(folder.path, {}, folder.all_images)
    classes: dict[str, list[str]] = {}
    for name, inner in folder.folders.items():
        if (normalized := normalize_name(name)) in classes:
            logger.warning(
                f"{inner.path!r} is read as class {normalized!r}: the names differ by space or Unicode form."
            )
        classes.setdefault(normalized, []).extend(inner.all_images)
    if folder.images:
        note(skipped, "images beside the class folders", [os.path.join(folder.path, name) for name in folder.images])
    return Split(folder.path, classes, [])


def drop_foreign_classes(found: ImageFolders) -> None:
    """A split with one folder that is no class of the training split (`val/images`) has no labels."""
    train = found.splits.get("train")
    for part in found.splits.values():
        if train and train.classes and len(part.classes) == 1 and not part.classes.keys() & train.classes.keys():
            (part.unlabelled,) = part.classes.values()
            part.classes = {}


def split_folders(folder: Folder) -> dict[str, Folder]:
    """The folders that are splits, by name; none if they are classes."""
    words = {name: found for name in folder.folders if (found := split_name(name))}
    partners = Counter(rest for _, rest in set(words.values()))
    # `test-drive` is a split beside `train-drive` only.
    parsed = {name: split for name, (split, rest) in words.items() if not rest or partners[rest] > 1}
    others = [name for name in folder.folders if name not in parsed]
    splits: dict[str, Folder] = {}
    for name, split in parsed.items():
        inner = folder.folders[name]
        if others and len(set(parsed.values())) == 1 and (inner.images or not inner.folders):
            return {}  # a class that is called like a split
        if others:
            raise ValueError(
                f"{folder.path!r} has the splits {', '.join(parsed)} and beside them {listed(map(repr, others))}: "
                "move it away; if these folders are classes, rename those called like a split."
            )
        if split in splits:
            raise ValueError(
                f"{folder.path!r} has two folders of the split {split}, {os.path.basename(splits[split].path)!r} and "
                f"{name!r}: merge them or move one away."
            )
        splits[split] = inner
    return splits


def split_name(name: str) -> tuple[str, tuple[str, ...]] | None:
    """
    The split that a folder or file is named for.

    Args:
        name (`str`): Such as `training_set`, `TestImages`, `val2017`.

    Returns:
        `tuple[str, tuple[str, ...]]`: `"train"`, `"validation"`, `"test"` or `"predict"`, and the words of the name
        that are neither of a split nor usual beside one. None if it names none, or two.
    """
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    splits = [split for word in words if (split := word_split(word))]
    if len(splits) != 1:
        return None
    return splits[0], tuple(word for word in words if word not in AFFIXES and not word_split(word))


def canonical_split(name: str | None) -> str | None:
    """The name of a split under which its folder is found, `validation` for `val`; other names as they are."""
    return SPLIT_WORDS.get(name, name) if name else name


def word_split(word: str) -> str | None:
    """The split that one word names, such as `test` or `testset`."""
    for affix in ("", *AFFIXES):
        if word.endswith(affix) and (split := SPLIT_WORDS.get(word.removesuffix(affix))):
            return split
    return None


def note(skipped: dict[str, list[str]], reason: str, paths: list[str]) -> None:
    """Adds paths to those skipped for a reason."""
    skipped.setdefault(reason, []).extend(paths)
