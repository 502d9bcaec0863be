"""Models built from the checkpoints of other code bases."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import check_path
from .family import Family, without_weights
from .links import download, is_link
from .parsing import Checkpoint, parse_checkpoint


def load_model(
    model_class, pretrained_model_link_or_path: str | Path, dtype: torch.dtype | None = None, **options: Any
):
    """
    Builds the model of a checkpoint file.

    Args:
        model_class (`type`): The class of the model.
        pretrained_model_link_or_path (`str` or `Path`):
            A file, the folder of a diffusers DiT, or the link to a file on the Hub or on another server.
        dtype (`torch.dtype`, *optional*): As [`build_model`] takes it.
        options: As [`parse_checkpoint`] takes them.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: if the file is not a checkpoint of a known family; the message names the file and the key.
        OSError: if a link can't be downloaded.
    """
    path = pretrained_model_link_or_path
    path = download(str(path)) if is_link(path) else check_path("pretrained_model_link_or_path", path)
    checkpoint = parse_checkpoint(path, **options)
    if checkpoint.family.model != model_class.__name__:
        raise ValueError(
            f"Checkpoint {path} holds a {checkpoint.family.model} ({checkpoint.family.name}), not a "
            f"{model_class.__name__}; load it with `{checkpoint.family.model}.from_single_file`."
        )
    return build_model(model_class, checkpoint, path, dtype)


def build_model(model_class, checkpoint: Checkpoint, path: str | Path, dtype: torch.dtype | None = None):
    """
    Builds the model of a parsed checkpoint.

    Args:
        model_class (`type`): `DiTTransformer2DModel`.
        checkpoint (`Checkpoint`): From [`parse_checkpoint`].
        path (`str` or `Path`): Named in errors.
        dtype (`torch.dtype`, *optional*):
            Type of the weights, float32 if not given; the timestep embedding stays in float32, as with
            `from_pretrained`.

    Returns:
        `DiTTransformer2DModel`: in eval mode.

    Raises:
        ValueError: if a key is missing, unknown or of another shape.
    """
    try:
        model = without_weights(lambda: model_class(**checkpoint.config))
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    check_strictly(checkpoint, model, path)
    # Key by key, each copied, so that the file may be closed and no weight is in memory twice.
    for name in model.state_dict():
        kept = name.split(".")[0] in model_class._keep_in_fp32_modules
        weight = copy_weight(name, checkpoint.weights[name], torch.float32 if kept else dtype, path)
        model.load_state_dict({name: weight.contiguous()}, strict=False, assign=True)
    return model.eval()


def copy_weight(name: str, given: torch.Tensor, dtype: torch.dtype | None, path: str | Path) -> torch.Tensor:
    """
    A weight of a file as a separate tensor.

    Args:
        name (`str`): Its key, named in errors.
        given (`torch.Tensor`): Its values.
        dtype (`torch.dtype`, *optional*): Its new type, float32 if not given.
        path (`str` or `Path`): Named in errors.

    Returns:
        `torch.Tensor`

    Raises:
        ValueError: if the type has no room for the values.
    """
    weight = given.to(dtype or torch.float32, copy=True)
    if torch.finfo(weight.dtype).max < torch.finfo(given.dtype).max and not weight.isfinite().all():
        raise ValueError(
            f"Checkpoint {path}: {name!r} has values up to {given.abs().max().item():.3g}, which {weight.dtype} "
            "has no room for; convert to another type."
        )
    return weight


def check_strictly(checkpoint: Checkpoint, model, path: str | Path) -> None:
    """
    That a checkpoint has every key of a model in the shape it needs, and no other.

    Args:
        checkpoint (`Checkpoint`): From [`parse_checkpoint`].
        model (`DiTTransformer2DModel`): Built from its config.
        path (`str` or `Path`): Named in errors.

    Raises:
        ValueError: naming the first key that is missing, unknown or of another shape, as the original names it.
    """
    source, original = checkpoint.family, checkpoint.original
    needed = source.to_original(model.state_dict(), model.config)
    shapes = {key: tuple(weight.shape) for key, weight in needed.items()}
    check_keys(original, shapes, path, optional=source.tables)
    for key, expected in original_tables(source, model).items():
        if key in original and not is_close(original[key], expected):
            raise ValueError(f"Checkpoint {path}: {key!r} is not the table that {source.name} computes.")


def check_keys(
    given: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    path: str | Path,
    optional: Collection[str] = (),
) -> None:
    """
    That weights are the ones that are needed, in the shapes that are needed.

    Args:
        given (`dict[str, torch.Tensor]`): Of a checkpoint.
        shapes (`dict[str, tuple[int, ...]]`): Of every key that is needed.
        path (`str` or `Path`): Named in errors.
        optional (`Collection[str]`): Keys that may be there as well, in any shape.

    Raises:
        ValueError: naming the first key that is missing, unknown or of another shape.
    """
    missing = sorted(set(shapes) - set(given))
    unknown = sorted(set(given) - set(shapes) - set(optional))
    for keys, what in ((missing, "is missing"), (unknown, "is unknown")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"Checkpoint {path}: the key {keys[0]!r} {what}{more}.")
    for key, shape in shapes.items():
        if not given[key].is_floating_point():
            raise ValueError(f"Checkpoint {path}: {key!r} holds {given[key].dtype}, not floating-point numbers.")
        if tuple(given[key].shape) != shape:
            raise ValueError(
                f"Checkpoint {path}: {key!r} has shape {tuple(given[key].shape)}, where {shape} is needed."
            )


def is_close(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a table of a file is the computed one, but for the rounding of its type."""
    tolerance = 1e-5 if given.dtype == torch.float32 else 1e-2
    return given.shape == expected.shape and torch.allclose(given.float(), expected, rtol=0, atol=tolerance)


def original_tables(family: Family, model) -> dict[str, torch.Tensor]:
    """
    The computed tables of a model with a family's keys.

    Args:
        family (`Family`): Whose keys.
        model (`DiTTransformer2DModel`): Whose tables.

    Returns:
        `dict[str, torch.Tensor]`
    """
    tables = family.computed_tables(model) if family.tables else {}
    return {key: tables[name] for key, name in family.tables.items() if name in tables}
