"""Telling a missing network from a missing file."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError


@contextmanager
def reachable(pretrained_model_name_or_path: str | Path) -> Iterator[None]:
    """
    Inside of it, a failure to load a repository that is due to the network says so.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): What is loaded; nothing changes for a folder.

    Raises:
        OSError: if loading failed and the Hub can't be reached.
    """
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        name = str(pretrained_model_name_or_path)
        if Path(name).exists() or (reason := unreachable()) is None:
            raise
        raise OSError(
            f"Can't load {name!r}: it is no folder here, it is not complete in the cache, and {reason}."
        ) from error


def unreachable() -> str | None:
    """Why the Hub can't be reached, or None if it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps it from being downloaded"
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname, port), timeout=5):
            return None
    except OSError as error:
        return f"there is no connection to {constants.ENDPOINT} ({error.strerror or error})"
