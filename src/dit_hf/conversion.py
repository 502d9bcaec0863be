"""Pipelines from checkpoints, and the transformers that checkpoints are written from."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .bundled import bundled_names, resolve_pipeline, resolve_vae
from .checkpoints.autoencoders import Autoencoder, build_autoencoder
from .checkpoints.links import download_from_hub, is_link
from .checkpoints.loading import build_model
from .checkpoints.parsing import Checkpoint
from .data.autoencoders import check_autoencoder, load_autoencoder
from .files import read_json, reading
from .models import MODELS, DiTTransformer2DModel, PackagedModel, find_model_class
from .pipeline import DiTClassCondPipeline
from .schedulers import make_scheduler, trained_options


logger = logging.get_logger(__name__)


def build_pipeline(
    checkpoint: Checkpoint,
    path: str | Path,
    dtype: torch.dtype | None = None,
    vae: str | AutoencoderKL | None = None,
    id2label: dict[int, str] | None = None,
    shift: float | None = None,
    guide: ModelMixin | None = None,
) -> DiTClassCondPipeline:
    """
    A checkpoint's model with its family's sampler and published sampling settings.

    Args:
        checkpoint (`Checkpoint`): From [`dit_hf.checkpoints.parsing.parse_checkpoint`].
        path (`str` or `Path`): Of the checkpoint; named in errors.
        dtype (`torch.dtype`, *optional*): Of the model's weights, float32 if not given.
        vae (`str` or `AutoencoderKL`, *optional*): Folder or Hub id of an autoencoder, or the autoencoder itself.
        id2label (`dict[int, str]`, *optional*): Class names.
        shift (`float`, *optional*): Of the sigmas of a flow; the family's if not given.
        guide (`ModelMixin`, *optional*): A weaker model to guide away from.

    Returns:
        `DiTClassCondPipeline`

    Raises:
        ValueError: if the checkpoint is damaged, or `vae` is no autoencoder of images.
    """
    scheduler = make_sampler(checkpoint, path, shift)
    transformer = build_model(MODELS[checkpoint.family.model], checkpoint, path, dtype)
    call = checkpoint.family.published_call(transformer.config, guide is not None)
    if isinstance(vae, str):
        vae = load_autoencoder(vae)
        match_latents(vae, checkpoint)
    return DiTClassCondPipeline(transformer, scheduler, vae, id2label, call, guide)


def make_sampler(checkpoint: Checkpoint, path: str | Path, shift: float | None = None) -> SchedulerMixin:
    """
    The sampler of a checkpoint's family.

    Args:
        checkpoint (`Checkpoint`): Of the transformer.
        path (`str` or `Path`): Of the checkpoint; named in the log.
        shift (`float`, *optional*): Of the sigmas of a flow; the family's if not given.

    Returns:
        `SchedulerMixin`

    Raises:
        ValueError: if a shift is given for a model that is none of flow matching.
    """
    family = checkpoint.family
    if not family.scheduler.startswith("flow_"):
        if shift is not None:
            raise ValueError(f"--shift is for models of flow matching, and {path} is {family.name}'s; omit it.")
        fixed_variance = family.scheduler == "ddpm" and not checkpoint.config.get("learn_sigma")
        return make_scheduler(family.scheduler, **({"variance_type": "fixed_large"} if fixed_variance else {}))
    if shift is None and family.shift is not None:
        shift = family.shift(checkpoint.config)
        if shift < 1:
            logger.warning(
                f"Checkpoint {path}: the shift by the size of its latents is {shift:.4g}, and {family.name}'s code "
                "takes none below 1. Pass shift (`--shift`), the one that it was trained with."
            )
    return make_scheduler(
        family.scheduler, **({} if shift is None else trained_options(family.scheduler, {"shift": shift}))
    )


def match_latents(vae, checkpoint: Checkpoint) -> None:
    """
    Gives an autoencoder the scale of the latents that a checkpoint was trained on, where its own differs.

    Args:
        vae (`ModelMixin`): Of diffusers; its config is changed.
        checkpoint (`Checkpoint`): Of the transformer.
    """
    family = checkpoint.family
    if checkpoint.latents_statistics:
        mean, std = checkpoint.latents_statistics
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    elif family.scaling_factor and vae.config.get("scaling_factor") not in (1.0, family.scaling_factor):
        given = vae.config.get("scaling_factor")
        logger.warning(
            f"{family.name}'s code scales latents by {family.scaling_factor}, not by the autoencoder's {given}; the "
            "pipeline's autoencoder is set so."
        )
        vae.register_to_config(scaling_factor=family.scaling_factor)


def check_vae(name: str, model: Mapping) -> None:
    """
    That an autoencoder exists and has the latents of a model; only its configuration is read.

    Args:
        name (`str`): Folder or Hub id.
        model (`Mapping`): Configuration of the model.

    Raises:
        ValueError: if there is no such autoencoder, or its latents are not the model's.
        OSError: if there is no network.
    """
    name = resolve_vae(name)
    if Path(name).is_dir():
        file = Path(name, "config.json")
        if not file.is_file():
            raise ValueError(f"--vae {name} has no config.json; pass the folder of the autoencoder itself.")
    elif is_hub_id(name):
        file = download_from_hub(name, "config.json")
    else:
        raise ValueError(f"--vae {name} must be the folder or the Hub id of an autoencoder, or an original's file.")
    config = read_json(file)
    is_rae = "encoder_input_size" in config
    channels = config.get("encoder_hidden_size" if is_rae else "latent_channels", model["in_channels"])
    with reading(file, "the config of an autoencoder"):
        size = config["encoder_input_size"] // config.get("encoder_patch_size", 14) if is_rae else None
    check_latents(name, channels, size, model)


def check_latents(name: str, channels: int, size: int | None, model: Mapping) -> None:
    """That an autoencoder has the latents of a model; `ValueError` names what differs, channels or the only size."""
    if channels != model["in_channels"]:
        raise ValueError(
            f"--vae {name} has latents of {channels} channels, and the checkpoint's model takes "
            f"{model['in_channels']}; pass the autoencoder that it was trained with."
        )
    if size is not None and size != model["sample_size"]:
        raise ValueError(
            f"--vae {name} has latents of {size}×{size}, and the checkpoint's model takes those of "
            f"{model['sample_size']}×{model['sample_size']}; pass the autoencoder that it was trained with."
        )


def is_original_vae(name: str) -> bool:
    """Whether a name is an original autoencoder's file or link, not diffusers' folder or Hub id."""
    return is_link(name) or Path(resolve_vae(name)).is_file()


def build_original_vae(
    autoencoder: Autoencoder,
    name: str,
    model: Mapping,
    statistics: tuple[list, list],
    encoder: str | None = None,
) -> ModelMixin:
    """
    The autoencoder of a model, from the file that its own code saves.

    Args:
        autoencoder (`Autoencoder`): From [`dit_hf.checkpoints.autoencoders.parse_autoencoder`].
        name (`str`): Of the file; named in errors.
        model (`Mapping`): Configuration of the model.
        statistics (`tuple[list, list]`): Mean and standard deviation of the latents.
        encoder (`str`, *optional*): Folder or Hub id of the encoder of RAE, which its file lacks.

    Returns:
        `AutoencoderKL` or `AutoencoderRAE`

    Raises:
        ValueError: if its latents are not the model's, or the statistics or the encoder do not fit.
        OSError: if the encoder can't be downloaded.
    """
    check_latents(name, autoencoder.latent_channels, autoencoder.latent_size, model)
    vae = build_autoencoder(autoencoder, name, statistics, encoder=encoder)
    check_autoencoder(vae)
    return vae


def load_transformer(name: str, dtype: torch.dtype | None = None) -> tuple[PackagedModel, bool]:
    """
    The transformer of a pipeline, or of a folder that holds it alone.

    Args:
        name (`str`): Folder of a pipeline or transformer, Hub id of a pipeline, or name of a bundled one.
        dtype (`torch.dtype`, *optional*): Of the weights.

    Returns:
        `tuple`: the model, and whether it is a pipeline's.

    Raises:
        ValueError: if there is no such folder.
        OSError: if there is no network, or no such repository.
    """
    folder = Path(resolve_pipeline(name))
    if folder.is_dir():
        is_pipeline = not (folder / "config.json").is_file()
        if is_pipeline and not (folder / "transformer" / "config.json").is_file():
            raise ValueError(f"{name} is neither a pipeline nor a transformer: it has no transformer/config.json.")
    elif is_hub_id(name):
        is_pipeline = True
        download_from_hub(name, "transformer/config.json")
    else:
        bundled = ", ".join(bundled_names())
        raise ValueError(f"{name} must be the folder of a pipeline or a transformer, a Hub id, or one of {bundled}.")
    subfolder = "transformer" if is_pipeline else None
    config = DiTTransformer2DModel.load_config(str(folder), subfolder=subfolder)
    return find_model_class(config).from_pretrained(str(folder), subfolder=subfolder, dtype=dtype), is_pipeline


def is_hub_id(name: str) -> bool:
    """Whether a name is `user/name`, and not a path whose last folder is missing."""
    return name.count("/") == 1 and not Path(name).exists() and not Path(name).parent.is_dir()
