"""Named presets for speed. What each switches on is one table, applied with diffusers' and torch's own calls, and undone
by `restore`, which brings weights and pictures back to the bit."""

import importlib.util
from typing import NamedTuple

import torch
from torch import nn

from .pipeline_dit_class_cond import DiTClassCondPipeline
from .schedulers import make_scheduler


class SpeedPreset(NamedTuple):
    """
    What a preset switches on: compiled network and decoder, int8 weights and activations in the blocks, a solver
    for few steps, how many, and a guidance interval. Measured on `emoji64` (docs/speed.md).
    """

    int8: bool
    solver: str | None
    num_inference_steps: int | None
    guidance_interval: tuple[float, float] | None


# fmt: off
SPEED_PRESETS = {
    #                       int8   solver   steps  guidance interval
    "exact":    SpeedPreset(False, None,    None,  None),
    "int8":     SpeedPreset(True,  None,    None,  None),
    "balanced": SpeedPreset(True,  "unipc",    8,  (0.0, 0.5)),
    "fastest":  SpeedPreset(True,  "unipc",    6,  (0.0, 0.5)),
}
# fmt: on


def optimize(pipe: DiTClassCondPipeline, preset: str = "exact", device: str | torch.device | None = None) -> dict:
    """
    Makes a pipeline faster, in place; the first call of each batch size then compiles, for some seconds to minutes.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline; if it is optimized already, that is undone first.
        preset (`str`, defaults to `"exact"`):
            `"exact"` compiles and changes no pixel beyond rounding; `"int8"` computes the blocks in 8-bit integers too;
            `"balanced"` and `"fastest"` take a solver for few steps as well, and guide in a part of them only.
        device (`str` or `torch.device`, *optional*): Where to move the pipeline.

    Returns:
        `dict`: what to call the pipeline with, `num_inference_steps` and `guidance_interval`; nothing for the first two.

    Raises:
        ValueError: if there is no such preset, or the pipeline is offloaded.
        ImportError: if torchao is needed and not installed.

    Example:

        >>> import dit_hf
        >>> pipe = dit_hf.DiTClassCondPipeline.from_bundled("emoji64")
        >>> settings = dit_hf.optimize(pipe, "fastest")
        >>> image = pipe("flags", **settings).images[0]
        >>> dit_hf.restore(pipe)
    """
    if preset not in SPEED_PRESETS:
        raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(SPEED_PRESETS)}.")
    settings = SPEED_PRESETS[preset]
    if settings.int8 and importlib.util.find_spec("torchao") is None:
        raise ImportError(f"The preset {preset!r} needs torchao: pip install 'dit_hf[quantize]'.")
    if any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules()):
        raise ValueError("The pipeline is offloaded and can't be optimized; load it without offloading.")
    restore(pipe)
    pipe._before_optimization = {
        "device": pipe.device,
        "scheduler": pipe.scheduler,
        "weights": [],
    }
    if device is not None:
        pipe.to(device)
    if settings.int8:
        pipe._before_optimization["weights"] = quantize_blocks(pipe.transformer)
    if settings.solver is not None:
        pipe.scheduler = few_step_scheduler(pipe, settings.solver)
    for network in compiled_networks(pipe):
        # Freezing lays the weights out for the CPU's kernels once; with it, weights may not change any more.
        network.compile(dynamic=False, options={"freezing": pipe.device.type == "cpu"})
    call = {"num_inference_steps": settings.num_inference_steps, "guidance_interval": settings.guidance_interval}
    return {name: value for name, value in call.items() if value is not None}


def restore(pipe: DiTClassCondPipeline) -> None:
    """
    Undoes `optimize`: weights, scheduler and device are what they were; nothing happens without one.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
    """
    before = pipe.__dict__.pop("_before_optimization", None)
    if before is None:
        return
    for network in compiled_networks(pipe):
        network._compiled_call_impl = None
    for layer, weight in before["weights"]:
        layer.weight = weight
        vars(layer).pop("extra_repr", None)  # torchao's
    pipe.scheduler = before["scheduler"]
    pipe.to(before["device"])


def compiled_networks(pipe):
    """The parts of a pipeline that `optimize` compiles."""
    return [pipe.transformer] if pipe.vae is None else [pipe.transformer, pipe.vae.decoder]


def quantize_blocks(transformer):
    """Int8 weights, and activations quantized a token at a time, in attention and feed-forward; returns what was there."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = {
        name: layer
        for name, layer in transformer.transformer_blocks.named_modules()
        if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        if "modulation" not in name and "lora_" not in name
    }
    weights = [(layer, layer.weight) for layer in layers.values()]
    quantize_(
        transformer.transformer_blocks, Int8DynamicActivationInt8WeightConfig(), lambda layer, name: name in layers
    )
    return weights


def few_step_scheduler(pipe, solver):
    """A multistep solver of the pipeline's own diffusion or flow."""
    config = pipe.scheduler.config
    if pipe.is_flow_matching:
        return make_scheduler(f"flow_{solver}", flow_shift=config.get("shift", config.get("flow_shift", 1.0)))
    return type(make_scheduler(solver)).from_config(config, timestep_spacing="linspace", lower_order_final=True)
