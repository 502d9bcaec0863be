"""Uploading a saved folder, so that a failure costs nothing but another try."""

import os
import queue
import re
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, create_commit, create_repo, hf_hub_download, upload_file

# `HTTPError` is the network library's, whichever of them this huggingface_hub uses.
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError

from ..files import check_file, check_folder, check_links, check_path, first_line, printable
from ..pipeline_dit_class_cond import OPTIONAL_COMPONENTS
from .connection import check_answers, hub_answers, unreachable, without_secrets
from .model_card import CardFacts, build_card, join_cards, read_card, source_repo


logger = logging.get_logger(__name__)

COMPONENTS = ("transformer", "scheduler", *OPTIONAL_COMPONENTS)
# What is saved: the card, configurations, weights, and this package's code.
SAVED = re.compile(
    r"model_index\.json"
    rf"|(?:(?:{'|'.join(COMPONENTS)})/)?(?:README\.md|(?:config|scheduler_config|guider_config|flashpack_config)\.json"
    r"|(?:pipeline|scheduling|transformer)_\w+\.py|model\.flashpack|projectors\.safetensors"
    r"|diffusion_pytorch_model[\w.-]*\.(?:safetensors|bin)|diffusion_pytorch_model[\w.-]*\.index[\w.-]*\.json)"
)
# What is uploaded as well: a licence, and the card's images.
PUBLISHED = re.compile(
    r"(?:LICENSE|NOTICE)(?:\.md|\.txt)?|\.gitattributes"
    r"|(?:(?:samples|assets|images)/)?[^./][^/]*\.(?:png|jpe?g|webp|gif|svg)"
)
SHOWN = 10
# The Hub's errors, the network's, and a file that changed while it was sent.
UPLOAD_ERRORS = (HTTPError, OSError, RuntimeError)


def push(
    model,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    subfolder: str | None = None,
    card: CardFacts | None = None,
    max_shard_size: int | str = "10GB",
) -> str:
    """
    Saves a pipeline or transformer to a temporary folder and publishes it.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What to publish.
        repo_id (`str`): `"name"` or `"user/name"`.
        commit_message, private, token, create_pr, safe_serialization, variant, subfolder, max_shard_size:
            As with every diffusers model.
        card (`CardFacts`, *optional*): Facts for the card that can't be derived from the model.

    Returns:
        `str`: address of the commit.

    Raises:
        OSError: if the upload fails; the message says how to continue.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        model.save_pretrained(folder, **options)
        return publish_folder(folder, repo_id, model, card, commit_message, private, token, create_pr, subfolder)


def publish_folder(
    folder: str | Path,
    repo_id: str | None = None,
    model=None,
    card: CardFacts | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """
    Uploads a folder that `save_pretrained` wrote; a card on the Hub is updated, not overwritten. Only what belongs to
    a pipeline or model is uploaded, see [`select_files`].

    Args:
        folder (`str` or `Path`): The folder.
        repo_id (`str`, *optional*):
            `"name"` or `"user/name"`, created if it does not exist; the folder's name if not given.
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What is in the folder.
        card (`CardFacts`, *optional*): Facts for the card that can't be derived from the model.
        commit_message, private, token, create_pr, subfolder: As with every diffusers model.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: if the folder holds no model, or a link to a file outside of it.
        OSError: if the upload fails; the message says how to continue.
    """
    folder = Path(folder)
    repo_id = repo_id or os.path.basename(os.path.realpath(folder))
    files = select_files(folder)
    source = source_repo(model)
    if source is not None and (card is None or card.base_model is None):
        card = replace(card or CardFacts(), base_model=source)
    try:
        check_answers()
        with hub_answers():
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if source == repo_id and card is not None and card.base_model == repo_id:
            card = replace(card, base_model=None)
        contents: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
        if subfolder is None:
            # With the repository's name in its example, on top of what its owner wrote there; the folder's stays as
            # is.
            known = join_cards(
                _card_of(repo_id, token), read_card(files["README.md"]) if "README.md" in files else None
            )
            text = str(build_card(model, repo_id, card, known, files))
            contents["README.md"] = text.encode()
        else:
            contents = {f"{subfolder}/{name}": content for name, content in contents.items() if name != "README.md"}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        message = commit_message or f"Upload {type(model).__name__}"
        with hub_answers():
            commit = create_commit(repo_id, operations, commit_message=message, token=token, create_pr=create_pr)
    except UPLOAD_ERRORS as error:
        raise OSError(
            f"Publishing to {repo_id} failed: {_reason(error)}. Nothing is lost: repeat the same command or call. "
            "Files that have arrived are not sent twice."
        ) from None
    return str(commit)


def check_save_directory(folder: str | Path) -> None:
    """
    Checks before saving that a folder can be written, and no file in it that is replaced is a link out of it.

    Args:
        folder (`str` or `Path`): The folder; it need not exist.

    Raises:
        ValueError: if it is no path, a file, or can't be written, or naming the link and its target.
    """
    folder = check_folder(check_path("save_directory", folder), "the folder")
    check_links(folder, *COMPONENTS)
    places = (place for place in (folder, *(folder / name for name in COMPONENTS)) if place.is_dir())
    names = (path.relative_to(folder).as_posix() for place in places for path in place.iterdir())
    check_links(folder, *(name for name in names if SAVED.fullmatch(name)))


def select_files(folder: Path) -> dict[str, Path]:
    """
    The files of a folder that belong to a pipeline or model, and what its card shows. Whatever else has come to lie
    there (checkpoints, logs, hidden files, keys) stays; a warning names it.

    Args:
        folder (`Path`): The folder.

    Returns:
        `dict[str, Path]`: by the name in the repository.

    Raises:
        ValueError: if there is no model in the folder, one of these files is a link out of it, or a component's
            folder is a link.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    found = {name: path for name, path in paths.items() if path.is_file() or path.is_symlink()}
    if not found.keys() & {"model_index.json", "config.json"}:
        raise ValueError(
            f"{folder} is not the folder of a pipeline or model: it has no model_index.json and no config.json."
        )
    for path in map(found.get, COMPONENTS):  # whose files are not found
        if path is not None:
            target = os.path.realpath(path)
            raise ValueError(f"{path} is a link to {target}; replace it with a copy of the folder, or remove it.")
    files = {name: path for name, path in found.items() if SAVED.fullmatch(name) or PUBLISHED.fullmatch(name)}
    check_links(folder, *files)
    for path in files.values():
        check_file(path)
    if left := sorted(found.keys() - files.keys()):
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        logger.warning(
            f"Not uploaded, as no part of a pipeline: {printable(', '.join(left[:SHOWN]))}{more}. What is meant to be "
            "public can be sent with `hf upload`."
        )
    return files


class BackgroundUploads:
    """
    Single files sent to a repository in the background; a failure logs a warning and never raises.

    Args:
        repo_id (`str`): `"name"` or `"user/name"`; created with the first file if it does not exist.
    """

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self._files: queue.SimpleQueue[tuple[Path, str] | None] = queue.SimpleQueue()
        # A daemon, so that a server that never answers does not keep the process.
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def send(self, file: str | Path, path_in_repo: str) -> None:
        """
        Queues a file and returns at once.

        Args:
            file (`str` or `Path`): Must not change until it is sent.
            path_in_repo (`str`): Where it goes.
        """
        self._files.put((Path(file), path_in_repo))

    def _work(self):
        while (job := self._files.get()) is not None:
            file, path_in_repo = job
            try:
                check_links(file.parent, file.name)
                check_file(file)
                repo_id = create_repo(self.repo_id, exist_ok=True).repo_id
                upload_file(path_or_fileobj=file, path_in_repo=path_in_repo, repo_id=repo_id)
            except Exception as error:  # nobody waits for this thread's exceptions
                logger.warning(f"{file} was not sent to {self.repo_id}: {_reason(error)}.")

    def close(self, timeout: float = 60) -> None:
        """
        Waits for what is queued.

        Args:
            timeout (`float`, defaults to 60): Seconds; what is not sent by then is given up.
        """
        self._files.put(None)
        self._worker.join(timeout)


def _reason(error):
    """The first line of an error: what the server said, without requests and headers."""
    cause = error.__cause__ if isinstance(error.__cause__, UPLOAD_ERRORS) else error  # of a file that was not sent
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refused the token ({status}); log in with `hf auth login` or pass another one"
    if status is None and (no_connection := unreachable()) is not None:
        return no_connection
    reasons = dict.fromkeys(first_line(each).strip(". ") for each in (error, cause))
    return without_secrets(": ".join(reasons))


def _card_of(repo_id, token):
    """A card on the Hub, if there is one, as it is there now."""
    try:
        with hub_answers():
            file = hf_hub_download(repo_id, "README.md", token=token, force_download=True)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    except ValueError as error:  # it could not be asked for, which does not mean that there is none
        raise (error.__cause__ if isinstance(error.__cause__, UPLOAD_ERRORS) else OSError(str(error))) from None
    return read_card(file)
