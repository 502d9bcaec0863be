"""The objectives that can be chosen by a flag."""

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
DISTILLATION_FLAGS = (
    *("flow_matching_ratio", "target_guidance_scale", "target_guidance_start", "target_guidance_end"),
    "adversarial_weight",
)


def _flow_map(kind: type[FlowMapObjective]):
    """How an objective of flow maps is built."""

    def build(scheduler, transformer, flow_matching_ratio, target_guidance_scale, **guidance):
        """An objective of the kind; `ValueError` if the model has no null class for its guidance."""
        if target_guidance_scale != 1 and transformer.config["class_dropout_prob"] == 0:
            raise ValueError(
                f"--target_guidance_scale {target_guidance_scale} needs the null class; pass a --class_dropout_prob "
                "above 0, or --target_guidance_scale 1."
            )
        return kind(flow_matching_ratio, target_guidance_scale, *(guidance[flag] for flag in FLOW_MAP_FLAGS[2:]))

    return build


def _build_soflow(scheduler, transformer, solution_steps, **flags):
    first_step, last_step = solution_steps
    objective = _flow_map(SoFlowObjective)(scheduler, transformer, **flags)
    return replace(objective, first_step=first_step, last_step=last_step)


def _build_distillation(scheduler, teacher, adversarial_weight, **flags):
    options = {"shift": scheduler.config.shift, "adversarial_weight": adversarial_weight}
    in_order = (flags[flag] for flag in DISTILLATION_FLAGS if flag != "adversarial_weight")
    return DistillationObjective(teacher, *in_order, **options)


@dataclass(frozen=True)
class ObjectiveRow:
    """
    A row of [`OBJECTIVES`]: the class, the models that can be trained on it, the flags it takes, how it is built from
    a scheduler, the model (or its teacher) and these flags, and whether it is for pretrained models only.
    """

    kind: type[Objective]
    models: tuple[str, ...]
    flags: tuple[str, ...]
    build: Callable[..., Objective]
    needs_pretrained: bool = False


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
        DistillationObjective, ("DiTTransformer2DModel",), DISTILLATION_FLAGS, _build_distillation, True
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
