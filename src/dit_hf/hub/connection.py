"""Telling a missing network from a missing file, at once, and secrets from what may be shown."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import HfApi, constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..files import first_line


# Seconds that a server has for its first answer; without one, downloads would be tried again for half a minute.
TIMEOUT = 10
# A link and its parts that can hold a token: user and password, query and fragment.
LINK = re.compile(
    r"\b(?P<scheme>[a-z][a-z0-9+.-]*://)(?:[^\s/?#\"']*@)?(?P<place>[^\s?#\"']*)(?:[?#][^\s\"']*)?", re.I
)
TOKEN = re.compile(r"(\bhf_)(?:[A-Za-z0-9]{30,}|(?:oauth|jwt)_[\w.-]{30,})|(\bBearer[ \t]+)(?:(?=\S*\d)\S+|\S{20,})")


@contextmanager
def connected() -> Iterator[None]:
    """
    Makes an `OSError` of a connection that is lost, which is one for some network libraries alone.

    Raises:
        OSError: naming the server.
    """
    try:
        yield
    except OSError:
        raise
    except HTTPError as error:
        raise OSError(f"the connection to {constants.ENDPOINT} failed ({first_line(error).strip('.')})") from error


@contextmanager
def hub_answers() -> Iterator[None]:
    """
    Names the server if it does not answer as the Hub does: its client then raises whatever its lines meet first. For
    calls of the client alone, as an error of our own would be taken for the server's.

    Raises:
        OSError: naming the server.
    """
    try:
        with connected():
            yield
    except (JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise OSError(f"{constants.ENDPOINT} does not answer as the Hub does ({reason})") from error


def check_answers() -> None:
    """Asks the Hub for anything, with a timeout, as its client waits for ever elsewhere; `OSError` if it is silent."""
    with connected():
        get_session().head(HfApi().endpoint, timeout=TIMEOUT)


def check_available(
    pretrained_model_name_or_path: str | Path,
    file: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> None:
    """
    Refuses what can be loaded from nowhere: a name that is no folder here, not in the cache, and can't be downloaded.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): A folder or a Hub id.
        file (`str`): A file that every such repository has.
        revision, token, cache_dir: As `from_pretrained` takes them.

    Raises:
        OSError: if there is no such folder and the name is no Hub id, or the Hub can't be reached. What the Hub itself
            says, such as that there is no such repository, is left to the loading.
    """
    name = str(pretrained_model_name_or_path)
    if Path(name).exists():
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise OSError(f"There is no folder {name!r}, and a Hub id looks like 'user/name'.") from None
    if isinstance(try_to_load_from_cache(name, file, cache_dir, revision), str):
        return
    try:
        with hub_answers():
            HfApi().model_info(name, revision=revision, timeout=TIMEOUT, token=token)
    except HfHubHTTPError:
        return
    except OSError as error:
        reason = unreachable() or first_line(error)
        raise OSError(f"There is no folder {name!r}, the cache has no such repository, and {reason}.") from None


def unreachable() -> str | None:
    """Why the Hub can't be reached; None if it can, or if that can't be told."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids downloads"
    if getproxies():
        return None  # a direct connection tells nothing then
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname, port), timeout=5):
            return None
    except OSError as error:
        return f"there is no connection to {constants.ENDPOINT} ({error.strerror or error})"


def without_tokens(text: str) -> str:
    """A text without tokens of the Hub and those of a request's header."""
    return TOKEN.sub(r"\1\2…", text)


def without_secrets(text: str) -> str:
    """
    A text as it may be shown or published: links without user, password, query and fragment, and no token of the Hub.

    Args:
        text (`str`): Any.

    Returns:
        `str`
    """
    return without_tokens(LINK.sub(r"\g<scheme>\g<place>", text))
