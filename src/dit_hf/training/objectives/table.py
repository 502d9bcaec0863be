"""The objectives that can be chosen by a flag."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from .base import Objective
from .diffusion import EpsilonObjective, MinSNR
from .distillation import DistillationObjective
from .flow import ClampedVelocityObjective, VelocityObjective
from .flow_maps import FlowMapObjective, MeanFlowObjective, SoFlowObjective
from .times import build_time_sampler


def _build_velocity(scheduler, transformer, cosine_loss, **times):
    return VelocityObjective(build_time_sampler(VelocityObjective.time_sampler, **times), cosine_loss)


def _build_clamped_velocity(scheduler, transformer, cosine_loss, **times):
    sampler = build_time_sampler(ClampedVelocityObjective.time_sampler, **times)
    config = transformer.config
    return ClampedVelocityObjective(sampler, cosine_loss, config["t_eps"], config["noise_scale"])


def _build_epsilon(scheduler, transformer, snr_gamma):
    return EpsilonObjective(scheduler, None if snr_gamma is None else MinSNR(snr_gamma))


# In the order of the fields of `FlowMapObjective`.
FLOW_MAP_FLAGS = (
    *("flow_matching_ratio", "target_guidance_scale", "target_guidance_mix"),
    *("target_guidance_start", "target_guidance_end", "target_guided"),
)
DISTILLATION_FLAGS = tuple(f for f in FLOW_MAP_FLAGS if f not in ("target_guidance_mix", "target_guided"))


def _check_guidance(scale, transformer):
    """Refuses guided targets of a model without a null class."""
    if scale != 1 and transformer.config["class_dropout_prob"] == 0:
        raise ValueError(
            f"--target_guidance_scale {scale} needs the null class; pass a --class_dropout_prob above 0, or "
            "--target_guidance_scale 1."
        )


def _flow_map(kind: type[FlowMapObjective]):
    """How an objective of flow maps is built."""

    def build(scheduler, transformer, flow_matching_ratio, target_guidance_scale, **guidance):
        _check_guidance(target_guidance_scale, transformer)
        return kind(flow_matching_ratio, target_guidance_scale, *(guidance[flag] for flag in FLOW_MAP_FLAGS[2:]))

    return build


def _build_soflow(scheduler, transformer, solution_steps, **flags):
    first_step, last_step = solution_steps
    objective = _flow_map(SoFlowObjective)(scheduler, transformer, **flags)
    return replace(objective, first_step=first_step, last_step=last_step)


def _build_distillation(scheduler, transformer, target_guidance_scale, **flags):
    _check_guidance(target_guidance_scale, transformer)
    if target_guidance_scale != 1 and transformer.config["guidance_in_weights"] is True:
        raise ValueError(
            f"--target_guidance_scale {target_guidance_scale} would guide twice: guidance is in the weights of the "
            "pretrained model. Pass --target_guidance_scale 1."
        )
    teacher = copy.deepcopy(transformer).eval().requires_grad_(False)
    guidance = (target_guidance_scale, *(flags[flag] for flag in DISTILLATION_FLAGS[2:]))
    return DistillationObjective(teacher, flags["flow_matching_ratio"], *guidance)


@dataclass(frozen=True)
class ObjectiveRow:
    """
    A row of [`OBJECTIVES`]: the class, the models that can be trained on it, the flags it takes, and how it is built
    from a scheduler, the model and these flags.
    """

    kind: type[Objective]
    models: tuple[str, ...]
    flags: tuple[str, ...]
    build: Callable[..., Objective]


FLOW_FLAGS = ("time_sampling", "time_mean", "time_std", "time_shift", "cosine_loss")
# A model's objective, if none is asked for, is the first that it can be trained on.
OBJECTIVES = {
    "velocity": ObjectiveRow(
        VelocityObjective, ("DiTTransformer2DModel", "DDTTransformer2DModel"), FLOW_FLAGS, _build_velocity
    ),
    "clamped_velocity": ObjectiveRow(
        ClampedVelocityObjective, ("JiTTransformer2DModel",), FLOW_FLAGS, _build_clamped_velocity
    ),
    "epsilon": ObjectiveRow(EpsilonObjective, ("DiTTransformer2DModel",), ("snr_gamma",), _build_epsilon),
    "meanflow": ObjectiveRow(
        MeanFlowObjective, ("DiTTransformer2DModel",), FLOW_MAP_FLAGS, _flow_map(MeanFlowObjective)
    ),
    "soflow": ObjectiveRow(
        SoFlowObjective,
        ("DiTTransformer2DModel",),
        (*FLOW_MAP_FLAGS, "solution_steps"),
        _build_soflow,
    ),
    "distillation": ObjectiveRow(
        DistillationObjective, ("DiTTransformer2DModel",), DISTILLATION_FLAGS, _build_distillation
    ),
}


def choose_objective(name: str | None, model: str) -> str:
    """
    The objective that a model is trained on.

    Args:
        name (`str`, *optional*): What was asked for, a name of [`OBJECTIVES`].
        model (`str`): The name of the model's class.

    Returns:
        `str`: a name of [`OBJECTIVES`].

    Raises:
        ValueError: if the model can't be trained on it.
    """
    fitting = [objective for objective, row in OBJECTIVES.items() if model in row.models]
    if name is not None and name not in fitting:
        *others, last = fitting
        choice = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"A {model} is not trained with --objective {name}; pass --objective {choice}.")
    return name or fitting[0]
