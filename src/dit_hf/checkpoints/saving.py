"""Writing checkpoint files that the original code bases load."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..files import check_writable, is_occupied, reading, writing, writing_folder
from . import FAMILIES
from .family import Family
from .loading import original_tables
from .reading import find_problem


# Beside a converted model: what only the original's training needs.
TRAINING_ONLY_FILE = "projectors.safetensors"
SUFFIXES = (".pt", ".safetensors")


def check_exportable(model, family: Family) -> None:
    """
    Checks that a family's code can build a model.

    Args:
        model (`DiTTransformer2DModel`): The model to write.
        family (`Family`): The format to write.

    Raises:
        ValueError: naming the option that does not fit, and the families that do.
    """
    if type(model).__name__ != family.model:
        mismatch = f"is a {type(model).__name__}"
    elif option := family.find_mismatch(model.config):
        mismatch = f"has {option}"
    else:
        return
    raise ValueError(f"The model can't be written as {family.name}: it {mismatch}; {fitting_families(model)}.")


def fitting_families(model, prediction: str | None = None) -> str:
    """
    The families whose code can build a model, as the end of an error.

    Args:
        model (`DiTTransformer2DModel`): The model to write.
        prediction (`str`, *optional*): What it predicts; any if not given.

    Returns:
        `str`
    """
    fitting = [
        family.name
        for family in FAMILIES.values()
        if family.model == type(model).__name__
        and not family.find_mismatch(model.config)
        and prediction in (None, *family.predictions)
    ]
    return f"families that fit: {', '.join(fitting)}" if fitting else "no other family fits either"


def original_state_dict(model, family: Family, training_only: str | Path | None = None) -> dict[str, torch.Tensor]:
    """
    A model's weights with a family's keys, complete: with computed tables and the weights that only training needs.

    Args:
        model (`DiTTransformer2DModel`): The model to write.
        family (`Family`): The format to write.
        training_only (`str` or `Path`, *optional*): File of the weights that only training needs.

    Returns:
        `dict[str, torch.Tensor]`

    Raises:
        ValueError: if the family's code can't build the model, or needs training-only weights and there are none.
    """
    check_exportable(model, family)
    weights = family.to_original(model.state_dict(), model.config)
    if family.writes_tables:
        weights |= original_tables(family, model)
    file = Path(training_only) if training_only is not None and Path(training_only).is_file() else None
    if family.training_only and file is None and family.needs_training_only:
        names = " and ".join(f"{prefix}*" for prefix in family.training_only)
        raise ValueError(
            f"There is no {training_only or TRAINING_ONLY_FILE} with the {names} weights that {family.name}'s code "
            "loads with the model; export it as a family that has none of them."
        )
    if family.training_only and file is not None:
        with reading(file, "a file of weights"):
            others = load_file(file)
        for key, weight in others.items():
            if problem := find_problem(key, weight) or (not key.startswith(family.training_only) and "is unknown"):
                raise ValueError(f"{file}: {key!r} {problem}.")
        weights |= others
    return weights


def save_original(model, family: Family, path: str | Path, training_only: str | Path | None = None) -> None:
    """
    Writes a checkpoint file, or a model folder for the stock diffusers format, atomically.

    Args:
        model (`DiTTransformer2DModel`): The model to write.
        family (`Family`): The format to write.
        path (`str` or `Path`):
            `.safetensors` or `.pt` (with the entry that the family's code takes the weights from, if it does). Without
            such a suffix the stock diffusers format becomes a folder that
            `diffusers.DiTTransformer2DModel.from_pretrained` loads.
        training_only (`str` or `Path`, *optional*): File of the weights that only training needs.

    Raises:
        ValueError: if the family's code can't build the model, or the suffix is unknown.

    Example:

        >>> import tempfile
        >>> from pathlib import Path
        >>> from dit_hf import DiTTransformer2DModel
        >>> from dit_hf.checkpoints import FAMILIES
        >>> from dit_hf.checkpoints.saving import save_original
        >>> model = DiTTransformer2DModel(sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=12)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "tiny.pt")
        ...     save_original(model, FAMILIES["dit"], file)
        ...     again = DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, family="dit")
        >>> again.config.num_layers
        2
    """
    path = check_new_file(path, family)
    weights = family.file_keys(original_state_dict(model, family, training_only))
    if path.suffix in SUFFIXES:
        save_weights(weights, path, tuple(filter(None, (family.wrapper, *family.other_wrappers))))
    elif family.save_folder:
        with writing_folder(path) as partial:
            family.save_folder(model.config, weights, partial)


def save_weights(weights: dict[str, torch.Tensor], path: Path, wrappers: tuple[str, ...] = ()) -> None:
    """
    Writes a file of weights, atomically.

    Args:
        weights (`dict[str, torch.Tensor]`): Any.
        path (`Path`): `.safetensors` or `.pt`.
        wrappers (`tuple[str, ...]`): Entries of a `.pt` file that hold them.
    """
    with writing(path) as partial:
        if path.suffix == ".safetensors":
            save_file({key: weight.contiguous() for key, weight in weights.items()}, partial)
        else:
            torch.save(dict.fromkeys(wrappers, weights) if wrappers else weights, partial)


def check_new_file(path: str | Path, family: Family | None = None, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """
    That a checkpoint can be written, before any work.

    Args:
        path (`str` or `Path`): As [`save_original`] takes it.
        family (`Family`, *optional*): To be written as, which may allow a folder.
        suffixes (`tuple[str, ...]`): The allowed suffixes of a file.

    Returns:
        `Path`

    Raises:
        ValueError: if the suffix is unknown, there is something already, or nothing can be written there.
    """
    path = Path(path)
    if path.suffix not in suffixes and not (family and family.save_folder):
        raise ValueError(f"The file {path} must end in {' or '.join(suffixes)}.")
    check_writable(path)
    if os.path.lexists(path) if path.suffix in suffixes else is_occupied(path):
        raise ValueError(f"{path} exists; choose a new name.")
    return path
