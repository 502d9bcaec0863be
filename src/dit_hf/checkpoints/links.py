"""Files of the Hub and of other servers, downloaded once into the Hugging Face cache."""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffusers.utils import logging
from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get

from ..hub.connection import TIMEOUT, unreachable


logger = logging.get_logger(__name__)

HUB_HOSTS = ("huggingface.co", "hf.co")
# Path of a link to a file on the Hub: `USER/NAME/blob/REVISION/PATH`, or `resolve`.
HUB_FILE = re.compile(r"^/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)$")


def is_link(name: str | Path) -> bool:
    """Whether a name is an address, not a path."""
    return str(name).startswith(("https://", "http://", *(f"{host}/" for host in HUB_HOSTS)))


def download(link: str) -> Path:
    """
    The file that a link points to, from the Hugging Face cache if it was downloaded before.

    Args:
        link (`str`): A file on the Hub (its `blob` or `resolve` link), or on any other server.

    Returns:
        `Path`

    Raises:
        ValueError: if a link to the Hub names no file.
        OSError: if there is no network, or no such file.
    """
    address = urlsplit(link if "://" in link else f"https://{link}")
    if address.hostname in HUB_HOSTS or f"{address.scheme}://{address.netloc}" == constants.ENDPOINT:
        found = HUB_FILE.match(address.path)
        if not found:
            raise ValueError(f"{link} is no link to a model's file; those look like …/USER/NAME/blob/main/FILE.pt.")
        repo_id, revision, file = map(unquote, found.groups())
        return download_from_hub(repo_id, file, revision)
    return download_from_server(link)


def download_from_hub(repo_id: str, file: str, revision: str | None = None) -> Path:
    """
    A file of a repository. Without a network the cached one is taken, or the lack of a network is reported at once.

    Args:
        repo_id (`str`): `"user/name"`.
        file (`str`): Path in the repository.
        revision (`str`, *optional*): Branch, tag or commit.

    Returns:
        `Path`: in the Hugging Face cache.

    Raises:
        OSError: if there is no network and no cached file, no such repository, or no such file.
    """
    try:
        HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT)
        return Path(hf_hub_download(repo_id, file, revision=revision))
    except HfHubHTTPError as error:
        raise OSError(f"Can't download {file} of {repo_id}: {_first_line(error)}") from None
    except (HTTPError, OSError) as error:
        try:
            return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
        except OSError:
            reason = unreachable() or _first_line(error)
            raise OSError(f"Can't download {file} of {repo_id}: {reason}, and it is not in the cache.") from None


def download_from_server(link: str) -> Path:
    """
    A file of any server, kept as `dit_hf/HASH/NAME` in the Hugging Face home.

    Args:
        link (`str`): Address of the file.

    Returns:
        `Path`

    Raises:
        OSError: if there is no network, or no such file.
    """
    name = unquote(Path(urlsplit(link).path).name) or "checkpoint"
    file = Path(constants.HF_HOME, "dit_hf", hashlib.sha256(link.encode()).hexdigest()[:16], name)
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{os.getpid()}-{name}")
    try:
        get_session().head(link, timeout=TIMEOUT)
        with partial.open("wb") as stream:
            http_get(link, stream)
        os.replace(partial, file)
    except (HTTPError, OSError) as error:
        raise OSError(
            f"Can't download {link}: {_first_line(error)}. Check the address and the network, or download the file "
            "yourself and pass its path."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    logger.info(f"{link} was downloaded to {file}.")
    return file


def _first_line(error):
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
