"""The transformer that is trained: new, or a pipeline's, and what its pipeline says of it."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from ..data.autoencoders import Pixels, load_autoencoder, spatial_factor
from ..files import read_json
from ..model_folders import check_numbers, find_class
from ..models import MODELS, DiTTransformer2DModel, JiTTransformer2DModel, PackagedModel, find_model_class
from ..pipeline_dit_class_cond import check_train_timesteps
from ..presets import preset_config
from ..schedulers import make_scheduler, trained_options, trained_prediction
from .finetuning import add_interval, class_names, drop_interval, freeze, load_for_classes, load_trainable, match_names
from .objectives import Objective


logger = logging.get_logger(__name__)


FEW_STEP_SCHEDULERS = ("FlowMapEulerDiscreteScheduler", "FlowMatchLCMScheduler")
# Pixels per side, where nothing decides.
DEFAULT_RESOLUTION = 64
# Name -> the class that has this preset.
PRESET_CLASSES: dict[str, type[PackagedModel]] = {
    name: model_class for model_class in MODELS.values() for name in model_class._presets
}


def trained_class(
    preset: str | None, config_file: str | Path | None, pretrained_model_name_or_path: str | Path | None
) -> type[PackagedModel]:
    """
    The class of the model that is trained.

    Args:
        preset (`str`, *optional*): A size of a paper.
        config_file (`str` or `Path`, *optional*): Instead, JSON with a model's arguments; `_class_name` names another
            class than `DiTTransformer2DModel`.
        pretrained_model_name_or_path (`str` or `Path`, *optional*): Instead, the pipeline that training starts from.

    Returns:
        `type`

    Raises:
        ValueError: if the file names no class of this package.
    """
    if preset is not None:
        return PRESET_CLASSES[preset]
    if pretrained_model_name_or_path is not None:
        return find_model_class(transformer_config(pretrained_model_name_or_path))
    if config_file is None:
        raise ValueError("Pass --preset or --transformer_config.")
    name = read_json(config_file).get("_class_name", DiTTransformer2DModel.__name__)
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"--transformer_config {config_file}: its _class_name is {name!r}, not {', '.join(MODELS)}.")
    return MODELS[name]


def check_architecture(pretrained_model_name_or_path: str | Path) -> None:
    """
    Checks that a pipeline holds a model of this package, by its configuration alone.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.

    Raises:
        OSError: if it is no pipeline.
        ValueError: if it is a pipeline of another architecture.
    """
    index = DiffusionPipeline.load_config(pretrained_model_name_or_path)
    found = f"{pretrained_model_name_or_path} is a {index.get('_class_name', 'pipeline')}"
    if "transformer" not in index:
        raise ValueError(
            f"{found}, which has no transformer; training starts from the folder of a class-conditional DiT."
        )
    config = transformer_config(pretrained_model_name_or_path)
    architecture = config.get("_class_name")
    older_stock = architecture == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    if architecture not in MODELS and not older_stock:
        raise ValueError(f"{found} with a {architecture}; training starts from the folder of a class-conditional DiT.")


def transformer_config(pretrained_model_name_or_path: str | Path) -> dict[str, Any]:
    """The configuration of a pipeline's transformer."""
    return dict(DiTTransformer2DModel.load_config(pretrained_model_name_or_path, subfolder="transformer"))


def scheduler_config(pretrained_model_name_or_path: str | Path) -> dict[str, Any]:
    """The configuration of a pipeline's scheduler, of whichever class."""
    return dict(DDPMScheduler.load_config(pretrained_model_name_or_path, subfolder="scheduler"))


def recommended_call(
    pretrained_model_name_or_path: str | Path | None, guided: bool, num_jumps: int = 0
) -> dict[str, Any] | None:
    """
    The settings of a call that a pipeline recommends, for the pipeline that is trained from it.

    Args:
        pretrained_model_name_or_path (`str` or `Path`, *optional*): Folder or Hub id of a pipeline.
        guided (`bool`): Whether sampling is guided; if not, the settings of guidance are omitted.
        num_jumps (`int`, defaults to 0): Recommended steps of the trained model with a sampler that takes jumps.

    Returns:
        `dict`, or `None` if nothing is recommended.
    """
    jumps = {"num_jumps": num_jumps} if num_jumps else {}
    if pretrained_model_name_or_path is None:
        return jumps or None
    index = DiffusionPipeline.load_config(pretrained_model_name_or_path)
    call = {name: value for name, value in (index.get("recommended_call") or {}).items() if name != "num_jumps"}
    call |= jumps
    guided = guided and (index.get("guide") or [None])[0] is None  # the scale of a guide is no other's
    return {name: value for name, value in call.items() if guided or not name.startswith("guidance")} or None


def check_prediction(pretrained_model_name_or_path: str | Path, objective: type[Objective]) -> None:
    """
    Checks that an objective continues what a pipeline was trained for, as its scheduler tells.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.
        objective (`type[Objective]`): The class of the objective.

    Raises:
        ValueError: if the model predicts something else.
    """
    prediction = trained_prediction(scheduler_config(pretrained_model_name_or_path))
    if prediction not in ("epsilon", "velocity"):
        raise ValueError(f"{pretrained_model_name_or_path} predicts {prediction}, which is not trained here.")
    if prediction != objective.prediction:
        raise ValueError(
            f"{pretrained_model_name_or_path} predicts {prediction}, which --objective {objective.name} would spoil; "
            f"pass --objective {prediction} (or a --recipe that has it)."
        )


def training_scheduler(
    objective: type[Objective], learn_sigma: bool, pretrained_model_name_or_path: str | Path | None = None
) -> SchedulerMixin:
    """
    The diffusion that is trained; the weights of a pipeline keep theirs.

    Args:
        objective (`type[Objective]`): The class of the objective.
        learn_sigma (`bool`): Whether the transformer predicts its variance.
        pretrained_model_name_or_path (`str` or `Path`, *optional*): The pipeline that training starts from.

    Returns:
        `SchedulerMixin`
    """
    name = objective.sampler
    options: dict[str, Any] = {}
    if pretrained_model_name_or_path is not None:
        options = trained_options(name, scheduler_config(pretrained_model_name_or_path))
    if name == "ddpm" and not learn_sigma:
        options["variance_type"] = "fixed_large"
    return make_scheduler(name, **options)


def sampling_scheduler(
    trained: SchedulerMixin, pretrained_model_name_or_path: str | Path | None, time_shift: float = 1.0
) -> SchedulerMixin:
    """
    A scheduler that samples what is trained: a pipeline's own, of whichever class, or that of the training.

    Args:
        trained (`SchedulerMixin`): From [`training_scheduler`].
        pretrained_model_name_or_path (`str` or `Path`, *optional*): The pipeline that training starts from.
        time_shift (`float`, defaults to 1.0): Of the times of training and sampling; 1 keeps that of a pipeline.

    Returns:
        `SchedulerMixin`
    """
    scheduler_class: Any = type(trained)
    config = dict(trained.config)
    if pretrained_model_name_or_path is not None:
        own = scheduler_config(pretrained_model_name_or_path)
        found = find_class({"scheduler": ["diffusers", own.get("_class_name")]}, "scheduler")
        few = takes_few_steps(own)
        if found is None or few != takes_few_steps({"_class_name": scheduler_class.__name__}):
            of_models = f"for models of {'few' if few else 'many'} steps"
            reason = "no scheduler of diffusers" if found is None else of_models
            logger.warning(f"{own['_class_name']} is {reason}; samples are made with {scheduler_class.__name__}.")
        else:
            check_numbers(own, f"The scheduler of {pretrained_model_name_or_path}")
            check_train_timesteps(own.get("_class_name"), own)
            scheduler_class, config = found, own
    if time_shift == 1:
        return scheduler_class.from_config(config)
    options = inspect.signature(scheduler_class.__init__).parameters
    return scheduler_class.from_config(config, **{"flow_shift" if "flow_shift" in options else "shift": time_shift})


def takes_few_steps(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler, by its configuration, samples flow maps."""
    return scheduler.get("_class_name") in FEW_STEP_SCHEDULERS


def load_vae(
    vae: str | Path | None,
    pretrained_model_name_or_path: str | Path | None = None,
    model_class: type[PackagedModel] = DiTTransformer2DModel,
):
    """
    The autoencoder in float32, frozen: the given one, or that of the pipeline. Without one a pipeline of RGB images,
    or a new `JiTTransformer2DModel`, works on [`Pixels`].

    Args:
        vae (`str` or `Path`, *optional*): Folder or Hub id.
        pretrained_model_name_or_path (`str` or `Path`, *optional*): The pipeline that training starts from.
        model_class (`type`): Of a new model.

    Raises:
        ValueError: if a given one normalises latents in another way than the pipeline's, or there is none.
    """
    if vae is not None:
        loaded = load_autoencoder(vae)
        if pretrained_model_name_or_path is not None:
            _check_statistics(vae, loaded, pretrained_model_name_or_path)
        return loaded
    if pretrained_model_name_or_path is None:
        if model_class is JiTTransformer2DModel:
            return Pixels()
        raise ValueError(
            "--vae is missing: a folder or Hub id of the autoencoder, such as the bundled model's vae folder."
        )
    if not any(DiffusionPipeline.load_config(pretrained_model_name_or_path).get("vae") or ()):
        channels = transformer_config(pretrained_model_name_or_path).get("in_channels")
        if channels != 3:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no VAE for its latents of {channels} channels; pass --vae."
            )
        return Pixels()
    return load_autoencoder(pretrained_model_name_or_path, subfolder="vae")


def _check_statistics(name, vae, pretrained_model_name_or_path):
    """A pipeline's weights were trained with the statistics of its own autoencoder."""
    try:
        own = AutoencoderKL.load_config(pretrained_model_name_or_path, subfolder="vae")
    except OSError:  # a model without VAE
        return
    defaults = inspect.signature(type(vae).__init__).parameters
    for setting in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        default = defaults[setting].default if setting in defaults else None
        trained_with = own.get(setting, default)
        if trained_with != vae.config.get(setting, default):
            raise ValueError(
                f"--vae {name} normalises latents by {setting} {vae.config.get(setting)}, the weights were trained "
                f"with {trained_with}; omit --vae."
            )


def preset_resolution(preset: str | None) -> int:
    """Pixels per side that a preset on pixels is for."""
    if preset is None:
        return DEFAULT_RESOLUTION
    return preset_config(preset, PRESET_CLASSES[preset]._presets).get("sample_size", DEFAULT_RESOLUTION)


def image_resolution(
    resolution: int | None,
    vae,
    source: str | Path | None = None,
    size: int | None = None,
    default: int = DEFAULT_RESOLUTION,
) -> int:
    """
    Pixels per side of the images.

    Args:
        resolution (`int`, *optional*): What the user asked for.
        vae: The autoencoder.
        source (`str` or `Path`, *optional*): The latents or the pipeline that decide it.
        size (`int`, *optional*): Side of their latents.
        default (`int`, defaults to 64): Where nothing decides.

    Returns:
        `int`

    Raises:
        ValueError: if the user asked for another resolution than that of the latents or the pipeline.
    """
    if size is None:
        return resolution or default
    if resolution not in (None, size * spatial_factor(vae)):
        raise ValueError(f"{source} is of {size * spatial_factor(vae)} pixels; omit --resolution {resolution}.")
    return size * spatial_factor(vae)


def new_transformer(preset: str | None, config_file: str | Path | None = None, **config: Any) -> PackagedModel:
    """
    A transformer with random weights, by a preset or by a file.

    Args:
        preset (`str`, *optional*): A size of the paper.
        config_file (`str` or `Path`, *optional*): Instead, JSON with arguments of [`trained_class`].
        config: Arguments that data, autoencoder and objective decide.

    Raises:
        ValueError: if the file is no JSON object, sets one of these, or an argument that does not exist.
    """
    model_class = trained_class(preset, config_file, None)
    if config_file is None:
        return model_class.from_preset(preset, **config)
    given = read_json(config_file)
    given.pop("_class_name", None)
    if clash := sorted(config.keys() & given.keys()):
        names = ", ".join(clash)
        raise ValueError(
            f"--transformer_config sets {names}, which data, VAE and flags decide; remove it from the file."
        )
    try:
        return model_class(**(config | given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--transformer_config {config_file}: {error}") from error


def pretrained_transformer(
    pretrained_model_name_or_path: str | Path,
    names: list[str],
    class_dropout_prob: float,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    frozen: list[str] | None = None,
    interval_embedding: bool = False,
    **config,
) -> PackagedModel:
    """
    A pipeline's transformer for other classes, or with adapters for its own.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.
        names (`list[str]`): Class names, by id; with adapters those of the pipeline.
        class_dropout_prob (`float`): Of the training.
        lora_rank (`int`, *optional*): Rank of the adapters; without it all weights are trained.
        lora_alpha (`int`, *optional*): The adapters count alpha / rank; the rank if not given.
        frozen (`list[str]`, *optional*): Beginnings of the names of parameters to keep.
        interval_embedding (`bool`, defaults to `False`):
            Whether it needs a second time, see [`add_interval`]; if not, guided jumps are dropped, see
            [`drop_interval`].
        config: What the transformer's config must have for the data: `sample_size`, `in_channels`.

    Raises:
        ValueError: if the weights do not fit the data.
    """
    if lora_rank is None:
        model = load_for_classes(pretrained_model_name_or_path, names, class_dropout_prob)
    else:
        model = load_trainable(pretrained_model_name_or_path)
        if class_dropout_prob > 0 and model.config.class_dropout_prob == 0:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no null class, and adapters can't add one; pass "
                "--class_dropout_prob 0."
            )
    for name, value in config.items():
        if model.config[name] != value:
            raise ValueError(
                f"{pretrained_model_name_or_path} has {name}={model.config[name]}, where the data and the VAE need "
                f"{value}."
            )
    if interval_embedding and not model.config.interval_embedding:
        if lora_rank is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no second time, which adapters can't add; omit --lora_rank."
            )
        model = add_interval(model)
    if not interval_embedding and lora_rank is None and model.config.get("guidance_in_weights") == "jumps":
        logger.warning("Training the velocity does not train the pretrained model's jumps, so they are dropped.")
        model = drop_interval(model)
    if lora_rank is not None:
        from .lora import add_lora  # needs peft

        add_lora(model, lora_rank, lora_alpha or lora_rank)
    freeze(model, frozen or [])
    return model


def classes_of_adapters(pretrained_model_name_or_path: str | Path, names: list[str]) -> tuple[list[str], torch.Tensor]:
    """
    The classes of a pipeline, which adapters keep, and the ids of the data's classes among them.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.
        names (`list[str]`): The data's class names, by id.

    Returns:
        `tuple[list[str], torch.Tensor]`: the pipeline's names by id, and ids of shape `(len(names),)`, int64.

    Raises:
        ValueError: if the pipeline lacks a class of the data.
    """
    ids = known_classes(pretrained_model_name_or_path, names, "and adapters can't add one; omit --lora_rank.")
    known = class_names(pretrained_model_name_or_path)
    return [known[key] for key in sorted(known)], torch.tensor(ids)


def known_classes(pretrained_model_name_or_path, names, consequence):
    """The ids that a pipeline has for these names; `ValueError`, which ends with the consequence, if it lacks one."""
    ids = match_names(names, class_names(pretrained_model_name_or_path))
    if None in ids:
        raise ValueError(f"{pretrained_model_name_or_path} has no class {names[ids.index(None)]!r}, {consequence}")
    return ids
