"""The pipeline that is distilled."""

from pathlib import Path

from ..data.autoencoders import Pixels, vae_statistics
from ..models import PackagedModel, find_model_class
from .data import checksums
from .model import known_classes, load_vae, transformer_config


def check_teacher(
    teacher: str | Path, names: list[str], class_dropout_prob: float, model_class: type[PackagedModel], vae
) -> None:
    """
    Checks that a pipeline can teach a model of few steps.

    Args:
        teacher (`str` or `Path`): Folder or Hub id of the pipeline.
        names (`list[str]`): The data's class names, by id.
        class_dropout_prob (`float`): Of the new model; above 0 it has a null class.
        model_class (`type`): Of the new model.
        vae: Its autoencoder, from [`load_vae`].

    Raises:
        ValueError:
            if the pipeline lacks a class of the data, or the null class, is of another class of models, or has another
            autoencoder.
    """
    found = find_model_class(transformer_config(teacher))
    if found is not model_class:
        raise ValueError(f"{teacher} is a {found.__name__}, which can't teach a {model_class.__name__}.")
    known_classes(teacher, names, "so it can't be distilled; fine-tune it on the data first.")
    if class_dropout_prob > 0 and not transformer_config(teacher).get("class_dropout_prob"):
        raise ValueError(f"{teacher} has no null class to distil; pass --class_dropout_prob 0.")
    own = load_vae(None, teacher)
    is_same = isinstance(own, Pixels) == isinstance(vae, Pixels) and checksums(own) == checksums(vae)
    if not is_same or vae_statistics(own) != vae_statistics(vae):
        raise ValueError(f"{teacher} has another autoencoder than the new model, so it can't be distilled.")
