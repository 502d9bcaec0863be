"""Files of the user: checked before they are opened, read as data, written atomically."""

import errno
import json
import os
import platform
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


# The largest JSON file that is read: an index or a recipe of a million classes has a fifth of it.
MAX_JSON_BYTES = 256 * 2**20
# Of a whole number in JSON; a float has 309.
MAX_DIGITS = 400
# The layout of the Hub's cache, whose snapshots are links to the blobs beside them.
HUB_SNAPSHOT = re.compile(r"^(?P<repo>.*/(?:models|datasets|spaces)--[^/]+)/snapshots/[^/]+(?:/|$)")
# Nobody else gives a file such a name, so what a killed process left of ours can be removed.
PARTIAL = ".dit_hf-partial-"
LEFTOVER = re.compile(re.escape(PARTIAL) + r"(checkpoint-[0-9]+|.+-[0-9]+-[0-9]+-.+)")
# What is no content of a folder: leftovers and locks of runs, a file system's and a file manager's own.
NO_CONTENT = re.compile(LEFTOVER.pattern + r"|\.lock.*|lost\+found|\.DS_Store")
# They make a folder one of a model or pipeline, so they come last, in this order.
MARKERS = ("config.json", "model_index.json")
# Weights of a variant, in one file or in shards with an index.
WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|diffusion_pytorch_model\.(safetensors|bin)\.index(\.(?P<of>[^.]+))?\.json"
)
# How torch and safetensors say that they could not write.
WRITE_ERROR = re.compile(
    r"No space left|File too large|unexpected pos \d+|failed writing|write\(\)|Parent directory .* does not exist"
    r"|Error while serializing|open file failed with"
)
SYSTEM_REASON = re.compile(r"(?:failed with(?: strerror:)?|I/O error:) ([\w ]*\w)")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def printable(text: str) -> str:
    """
    Text from files, flags and requests for one line of a terminal or log: line breaks and control characters, which
    could forge a line or command the terminal, are escaped.

    Args:
        text (`str`): Any.

    Returns:
        `str`
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def check_path(name: str, path: Any) -> Path:
    """
    Checks that an argument can be a path at all.

    Args:
        name (`str`): Of the argument.
        path: What was given.

    Returns:
        `Path`

    Raises:
        ValueError: if it is no text and no path, empty, or holds a character that no path has.
    """
    try:
        fits = isinstance(path, str | os.PathLike) and b"\0" not in os.fsencode(path) and os.fspath(path) != ""
    except UnicodeEncodeError:  # half of a surrogate pair
        fits = False
    if not fits:
        raise ValueError(f"`{name}` is {ascii(path)[:200]}; it must be the name or path of a file or folder.")
    return Path(path)


def check_file(path: str | Path, max_bytes: int | None = None) -> Path:
    """
    Checks that a path is a regular file, so that opening it can neither block nor be endless.

    Args:
        path (`str` or `Path`): The file, or a link to it.
        max_bytes (`int`, *optional*): Its largest size.

    Returns:
        `Path`

    Raises:
        ValueError: if there is no such file, it is a folder, a pipe or a device, or it is larger.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:  # a name with a null byte, a loop of links, no permission
        raise ValueError(f"{path} can't be opened: {first_line(error)}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is a folder, not a file.")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe, socket or device, not a file.")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"{path} has {status.st_size:,} bytes; at most {max_bytes:,} are read.")
    return path


@contextmanager
def reading(path: str | Path, kind: str = "file") -> Iterator[None]:
    """
    Names the file in whatever a library raises for content that it can't read: zip, pickle, safetensors and image
    libraries each have their own errors, and a damaged file can reach any line of them. For calls of libraries alone,
    as an error of our own would be taken for the file's.

    Args:
        path (`str` or `Path`): The file.
        kind (`str`, defaults to `"file"`): What it should be.

    Raises:
        ValueError: with the library's reason.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = first_line(error)
        reason = reason if " " in reason else f"{type(error).__name__}: {reason}"
        raise ValueError(f"{path} can't be read as {kind}: {reason}") from error


def load_json(text: str | bytes) -> Any:
    """
    JSON without whole numbers that no float holds, which few calculations expect.

    Args:
        text (`str` or `bytes`): Of a file.

    Returns:
        Its value.

    Raises:
        ValueError: if it is no JSON.
    """
    value = json.loads(text, parse_int=_whole_number, object_pairs_hook=_object)
    _check_sizes("a value", value)
    return value


def _whole_number(digits):
    return int(digits) if len(digits) < MAX_DIGITS else 10**MAX_DIGITS  # Python refuses to read some thousands of them


def _object(pairs):
    for name, value in pairs:
        _check_sizes(repr(name), value)
    return dict(pairs)


def _check_sizes(name, value):
    """Raises `ValueError` for a whole number that no float holds, also in lists; objects there are checked already."""
    if isinstance(value, list):
        for each in value:
            _check_sizes(name, each)
    elif isinstance(value, int) and value.bit_length() > 1023:
        raise ValueError(f"{name} is too large a number")


def read_json(path: str | Path, expected: type | tuple[type, ...] = dict) -> Any:
    """
    Reads a JSON file.

    Args:
        path (`str` or `Path`): The file.
        expected (`type`, defaults to `dict`): Of its value: `dict`, `list` or both.

    Returns:
        `dict` or `list`

    Raises:
        ValueError: if there is no such file, it is no JSON, or it holds another type; the message names the file.
    """
    path = check_file(path, MAX_JSON_BYTES)
    with reading(path, "JSON"):
        value = load_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, expected):
        what = "an object" if expected is dict else "a list" if expected is list else "an object or a list"
        raise ValueError(f"{path} must hold {what}; it holds a {type(value).__name__}.")
    return value


@contextmanager
def writing(path: str | Path, one_of_many: bool = False) -> Iterator[Path]:
    """
    Gives a path at the side to write to, which replaces `path` at the end. If writing fails, what was there stays.
    What a killed process left of the same file is removed.

    Args:
        path (`str` or `Path`): The file, or folder, to be written; its folder is created if it does not exist.
        one_of_many (`bool`, defaults to `False`):
            Whether leftovers stay, as looking for them lists the folder; call [`remove_leftovers`] before the first.

    Yields:
        `Path`: of the same name, in a separate folder, as libraries leave temporary files beside what they write.

    Raises:
        OSError: if it can't be written, whatever error the library that writes has for it.
    """
    path = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    if not one_of_many:
        remove_leftovers(path.parent, path.name)
    with _writing(partial_path(path), path) as partial:
        yield partial


@contextmanager
def writing_folder(folder: str | Path, owned: Collection[str] = ()) -> Iterator[Path]:
    """
    As [`writing`], for a folder. One that exists stays, as it may be a mount point, `.` or a link: its files are
    replaced one by one at the end, what marks it as a model or pipeline last. Other files in it stay, but for older
    weights of the same variant, in whichever format.

    Args:
        folder (`str` or `Path`): The folder.
        owned (`Collection[str]`): Files in it, which may hold `*`, that go if they are not written again.

    Yields:
        `Path`: of a folder to be created, whose content is `folder`'s at the end.

    Raises:
        OSError: if it can't be written.
    """
    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():
        with writing(folder) as partial:
            yield partial
        return
    remove_leftovers(folder)
    with _writing(partial_path(folder / folder.name), folder, owned) as partial:
        yield partial


@contextmanager
def _writing(side, target, owned=()):
    """A path in a folder at the side, which at the end replaces its target, or what is in it if both are folders."""
    remove(side)  # of a killed process that had the same id
    partial, moving = side / target.name, False
    try:
        side.mkdir()
        yield partial
        if partial.is_dir() and target.is_dir():
            _check_places(partial, target)
            moving = True
            with _uninterrupted():
                _move_content(partial, target, owned)
        else:
            os.replace(partial, target)
    except Exception as error:
        if not is_write_error(error):
            raise
        before = "; what was there before is unchanged" if target.exists() else ""
        before = "; it may hold files of both now, so write it again" if moving else before
        raise OSError(f"{target} can't be written: {write_problem(error)}{before}.") from error
    finally:
        remove(side)


@contextmanager
def _uninterrupted():
    """Ctrl-C, SIGTERM and SIGHUP wait until it is left."""
    received, before = [], {}
    if threading.current_thread() is threading.main_thread():  # where Python handles signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not None:
                before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _check_places(source, target):
    """Raises `OSError` if files of one folder can't take their places in another, before the first of them moves."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if place.is_dir() != path.is_dir() and os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, f"{place} is a {'folder' if place.is_dir() else 'file'}")
        if place.parent.is_dir() and not os.access(place.parent, os.W_OK):
            raise PermissionError(errno.EACCES, f"{place.parent} can't be written")


def _move_content(source, target, owned):
    """Moves all files of a folder to their places in another, markers last; files that they replace are removed."""
    names = [path.relative_to(source) for path in sorted(source.rglob("*"))]
    folders = [name for name in names if (source / name).is_dir() and not (source / name).is_symlink()]
    for name in folders:
        (target / name).mkdir(exist_ok=True)
    files = [name for name in names if name not in folders]
    for name in (name for name in files if name.name not in MARKERS):
        os.replace(source / name, target / name)
    for folder in {name.parent for name in files}:
        new = {name.name for name in files if name.parent == folder}
        variants = {_variant(name) for name in new} - {None}
        for path in (target / folder).glob("diffusion_pytorch_model*"):
            if path.name not in new and _variant(path.name) in variants:
                remove(path)
    for path in (path for pattern in owned for path in target.glob(pattern)):
        if path.relative_to(target) not in files:
            remove(path)
    for name in sorted((name for name in files if name.name in MARKERS), key=lambda name: MARKERS.index(name.name)):
        os.replace(source / name, target / name)


def _variant(name):
    """The variant that a file of weights is of, empty if none; None for another file."""
    match = WEIGHTS.fullmatch(name)
    return match and (match["variant"] or match["of"] or "")


def is_write_error(error: BaseException | None) -> bool:
    """Whether an error says that a file could not be written; torch and safetensors have their own for that."""
    own = isinstance(error, (RuntimeError, SafetensorError)) and WRITE_ERROR.search(str(error)) is not None
    return own or isinstance(error, OSError)


def write_problem(error: BaseException) -> str:
    """What a write error says, without what a library says of its own code."""
    while is_write_error(error.__cause__):  # of a file in a folder that is written whole
        error = error.__cause__  # type: ignore[assignment]
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full"
    if "unexpected pos" in str(error):  # torch does not say why
        return "the disk is full, or the file larger than is allowed"
    found = SYSTEM_REASON.search(str(error))
    return found[1] if found else getattr(error, "strerror", None) or first_line(error)


def content_of(folder: str | Path, ours: Collection[str] = ()) -> list[str]:
    """
    What is in a folder, but for leftovers of killed runs, locks, and what a file system or file manager puts there.

    Args:
        folder (`str` or `Path`): The folder.
        ours (`Collection[str]`): Names that do not count either.

    Returns:
        `list[str]`: names, in order.
    """
    names = os.listdir(folder)
    return sorted(name for name in names if not NO_CONTENT.fullmatch(name) and name not in ours)


def is_occupied(folder: str | Path, ours: Collection[str] = ()) -> bool:
    """Whether the folder has content other than leftovers of killed runs and `ours`, or is no folder."""
    return bool(content_of(folder, ours)) if Path(folder).is_dir() else os.path.lexists(folder)


def partial_path(path: Path) -> Path:
    """Where this thread writes a file or folder before it replaces `path`."""
    # A thread's number and not its `ident`, as a main thread has that of its process: the next with it finds the same.
    owner = f"{platform.node()}-{os.getpid()}-{threading.get_native_id()}"
    return path.with_name(f"{PARTIAL}{owner}-{path.name}")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """
    Removes what processes of this machine that have ended left of files that they wrote with [`writing`].

    Args:
        folder (`Path`): The files' folder.
        name (`str`, *optional*): Of one file; all if not given.
    """
    own = re.escape(f"{PARTIAL}{platform.node()}-") + rf"([0-9]+)-[0-9]+-{'.+' if name is None else re.escape(name)}"
    for leftover in folder.glob(f"{PARTIAL}*"):
        match = re.fullmatch(own, leftover.name)
        if match and int(match[1]) != os.getpid() and not is_running(int(match[1])):
            remove(leftover)


def is_running(process: int) -> bool:
    """Whether a process of this machine runs, of whichever user."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def check_writable(path: str | Path) -> Path:
    """
    Checks before work that a file or folder can be written; creates nothing that stays.

    Args:
        path (`str` or `Path`): A file or a folder; it and its parents need not exist.

    Returns:
        `Path`

    Raises:
        ValueError: if a parent is a file, or the disk, the system or the permissions don't allow it.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{path} can't be written: its name holds a null byte.")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(partial_path(path) if path.name else path)  # its name is longer
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # a loop of links
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        blocked = next((parent for parent in path.absolute().parents if parent.exists() and not parent.is_dir()), None)
        if blocked is not None:
            raise ValueError(f"{path} can't be written: {blocked} is a file.")
        if path.exists() and not path.is_dir():
            check_file(path)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or first_line(error)}.") from None
    return path


def check_folder(path: str | Path, flag: str = "the output") -> Path:
    """
    Checks before work that files can be written into a folder, as [`check_writable`].

    Args:
        path (`str` or `Path`): The folder; it need not exist.
        flag (`str`): What it is called.

    Returns:
        `Path`

    Raises:
        ValueError: if it is a file, a link to nothing, or can't be written.
    """
    path = check_writable(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {path} is a file, not a folder.")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{flag} {path} is a link to {os.path.realpath(path)}, which does not exist.")
    return path


def check_apart(output: str | Path, source: str | Path | None, flag: str = "the output") -> None:
    """
    Refuses to write where a dataset is read: its next reader would take the output for a part of it.

    Args:
        output (`str` or `Path`): A file or folder to be written.
        source (`str` or `Path`, *optional*): What is read; only a folder or file of this machine is checked.
        flag (`str`): What the output is called.

    Raises:
        ValueError: if the output is the folder, or in it.
    """
    if source is None or not os.path.lexists(source):
        return
    inner, outer = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if inner == outer or outer in inner.parents:
        raise ValueError(f"{flag} {output} is in the folder {source} that is read; choose one outside of it.")


def check_links(folder: str | Path, *names: str) -> None:
    """
    Refuses links that leave a folder which is to be published, or written into: they would publish, or overwrite, a
    file of elsewhere. Those of the Hub's cache, from a snapshot to its own repository, stay.

    Args:
        folder (`str` or `Path`): The folder; it may itself be a link.
        names (`str`): What in it is published or written.

    Raises:
        ValueError: naming the link and its target.
    """
    root = os.path.realpath(folder)
    snapshot = HUB_SNAPSHOT.match(root)
    allowed = (root, os.path.realpath(snapshot["repo"])) if snapshot else (root,)
    for path in (os.path.join(folder, name) for name in names):
        target = os.path.realpath(path)
        if not any(target == inside or target.startswith(inside + os.sep) for inside in allowed):
            raise ValueError(
                f"{path} is a link to {target}, outside of {folder}; replace it with a copy of the file, or remove it."
            )
