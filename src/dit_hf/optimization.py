"""Named presets for speed, one table. They are applied with diffusers' and torch's own calls and undone by `restore`,
after which weights and images are what they were, to the bit."""

import importlib.util
from typing import Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from .modulation_table import ModulationTable
from .pipeline import DiTClassCondPipeline
from .pipeline_dit_class_cond import takes_jumps
from .schedulers import make_scheduler, trained_options


logger = logging.get_logger(__name__)

# Guided and unguided steps of each batch size are separate compilations; torch's default is 8.
RECOMPILE_LIMIT = 64


# Prefixes of the modules that are quantized; models with two streams have the second.
BLOCKS = ("transformer_blocks.", "decoder_blocks.")


class SpeedPreset(NamedTuple):
    """
    What a preset switches on: the precision of the compiled network and decoder, a solver for few steps, how many, and
    a guidance interval. Measured in docs/speed.md.
    """

    precision: str
    solver: str | None
    num_inference_steps: int | None
    guidance_interval: tuple[float, float] | None


SpeedPresetName = Literal["exact", "int8", "balanced", "fastest"]

# fmt: off
SPEED_PRESETS: dict[SpeedPresetName, SpeedPreset] = {
    #                       precision   solver   steps  guidance interval
    "exact":    SpeedPreset("float32",  None,    None,  None),
    "int8":     SpeedPreset("int8",     None,    None,  None),
    "balanced": SpeedPreset("bfloat16", "unipc",    8,  (0.0, 0.5)),
    "fastest":  SpeedPreset("bfloat16", "unipc",    6,  (0.0, 0.5)),
}
# fmt: on
# Steps of "fastest" with guided jumps, if none are recommended; docs/few_steps.md compares numbers of them.
JUMPS = 4


def optimize(
    pipe: DiTClassCondPipeline, preset: SpeedPresetName = "exact", device: str | torch.device | None = None
) -> None:
    """
    Makes a pipeline faster, in place. The first call of each batch size then compiles, for some seconds to minutes.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline; if it is optimized already, that is undone first.
        preset (`str`, defaults to `"exact"`):
            `"exact"` compiles; images change by rounding only. `"int8"` also computes the blocks in 8-bit integers.
            `"balanced"` and `"fastest"` compute in bfloat16, which is slow on older processors, with a few-step
            solver that is guided in the first half. Their steps and interval become the pipeline's
            `recommended_call`, so that `pipe(labels)` uses them. Flow maps keep their sampler; a model with guided
            jumps (`guidance_in_weights="jumps"`) and a sampler of its velocity takes its recommended number of jumps,
            or 4, with `"fastest"`.
        device (`str` or `torch.device`, *optional*): Where to move the pipeline.

    Raises:
        ValueError: if there is no such preset, `pipe` is no pipeline, is offloaded, or is in the middle of a call; a
            call of another thread is waited for.
        ImportError: if torchao is needed and not installed.

    Example:

        >>> import dit_hf
        >>> pipe = dit_hf.DiTClassCondPipeline.from_bundled("emoji64")
        >>> dit_hf.optimize(pipe, "fastest")
        >>> pipe.resolve_call()["num_inference_steps"]
        4
        >>> dit_hf.restore(pipe)
    """
    check_pipeline(pipe)
    if not isinstance(preset, str) or preset not in SPEED_PRESETS:
        raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(SPEED_PRESETS)}.")
    if SPEED_PRESETS[preset].precision == "int8" and importlib.util.find_spec("torchao") is None:
        raise ImportError(f"The preset {preset!r} needs torchao: pip install 'dit_hf[quantize]'.")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"`device` is {device!r}; it must be a torch.device or its name, such as 'cuda'.") from None
    networks = compiled_networks(pipe)
    if any(is_offloaded(network) for network in networks):
        raise ValueError("The pipeline is offloaded and can't be optimized; load it without offloading.")
    with pipe._occupied():
        _restore(pipe)
        _apply(pipe, speed_preset(pipe, preset), networks, device)
    names = " and ".join(type(network).__name__ for network in networks)
    logger.warning(
        f"{names} will be compiled by the first call of each batch size: on two CPU cores about half a minute for a "
        "small model, two minutes for XL/2."
    )


def speed_preset(pipe: DiTClassCondPipeline, name: SpeedPresetName) -> SpeedPreset:
    """
    What a preset is for a pipeline.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        name (`str`): A name of `SPEED_PRESETS`.

    Returns:
        `SpeedPreset`
    """
    settings, config = SPEED_PRESETS[name], pipe.transformer.config
    if config.get("interval_embedding", False) and takes_jumps(pipe.scheduler):
        # Its own sampler takes fewer steps than any solver.
        return settings._replace(solver=None, num_inference_steps=None, guidance_interval=None)
    if name == "fastest" and config.get("guidance_in_weights") == "jumps":
        jumps = (pipe.config.get("recommended_call") or {}).get("num_jumps", JUMPS)
        return settings._replace(solver="lcm", num_inference_steps=jumps, guidance_interval=None)
    return settings


def _apply(pipe, settings, networks, device):
    pipe._before_optimization = before = {
        "device": pipe.device,
        "compiled": [(network, network._compiled_call_impl) for network in networks],
        "dtypes": [(parameter, parameter.dtype) for network in networks for parameter in network.parameters()],
        "weights": [],
        "recommended_call": pipe.config.get("recommended_call"),
    }
    try:
        if device is not None:
            pipe.to(device)
        if settings.precision == "int8":
            before["weights"] = quantize_blocks(pipe.transformer)
        if settings.solver is not None:
            before["scheduler"] = pipe.scheduler
            pipe.scheduler = few_step_scheduler(pipe, settings.solver)
        for network in networks:
            compile_network(network, pipe.device.type, settings.precision == "bfloat16")
        if pipe.device.type == "cpu" and getattr(pipe.transformer, "is_adaptive", False):
            use_modulation_table(pipe)
    except BaseException:
        _restore(pipe)
        raise
    steps = "num_jumps" if settings.solver == "lcm" else "num_inference_steps"
    call = {steps: settings.num_inference_steps, "guidance_interval": settings.guidance_interval}
    call = {name: value for name, value in call.items() if value is not None}
    pipe.register_to_config(recommended_call=(before["recommended_call"] or {}) | call or None)


def restore(pipe: DiTClassCondPipeline) -> None:
    """
    Undoes `optimize`: restores weights, scheduler and device. Does nothing without a call of it before.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.

    Raises:
        ValueError: if weights were cast to another type since then, so they can't be restored; the rest is undone.

    Example:

        >>> import dit_hf
        >>> pipe = dit_hf.DiTClassCondPipeline.from_bundled("emoji64")
        >>> pipe.scheduler = dit_hf.make_scheduler("flow_euler")
        >>> dit_hf.optimize(pipe, "balanced")
        >>> pipe.resolve_call()["num_inference_steps"]
        8
        >>> dit_hf.restore(pipe)
        >>> pipe.resolve_call()["num_inference_steps"]
        25
    """
    check_pipeline(pipe)
    with pipe._occupied():
        cast = _restore(pipe)
    if cast:
        raise ValueError(
            f"Weights were cast from {cast[0][1]} to {cast[0][0].dtype} after `optimize`, and can't be restored to "
            "the bit; all else was. Load the pipeline again, and cast before `optimize`."
        )


def _restore(pipe):
    """Undoes `optimize`; returns the parameters that were cast meanwhile, with their types before."""
    before = pipe.__dict__.pop("_before_optimization", None)
    if before is None:
        return []
    for network, compiled in before["compiled"]:
        network._compiled_call_impl = compiled
    for layer, weight in before["weights"]:
        layer.weight = weight
        vars(layer).pop("extra_repr", None)  # torchao's
    pipe.scheduler = before.get("scheduler", pipe.scheduler)
    pipe.register_to_config(recommended_call=before["recommended_call"])
    pipe.to(before["device"])
    return [(parameter, dtype) for parameter, dtype in before["dtypes"] if parameter.dtype != dtype]


def check_pipeline(pipe) -> None:
    """Raises `ValueError` for anything but a pipeline of this package's kind, such as its transformer."""
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "resolve_call"):
        raise ValueError(
            f"`pipe` is a {type(pipe).__name__}; it must be a DiTClassCondPipeline, also to optimize its transformer."
        )


def is_offloaded(network: nn.Module) -> bool:
    """Whether accelerate or diffusers moves a network's weights while it runs."""
    modules = list(network.modules())
    if any(hasattr(module, "_hf_hook") for module in modules):
        return True
    # Group offloading is a hook of diffusers' registry.
    registries = (getattr(module, "_diffusers_hook", None) for module in modules)
    return any(registry is not None and "group_offloading" in registry.hooks for registry in registries)


def use_modulation_table(pipe):
    """Gives the transformer its adaptive norms' vectors from a table; with caches of blocks it goes without."""
    transformer, table = pipe.transformer, ModulationTable(pipe)
    forward = transformer._compiled_call_impl or transformer._call_impl

    def call(*args, **inputs):
        if not args and not transformer.is_cache_enabled and table.covers(inputs):
            inputs["modulation"] = table.rows(inputs["timestep"], inputs["class_labels"])
        elif transformer.class_embed._forward_hooks:  # mixed classes, which the compiled network would ignore
            return transformer._call_impl(*args, **inputs)
        return forward(*args, **inputs)

    call.embeds_classes_eagerly = True  # so `mix_classes` works
    transformer._compiled_call_impl = call


def compiled_networks(pipe):
    """The parts of a pipeline that `optimize` compiles."""
    return [pipe.transformer] if pipe.vae is None else [pipe.transformer, pipe.vae.decoder]


def compile_network(network, device_type, bfloat16):
    """
    Like `network.compile()`, and undone in the same way. On a CPU the weights are frozen, so that Inductor packs them
    for its kernels once; they must not change afterwards.
    """
    import torch._inductor.config  # a second of imports, for those who compile
    from torch._inductor.compile_fx import compile_fx

    def backend(graph, inputs):
        """Inductor, under a separate name: what an earlier call has compiled holds that call's weights."""
        return compile_fx(graph, inputs)

    compiled = torch.compile(network._call_impl, backend=backend, dynamic=False)
    if bfloat16:
        compiled = torch.autocast(device_type, torch.bfloat16)(compiled)
    # Dynamo asks whether weights are frozen before `options` are read, so this one is set around the calls.
    compiled = torch._inductor.config.patch(freezing=device_type == "cpu")(compiled)
    network._compiled_call_impl = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)(compiled)


def quantize_blocks(transformer):
    """Int8 weights and per-token activations in attention and feed-forward; returns the layers with their weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = {
        name: layer
        for name, layer in transformer.named_modules()
        if name.startswith(BLOCKS) and type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        if "modulation" not in name and "lora_" not in name
    }
    weights = [(layer, layer.weight) for layer in layers.values()]
    quantize_(transformer, Int8DynamicActivationInt8WeightConfig(), lambda layer, name: name in layers)
    return weights


def few_step_scheduler(pipe, solver):
    """A solver of few steps for the pipeline's own diffusion or flow."""
    name = f"flow_{solver}" if pipe.is_flow_matching else solver
    return make_scheduler(name, **trained_options(name, pipe.scheduler.config))
