"""Named sampling recipes: diffusers schedulers configured for DiT's training diffusion and for flow matching."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin


try:
    from diffusers import FlowMapEulerDiscreteScheduler
except ImportError:  # before diffusers 0.39
    FlowMapEulerDiscreteScheduler = None  # type: ignore[assignment,misc]

from .pipeline_dit_class_cond import (
    check_train_timesteps,
    raise_value_error,
    shown,
    takes_variance,
    trained_prediction,
)
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_flow_match_truncated_euler import FlowMatchTruncatedEulerScheduler


__all__ = ["RECIPES", "SchedulerRecipe", "make_scheduler", "trained_options", "trained_prediction"]


# The training diffusion: linear betas over 1000 steps (DiT §4, ADM's hyperparameters).
TRAINING_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
# What a scheduler's config says of the diffusion that its model was trained with.
DIFFUSION = (*TRAINING_DIFFUSION, "trained_betas", "rescale_betas_zero_snr", "prediction_type")
# The original's respaced sampling: 250 DDPM steps with learned variance give the paper's results.
DDPM = {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"}
DDIM = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"}
MULTISTEP = {"timestep_spacing": "linspace", "lower_order_final": True}

SchedulerRecipe = Literal[
    "ddpm",
    "ddim",
    "dpm++",
    "dpm++_singlestep",
    "unipc",
    "flow_euler",
    "flow_heun",
    "flow_dpm++",
    "flow_unipc",
    "flow_map",
    "flow_lcm",
    "flow_sde",
    "flow_ddt",
    "flow_rae",
]
RECIPES: dict[SchedulerRecipe, tuple[type[SchedulerMixin] | None, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, TRAINING_DIFFUSION | DDPM),
    "ddim": (DDIMScheduler, TRAINING_DIFFUSION | DDIM),
    "dpm++": (DPMSolverMultistepScheduler, TRAINING_DIFFUSION | MULTISTEP),
    "dpm++_singlestep": (DPMSolverSinglestepScheduler, TRAINING_DIFFUSION | {"lower_order_final": True}),
    "unipc": (UniPCMultistepScheduler, TRAINING_DIFFUSION | MULTISTEP),
    "flow_euler": (FlowMatchEulerDiscreteScheduler, {}),
    "flow_heun": (FlowMatchHeunDiscreteScheduler, {}),
    "flow_dpm++": (
        DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0},
    ),
    "flow_unipc": (
        UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0},
    ),
    "flow_map": (FlowMapEulerDiscreteScheduler, {}),
    "flow_lcm": (FlowMatchLCMScheduler, {}),
    "flow_sde": (FlowMatchSDEScheduler, {}),
    "flow_ddt": (FlowMatchTruncatedEulerScheduler, {"last_sigma": 0.04, "ends_at_data": True}),
    "flow_rae": (FlowMatchTruncatedEulerScheduler, {"last_sigma": 0.001, "ends_at_data": False}),
}


def make_scheduler(name: SchedulerRecipe, **overrides: Any) -> SchedulerMixin:
    """
    Builds a scheduler by the name of its recipe.

    Args:
        name (`str`):
            `"ddpm"` and `"ddim"` compute what the original's `p_sample_loop` and `ddim_sample_loop` compute (DDIM for
            step counts that divide 1000); `"dpm++"`, `"dpm++_singlestep"` and `"unipc"` are fast solvers of the same
            diffusion; `"flow_euler"`, `"flow_heun"`, `"flow_dpm++"` and `"flow_unipc"` sample flow-matching models. In
            the pipeline the first two run N equal steps from sigma 1; the last two start at diffusers' 0.999 for them.
            `"flow_heun"` is JiT's sampler, too.
            `"flow_sde"` takes the stochastic steps that SiT, REPA and REPA-E publish their results with. `"flow_ddt"`
            takes DDT's Euler steps, the last of which is longer, and `"flow_rae"` RAE's, which end before the data:
            both with a `shift`, which RAE chooses by the size of the latents.
            `"flow_map"` and `"flow_lcm"` are for models of few steps, which predict the mean velocity over an
            interval: the first goes from each timestep to the next (MeanFlow), the second to the data and back by
            fresh noise (SoFlow, consistency models).
        overrides: Entries of the scheduler's config that replace the recipe's.

    Returns:
        `SchedulerMixin`

    Raises:
        ValueError: if there is no such recipe, or the scheduler can't run with an override.
        TypeError: if the scheduler has no such option.
        ImportError: if this diffusers does not have the scheduler.

    Example:

        >>> from dit_hf import DiTClassCondPipeline, make_scheduler
        >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
        >>> pipe.scheduler = make_scheduler("flow_unipc")
        >>> images = pipe("cat", num_inference_steps=8).images
    """
    scheduler_class, config = _recipe(name)
    if scheduler_class is None:
        raise ImportError(f"The recipe {name!r} needs diffusers >= 0.39; run `pip install --upgrade diffusers`.")
    config = config | overrides
    if overrides:
        if unknown := sorted(overrides.keys() - inspect.signature(scheduler_class).parameters.keys()):
            raise TypeError(f"{scheduler_class.__name__}, the recipe {name!r}, has no option {unknown[0]!r}.")
        check_train_timesteps(scheduler_class.__name__, config)
        with raise_value_error(f"The recipe {name!r} can't be run with {shown(overrides)}"):
            try_scheduler(scheduler_class, config)
    return scheduler_class(**config)


def try_scheduler(scheduler_class: type[SchedulerMixin], config: Mapping) -> None:
    """
    Runs a scheduler for a few steps on one value; whatever it raises there it would raise in the middle of a call.

    Args:
        scheduler_class (`type`): Of diffusers.
        config (`Mapping`): Its config.
    """
    scheduler = scheduler_class.from_config(config)
    if config.get("use_dynamic_shifting"):
        return  # it needs the size of an image; the pipeline refuses it
    scheduler.set_timesteps(min(4, config.get("num_train_timesteps", 1000)))
    sample = torch.ones(1, 3, 1, 1)
    output = torch.ones(1, 6 if takes_variance(scheduler) else 3, 1, 1)
    with torch.random.fork_rng(devices=[]):
        for timestep in scheduler.timesteps:
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]


def trained_options(name: SchedulerRecipe, config: Mapping) -> dict[str, Any]:
    """
    What `make_scheduler` has to be told to build another sampler of the same model.

    Args:
        name (`str`): The sampler's recipe, of flow matching if the model is.
        config (`Mapping`): Of the model's own scheduler.

    Returns:
        `dict`: a flow's shift, or the diffusion: betas, number of training timesteps, `prediction_type`.
    """
    scheduler_class, recipe = _recipe(name)
    if name.startswith("flow_"):
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return {"flow_shift" if "flow_shift" in recipe else "shift": shift}
    accepted = inspect.signature(scheduler_class.__init__).parameters
    return {option: config[option] for option in DIFFUSION if option in accepted and config.get(option) is not None}


def _recipe(name):
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"There is no scheduler recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
