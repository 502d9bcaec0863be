"""The pipeline that is distilled."""

from pathlib import Path

from diffusers import DiffusionPipeline

from ..data.autoencoders import Pixels, vae_statistics
from ..models import PackagedModel, find_model_class
from ..schedulers import trained_prediction
from .data import checksums
from .model import known_classes, load_vae, scheduler_config, transformer_config


def check_teacher(
    teacher: str | Path, names: list[str], class_dropout_prob: float, model_class: type[PackagedModel]
) -> None:
    """
    Checks that a pipeline can teach a model of few steps.

    Args:
        teacher (`str` or `Path`): Folder or Hub id of the pipeline.
        names (`list[str]`): The data's class names, by id.
        class_dropout_prob (`float`): Of the new model; above 0 it has a null class.
        model_class (`type`): Of the new model.

    Raises:
        ValueError:
            if the pipeline lacks a class of the data, or the null class, predicts no velocity, or is of another class
            of models.
    """
    found = find_model_class(transformer_config(teacher))
    if found is not model_class:
        raise ValueError(f"{teacher} is a {found.__name__}, which can't teach a {model_class.__name__}.")
    prediction = trained_prediction(scheduler_config(teacher))
    if prediction != "velocity":
        raise ValueError(f"{teacher} predicts {prediction}; only a velocity model can be distilled.")
    known_classes(teacher, names, "so it can't be distilled; fine-tune it on the data first.")
    if class_dropout_prob > 0 and not transformer_config(teacher).get("class_dropout_prob"):
        raise ValueError(f"{teacher} has no null class to distil; pass --class_dropout_prob 0.")


def check_autoencoder(teacher: str | Path, vae) -> None:
    """
    Checks that a pipeline other than the one training starts from was trained on the same latents.

    Args:
        teacher (`str` or `Path`): Folder or Hub id of the pipeline; without an autoencoder it is not compared.
        vae: Of the new model, from [`load_vae`].

    Raises:
        ValueError: if the pipeline has another autoencoder.
    """
    has_vae = any(DiffusionPipeline.load_config(teacher).get("vae") or ())
    is_same = has_vae != isinstance(vae, Pixels)
    if has_vae and is_same:
        own = load_vae(None, teacher)
        is_same = checksums(own) == checksums(vae) and vae_statistics(own) == vae_statistics(vae)
    if not is_same and (has_vae or transformer_config(teacher).get("in_channels") == 3):
        raise ValueError(f"{teacher} has another autoencoder than the new model, so it can't be distilled.")
