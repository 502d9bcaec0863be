"""Files of the Hub and of other servers, downloaded once into the Hugging Face cache."""

import hashlib
import logging as python_logging
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffusers.utils import logging
from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get

from ..files import first_line, reading, writing
from ..hub.connection import TIMEOUT, hub_answers, unreachable, without_secrets


logger = logging.get_logger(__name__)

HUB_HOSTS = ("huggingface.co", "hf.co")
# Of a file in the cache; its suffix tells the format.
NAME_LENGTH = 100
SHA256 = re.compile(r"[0-9a-f]{64}")
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
    link = link if "://" in link else f"https://{link}"
    with reading(without_secrets(link), "a link"):
        address = urlsplit(link)
    if address.hostname in HUB_HOSTS or f"{address.scheme}://{address.netloc}" == constants.ENDPOINT:
        found = HUB_FILE.match(address.path)
        if not found:
            raise ValueError(
                f"{without_secrets(link)} is not a link to a model file; use one like …/USER/NAME/blob/main/FILE.pt."
            )
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
        with hub_answers():
            HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT)
            path = Path(hf_hub_download(repo_id, file, revision=revision))
        return check_download(path)
    except HfHubHTTPError as error:
        raise OSError(f"Can't download {file} of {repo_id}: {first_line(error)}") from None
    except OSError as error:
        try:
            cached = Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
        except OSError:
            reason = unreachable() or first_line(error)
            raise OSError(f"Can't download {file} of {repo_id}: {reason}, and it is not in the cache.") from None
        return check_download(cached)


def check_download(file: Path) -> Path:
    """
    Compares a large file of the Hub's cache with its checksum, which is the name of the blob it is a link to.

    Args:
        file (`Path`): In the cache.

    Returns:
        `Path`

    Raises:
        ValueError: if they differ.
    """
    blob = file.resolve()
    if SHA256.fullmatch(blob.name):  # of small files it is another hash
        with blob.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != blob.name:
                raise ValueError(f"{file} is damaged: its checksum is not the Hub's. Remove {blob} and try again.")
    return file


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
    shown = without_secrets(link)
    if not link.isprintable() or not _has_port(link):
        raise ValueError(f"{shown} is not the address of a file; use one like https://HOST/PATH/FILE.pt.")
    name = Path(unquote(urlsplit(link).path)).name.replace("\0", "")[-NAME_LENGTH:].lstrip(".") or "checkpoint"
    file = Path(constants.HF_HOME, "dit_hf", hashlib.sha256(link.encode()).hexdigest()[:16], name)
    if file.is_file():
        return file
    # They log the address when they try again.
    loggers = [python_logging.getLogger(each.__module__) for each in (http_get, get_session)]
    hide = _WithoutSecrets()
    for each in loggers:
        each.addFilter(hide)
    try:
        get_session().head(link, timeout=TIMEOUT)
        with writing(file) as partial, partial.open("wb") as stream:
            http_get(link, stream, displayed_filename=name)  # it compares the size with what the server announced
    except (HTTPError, OSError, UnicodeError) as error:
        reason = without_secrets(first_line(error.__cause__ or error)).strip(" .")
        raise OSError(
            f"Can't download {shown}: {reason}. Check the address and the network, or download the file yourself and "
            "pass its path."
        ) from None
    finally:
        for each in loggers:
            each.removeFilter(hide)
    logger.info(f"{shown} was downloaded to {file}.")
    return file


def _has_port(link):
    """Whether the port of an address is a number, if it has one."""
    try:
        return urlsplit(link).port != 0
    except ValueError:
        return False


class _WithoutSecrets(python_logging.Filter):
    """Takes secrets out of log records."""

    def filter(self, record):
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True
