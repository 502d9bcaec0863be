"""Uploading a saved folder, so that a failure costs nothing but another try."""

import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard, create_repo, upload_folder

# `HTTPError` is the network library's, whichever of them this huggingface_hub uses.
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError

from .model_card import SAMPLES, CardFacts, build_card, join_cards


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
) -> str:
    """
    Saves a pipeline or transformer to a temporary folder and publishes it.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What to publish.
        repo_id (`str`): `"name"` or `"user/name"`.
        commit_message, private, token, create_pr, safe_serialization, variant, subfolder: As with every diffusers model.
        card (`CardFacts`, *optional*): What the model can't tell of itself.

    Returns:
        `str`: address of the commit.

    Raises:
        OSError: if the upload fails; the message says how to go on.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
        return publish_folder(
            folder, repo_id, model, card, commit_message, private, token, create_pr, subfolder, kept=False
        )


def publish_folder(
    folder: str | Path,
    repo_id: str,
    model,
    card: CardFacts | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    kept: bool = True,
) -> str:
    """
    Uploads a folder that `save_pretrained` wrote; a card on the Hub is updated, not overwritten.

    Args:
        folder (`str` or `Path`): The folder.
        repo_id (`str`): `"name"` or `"user/name"`; created if it does not exist.
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What is in the folder.
        card (`CardFacts`, *optional*): What the model can't tell of itself.
        commit_message, private, token, create_pr, subfolder: As with every diffusers model.
        kept (`bool`, defaults to `True`): Whether the folder is still there after a failure, for the error's advice.

    Returns:
        `str`: address of the commit.

    Raises:
        OSError: if the upload fails; the message says how to go on.
    """
    folder = Path(folder)
    try:
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if subfolder is None:
            # With the repository's name in its example, and on top of what its owner wrote there.
            source = _source(model, repo_id)
            known = join_cards(_card_of(repo_id, token) or _card_of(source, token), _card_in(folder))
            if source is not None and (card is None or card.base_model is None):
                card = replace(card or CardFacts(), base_model=source)
            build_card(model, repo_id, card, known, (folder / SAMPLES).is_file()).save(folder / "README.md")
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            create_pr=create_pr,
        )
    except UPLOAD_ERRORS as error:
        again = f"`hf upload {repo_id} {folder}`, or the same call" if kept else "the same call"
        raise OSError(
            f"Publishing to {repo_id} failed: {_reason(error)}. Nothing is lost; try again with {again}. Files that "
            "have arrived are not sent twice."
        ) from None
    return str(commit)


def _reason(error):
    """The first line of an error: what the server said, without requests and headers."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refused the token ({status}); log in with `hf auth login` or pass another one"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _card_in(folder):
    return ModelCard.load(folder / "README.md") if (folder / "README.md").is_file() else None


def _card_of(repo_id, token):
    """A card on the Hub, if there is one."""
    if repo_id is None:
        return None
    try:
        return ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None


def _source(model, repo_id):
    """The repository a model was loaded from, if it is another one."""
    name = str(model.config.get("_name_or_path") or "")
    is_repo = name.count("/") == 1 and not Path(name).exists() and not name.startswith(("/", "."))
    return name if is_repo and name != repo_id else None
