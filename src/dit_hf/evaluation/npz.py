"""Arrays of an `.npz`, whose sizes are checked before they are read: a header may claim anything, and a compressed
megabyte may hold gigabytes."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from ..files import check_file, reading


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """
    Opens an `.npz`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `zipfile.ZipFile`

    Raises:
        ValueError: if there is no such file, or it is something else.
    """
    check_file(path)
    with reading(path, "an npz file"):
        return zipfile.ZipFile(path)


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Names of the arrays of an open `.npz`, sorted."""
    return sorted(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))


def open_array(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
    """
    The header of an array, and what follows it. Nothing is unpickled.

    Args:
        archive (`zipfile.ZipFile`): From [`open_npz`].
        name (`str`): The array.

    Returns:
        `tuple[IO, tuple[int, ...], numpy.dtype]`: the file at the first value, the array's shape and type.

    Raises:
        ValueError: if there is no such array, its order or type is not read, or its shape does not fit its size.
    """
    path = str(archive.filename)
    if name not in array_names(archive):
        raise ValueError(f"{path} has no array `{name}`; it has {', '.join(array_names(archive)) or 'none'}.")
    with reading(path, "an npz file"):
        info = archive.getinfo(f"{name}.npy")
        file = archive.open(info)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        start = file.tell()
    if (fortran and len(shape) > 1) or dtype.hasobject:
        raise ValueError(f"{path}: `{name}` is stored in an order or type that is not read.")
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != info.file_size - start:
        raise ValueError(f"{path}: `{name}` has {info.file_size - start:,} bytes, but its shape {shape} of {dtype}.")
    return file, shape, dtype


def read_array(archive: zipfile.ZipFile, name: str, max_bytes: int) -> np.ndarray:
    """
    Reads an array.

    Args:
        archive (`zipfile.ZipFile`): From [`open_npz`].
        name (`str`): The array.
        max_bytes (`int`): Its largest size.

    Returns:
        `numpy.ndarray`

    Raises:
        ValueError: as [`open_array`], or if the array is larger or damaged.
    """
    file, shape, dtype = open_array(archive, name)
    if (size := math.prod(shape) * dtype.itemsize) > max_bytes:
        raise ValueError(f"{archive.filename}: `{name}` has {size:,} bytes; at most {max_bytes:,} are read.")
    with reading(str(archive.filename), "an npz file"), file:
        content = file.read()
    return np.frombuffer(bytearray(content), dtype).reshape(shape)
