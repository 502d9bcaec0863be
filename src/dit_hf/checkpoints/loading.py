"""Models built from the checkpoints of other code bases."""

from pathlib import Path

import torch

from ..files import check_path
from .family import Family, computed_tables, without_weights
from .links import download, is_link
from .parsing import Checkpoint, parse_checkpoint


def load_model(
    model_class,
    pretrained_model_link_or_path: str | Path,
    num_attention_heads: int | None = None,
    family: str = "auto",
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    has_null_class: bool | None = None,
):
    """
    Builds the model that a checkpoint file holds.

    Args:
        model_class (`type`): `DiTTransformer2DModel`.
        pretrained_model_link_or_path (`str` or `Path`):
            A file, the folder of a diffusers DiT, or the link to a file on the Hub or on another server.
        num_attention_heads, family, weights, has_null_class: As [`parse_checkpoint`] takes them.
        dtype (`torch.dtype`, *optional*): As [`build_model`] takes it.

    Returns:
        `DiTTransformer2DModel`: in eval mode.

    Raises:
        ValueError: if the file is no such checkpoint; the message names the file and the key.
        OSError: if a link can't be downloaded.
    """
    path = pretrained_model_link_or_path
    path = download(str(path)) if is_link(path) else check_path("pretrained_model_link_or_path", path)
    checkpoint = parse_checkpoint(path, num_attention_heads, family, weights, has_null_class=has_null_class)
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
        model = without_weights(model_class, checkpoint.config)
    except ValueError as error:
        raise ValueError(f"Checkpoint {path}: {error}") from None
    check_strictly(checkpoint, model, path)
    # Key by key and with a copy of its own, so that the file may go and no weight is in memory twice.
    for name in model.state_dict():
        kept = name.split(".")[0] in model_class._keep_in_fp32_modules
        given = checkpoint.weights[name]
        weight = given.to(torch.float32 if kept else dtype or torch.float32, copy=True)
        if torch.finfo(weight.dtype).max < torch.finfo(given.dtype).max and not weight.isfinite().all():
            raise ValueError(
                f"Checkpoint {path}: {name!r} has values up to {given.abs().max().item():.3g}, which {weight.dtype} "
                "has no room for; convert to another type."
            )
        model.load_state_dict({name: weight.contiguous()}, strict=False, assign=True)
    return model.eval()


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
    needed = model.state_dict()
    table = source.key_table(checkpoint.config["num_layers"])
    table = {key: names for key, names in table.items() if any(name in needed for name in names)}
    missing = sorted(set(table) - set(original))
    unknown = sorted(set(original) - set(table) - set(source.tables))
    for keys, what in ((missing, "is missing"), (unknown, "is unknown")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"Checkpoint {path}: the key {keys[0]!r} {what}{more}.")
    for key, names in table.items():
        shapes = [tuple(needed[name].shape) for name in names]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        given = original[key]
        if not given.is_floating_point():
            raise ValueError(f"Checkpoint {path}: {key!r} holds {given.dtype}, not floating-point numbers.")
        if tuple(given.shape) != shape:
            raise ValueError(f"Checkpoint {path}: {key!r} has shape {tuple(given.shape)}, where {shape} is needed.")
    for key, expected in original_tables(source, model).items():
        if key in original and not _is_close(original[key], expected):
            raise ValueError(f"Checkpoint {path}: {key!r} is not the table that {source.name} computes.")


def _is_close(given, expected):
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
    tables = computed_tables(model)
    return {key: tables[name] for key, name in family.tables.items() if name in tables}
