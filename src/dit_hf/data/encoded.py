"""Encoded images of a dataset's rows, as bytes: stored in the row, in a file, in an archive or on a server."""

import os
from contextlib import suppress

from ..files import check_file
from .library import datasets
from .pixels import MAX_IMAGE_BYTES


def image_bytes(stored: dict | None, name: str) -> bytes:
    """
    The encoded image of a row whose column is read without decoding.

    Args:
        stored (`dict`, *optional*): With `bytes` and `path`, either of which may be None.
        name (`str`): What messages call the image.

    Returns:
        `bytes`

    Raises:
        OSError: if there is no such image.
        ValueError: if a disk or server does not deliver it now.
    """
    path, content = (stored["path"], stored["bytes"]) if stored else (None, None)
    if content is not None:
        return content
    if path is None:
        raise OSError(f"{name}: the row holds no image")
    path = path.removeprefix("file://")
    if "://" in path:
        return fetch(path, name)
    try:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(path)  # which may fail for reasons that are not the image's
        return check_file(path, MAX_IMAGE_BYTES).read_bytes()
    except (FileNotFoundError, ValueError) as error:
        raise OSError(f"{name}: {error}") from error
    except OSError as error:  # it may succeed later, so the image is not skipped
        raise ValueError(f"{name} can't be read: {error}. Re-run the same command.") from error


def fetch(address: str, name: str) -> bytes:
    """What a server or archive holds; `OSError` if there is no such file, `ValueError` if it can't be read now."""
    try:
        with datasets.utils.file_utils.xopen(address, "rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError as error:
        raise OSError(f"{name}: {error}") from error
    except Exception as error:  # of whichever library fetches; it may succeed later, so the image is not skipped
        raise ValueError(f"{name} can't be fetched: {error}. Re-run the same command.") from error
    if len(content) > MAX_IMAGE_BYTES:
        raise OSError(f"{name} is larger than {MAX_IMAGE_BYTES:,} bytes")
    return content
