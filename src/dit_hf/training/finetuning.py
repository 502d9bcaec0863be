"""A pretrained model for other classes than it was trained on."""

import copy
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..models import DiTTransformer2DModel, PackagedModel, find_model_class
from ..pipeline import DiTClassCondPipeline
from ..pipeline_dit_class_cond import ClassNames


logger = logging.get_logger(__name__)


def load_for_classes(
    pretrained_model_name_or_path: str | Path, names: list[str], class_dropout_prob: float
) -> PackagedModel:
    """
    A pipeline's transformer in float32, its label table remapped to new classes.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.
        names (`list[str]`): New class names, by id.
        class_dropout_prob (`float`): Of the new model; with 0 it has no null class.

    Returns:
        `DiTTransformer2DModel`
    """
    known = class_names(pretrained_model_name_or_path)
    model = load_trainable(pretrained_model_name_or_path)
    mapped = match_names(names, known)
    if mapped != [*range(model.config.num_classes)]:
        kept = len({key for key in mapped if key is not None})
        logger.warning(
            f"The new model has the classes of the data alone: {len(names) - mapped.count(None)} of {len(names)} keep "
            f"their row of the label table by name, {mapped.count(None)} start from the mean, and "
            f"{model.config.num_classes - kept} of the pretrained model are dropped."
        )
    remap_classes(model, mapped, class_dropout_prob)
    return model


def load_trainable(pretrained_model_name_or_path: str | Path) -> PackagedModel:
    """A pipeline's transformer in float32, of whichever class it is."""
    place = {"subfolder": "transformer"}
    model_class = find_model_class(DiTTransformer2DModel.load_config(pretrained_model_name_or_path, **place))
    return model_class.from_pretrained(pretrained_model_name_or_path, dtype=torch.float32, **place)


def class_names(pretrained_model_name_or_path: str | Path) -> dict[int, str]:
    """
    The classes of a pipeline, without loading it.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id of a pipeline.

    Returns:
        `dict[int, str]`: id -> names, separated by commas; empty if it has none.
    """
    index = DiTClassCondPipeline.load_config(pretrained_model_name_or_path)
    return {int(key): name for key, name in (index.get("id2label") or {}).items()}


def match_names(names: list[str], known: dict[int, str]) -> list[int | None]:
    """
    For each new class the old one of the same name, as the pipeline finds it; several of one name go in order.

    Args:
        names (`list[str]`): New class names, by id.
        known (`dict[int, str]`): Old id -> names, separated by commas.

    Returns:
        `list[int | None]`: old ids, None where there is none.

    Raises:
        ValueError: if several old classes have the name.
    """
    found, counts, known_counts = ClassNames(known), Counter(names), Counter(known.values())
    shared = {name for name, count in counts.items() if 1 < count == known_counts[name]}
    places = {name: iter(key for key in sorted(known) if known[key] == name) for name in shared}
    try:
        return [next(places[name]) if name in shared else found.find(name) for name in names]
    except ValueError as error:
        raise ValueError(f"{error} of the pretrained model; use a synonym that only one of them has.") from None


@torch.no_grad()
def remap_classes(model: DiTTransformer2DModel, mapped: list[int | None], class_dropout_prob: float) -> None:
    """
    Gives a model another label table; rows without an old class start from the mean of the old ones.

    Args:
        model (`DiTTransformer2DModel`): Changed in place.
        mapped (`list[int | None]`): For each new class the old one whose row it takes.
        class_dropout_prob (`float`): Of the new model; above 0 it has a null class, the old one's if there is one.
    """
    old = model.class_embed.weight
    mean = old[: model.config.num_classes].mean(dim=0)
    rows = [mean if key is None else old[key] for key in mapped]
    if class_dropout_prob > 0:
        rows.append(old[model.config.num_classes] if model.config.class_dropout_prob > 0 else mean)
    model.class_embed = torch.nn.Embedding.from_pretrained(torch.stack(rows), freeze=False)
    model.register_to_config(num_classes=len(mapped), class_dropout_prob=class_dropout_prob)


@torch.no_grad()
def add_interval(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """
    A velocity model as a flow map: with a second time, whose embedding starts at zero. Until it is trained, the output
    is the velocity, whatever the interval.

    Args:
        model (`DiTTransformer2DModel`): Without `interval_embedding`.

    Returns:
        `DiTTransformer2DModel`: a new model with the same weights.
    """
    flow_map = type(model).from_config(model.config, interval_embedding=True)
    last = flow_map.interval_embed.linear_2
    for parameter in (last.weight, last.bias):
        parameter.zero_()
    embedder = {f"interval_embed.{name}": value for name, value in flow_map.interval_embed.state_dict().items()}
    flow_map.load_state_dict(model.state_dict() | embedder)
    return flow_map.train(model.training)


@torch.no_grad()
def drop_interval(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """
    A flow map as a velocity model: what the embedder of the second time adds to the velocity goes into a bias. The
    output is the velocity of before, up to rounding.

    Args:
        model (`DiTTransformer2DModel`): With `interval_embedding`.

    Returns:
        `DiTTransformer2DModel`: a new model with the other weights.
    """
    velocity_model = type(model).from_config(model.config, interval_embedding=False, guidance_in_weights=False)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("interval_embed.")}
    embed: Any = copy.deepcopy(model.interval_embed)
    embed.double()  # the same bits on every machine
    added = model._embed_time(embed, torch.zeros(1, dtype=torch.float64, device=model.device), 1)[0]
    bias = weights["time_embed.linear_2.bias"]
    weights["time_embed.linear_2.bias"] = (bias.double() + added).to(bias.dtype)
    velocity_model.load_state_dict(weights)
    return velocity_model.to(model.device, model.dtype).train(model.training)


def record_guidance(model: PackagedModel, guidance_in_weights: bool | str) -> None:
    """
    Writes into a model's config whether its training puts guidance into the weights; warns if that gets lost.

    Args:
        model (`DiTTransformer2DModel`): What will be trained; others than it have no such guidance.
        guidance_in_weights (`bool` or `str`): Of the objective.

    Raises:
        ValueError: if the model has adapters, which are saved without a config.
    """
    if model.config.get("guidance_in_weights", False) == guidance_in_weights:
        return
    if getattr(model, "peft_config", None):
        if model.config.guidance_in_weights == "jumps" and not guidance_in_weights:
            return  # the velocity that is trained has no guidance in either case
        raise ValueError(
            f"The model's `guidance_in_weights` is {model.config.guidance_in_weights}, and the training would make it "
            f"{guidance_in_weights}, which adapters can't; train all weights."
        )
    if not guidance_in_weights:
        logger.warning(
            "The guidance that was trained into the weights gets lost in training without it; sample the result with "
            "a guidance_scale above 1."
        )
    model.register_to_config(guidance_in_weights=guidance_in_weights)


def frozen_names(names: Iterable[str], prefixes: Iterable[str]) -> set[str]:
    """Names of parameters that begin with one of some prefixes, up to a dot."""
    return {name for name in names for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")}


def freeze(model: DiTTransformer2DModel, prefixes: list[str]) -> None:
    """
    Freezes parts of a model.

    Args:
        model (`DiTTransformer2DModel`): Changed in place.
        prefixes (`list[str]`): Prefixes of parameter names, up to a dot: `transformer_blocks.0`, `time_embed` …

    Raises:
        ValueError: if a prefix matches no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for prefix in prefixes:
        fitting = frozen_names(parameters, [prefix])
        if not fitting:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"--freeze {prefix} matches no parameter; the model's parts are {parts}.")
        for name in fitting:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("--freeze leaves nothing to train.")


def parameter_groups(model: DiTTransformer2DModel, learning_rate: float, layer_decay: float = 1.0) -> list[dict]:
    """
    Trainable parameters for an optimizer, with a learning rate that falls from the head to the embedders.

    Args:
        model (`DiTTransformer2DModel`): The model.
        learning_rate (`float`): Of the head.
        layer_decay (`float`, defaults to 1.0): Learning rate of a block relative to the next block.

    Returns:
        `list[dict]`: `params` and `lr`, one entry per depth: embedders, blocks, head.
    """
    starts = {"transformer_blocks": 1, "decoder_blocks": 1 + len(model.transformer_blocks)}
    depth = len(model.transformer_blocks) + len(getattr(model, "decoder_blocks", ()))
    layers: list[list[torch.nn.Parameter]] = [[] for _ in range(depth + 2)]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, _, rest = name.partition(".")
        if part in starts:
            layers[starts[part] + int(rest.partition(".")[0])].append(parameter)
        else:
            layers[-1 if part in ("norm_out", "proj_out") else 0].append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * layer_decay ** (depth + 1 - layer)}
        for layer, parameters in enumerate(layers)
        if parameters
    ]
