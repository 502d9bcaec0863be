"""The small trained pipelines that come with the package."""

from pathlib import Path

from ..files import check_path


FOLDER = Path(__file__).parent


def bundled_names() -> list[str]:
    """Names of the bundled pipelines."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def resolve_pipeline(pretrained_model_name_or_path: str | Path) -> str:
    """
    Where a pipeline is loaded from. Every command and function that takes the name of a pipeline calls this first.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): A folder, a Hub id, or the name of a bundled pipeline.

    Returns:
        `str`: the folder of a bundled pipeline if there is no such folder here; any other name as it is.
    """
    name = str(check_path("pretrained_model_name_or_path", pretrained_model_name_or_path))
    return str(FOLDER / name) if name in bundled_names() and not Path(name).exists() else name


def resolve_vae(pretrained_model_name_or_path: str | Path) -> str:
    """
    Where an autoencoder is loaded from: for the name of a bundled pipeline, its own.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): A folder, a Hub id, or the name of a bundled pipeline.

    Returns:
        `str`
    """
    name = str(pretrained_model_name_or_path)
    folder = resolve_pipeline(name)
    return name if folder == name else str(Path(folder) / "vae")
