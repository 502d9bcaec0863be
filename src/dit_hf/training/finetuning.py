"""A pretrained model for other classes than it was trained on."""

from pathlib import Path

import torch
from diffusers.utils import logging

from ..pipeline_dit_class_cond import DiTClassCondPipeline
from ..transformer_dit import DiTTransformer2DModel


logger = logging.get_logger(__name__)


def load_for_classes(
    pretrained_model_name_or_path: str | Path, names: list[str], class_dropout_prob: float
) -> DiTTransformer2DModel:
    """
    A pipeline's transformer in float32, its label table remapped to new classes.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.
        names (`list[str]`): New class names, by id.
        class_dropout_prob (`float`): Of the new model; 0 leaves the null class out.

    Returns:
        `DiTTransformer2DModel`
    """
    index = DiTClassCondPipeline.load_config(pretrained_model_name_or_path)
    known = {int(key): name for key, name in (index.get("id2label") or {}).items()}
    model = DiTTransformer2DModel.from_pretrained(
        pretrained_model_name_or_path, subfolder="transformer", dtype=torch.float32
    )
    if [known.get(key) for key in range(model.config.num_classes)] == names:
        mapped: list[int | None] = [*range(len(names))]
    else:
        mapped = match_names(names, known)
        logger.warning(
            f"The label table is remapped: {len(names) - mapped.count(None)} of {len(names)} classes keep their row by "
            "name, the others start from the mean."
        )
    remap_classes(model, mapped, class_dropout_prob)
    return model


def match_names(names: list[str], known: dict[int, str]) -> list[int | None]:
    """
    For each new class the old one of the same name, whatever its case; any synonym of an old name counts.

    Args:
        names (`list[str]`): New class names, by id.
        known (`dict[int, str]`): Old id -> names, separated by commas.

    Returns:
        `list[int | None]`: old ids, None where there is none.
    """
    old = {part.strip().casefold(): key for key, entry in known.items() for part in (entry, *entry.split(","))}
    return [old.get(name.strip().casefold()) for name in names]


@torch.no_grad()
def remap_classes(model: DiTTransformer2DModel, mapped: list[int | None], class_dropout_prob: float) -> None:
    """
    Gives a model another label table; rows without an old class start from the mean of the old ones.

    Args:
        model (`DiTTransformer2DModel`): Changed in place.
        mapped (`list[int | None]`): For each new class the old one whose row it takes.
        class_dropout_prob (`float`): Of the new model; with more than 0 it has a null class, the old one's if there is.
    """
    old = model.class_embed.weight
    mean = old[: model.config.num_classes].mean(dim=0)
    rows = [mean if key is None else old[key] for key in mapped]
    if class_dropout_prob > 0:
        rows.append(old[model.config.num_classes] if model.config.class_dropout_prob > 0 else mean)
    model.class_embed = torch.nn.Embedding.from_pretrained(torch.stack(rows), freeze=False)
    model.register_to_config(num_classes=len(mapped), class_dropout_prob=class_dropout_prob)
