"""Class-conditional image generation with a Diffusion Transformer, any diffusers scheduler and any VAE.

Shapes: `B` images, `C` channels, `H W` latent size.

This file imports torch and diffusers only: it is also the code that a Hub repository carries, so it loads with any
diffusers from `MIN_DIFFUSERS` on. Names that are private to diffusers are optional: without them only the feature that
needs them is missing.
"""

import copy
import difflib
import inspect
import json
import math
import operator
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch


MIN_DIFFUSERS = "0.38.0"
if tuple(map(int, diffusers.__version__.split(".")[:2])) < tuple(map(int, MIN_DIFFUSERS.split(".")[:2])):
    raise ImportError(
        f"DiTClassCondPipeline needs diffusers >= {MIN_DIFFUSERS}; this is {diffusers.__version__}. "
        "Run `pip install --upgrade diffusers`."
    )

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import is_peft_available, logging
from diffusers.utils.torch_utils import randn_tensor


try:  # LoRA adapters; diffusers has these names only where peft and transformers are installed
    from diffusers.loaders import SD3LoraLoaderMixin
    from diffusers.loaders.lora_base import LoraBaseMixin
except ImportError:
    SD3LoraLoaderMixin = None  # type: ignore[assignment,misc]

    class LoraBaseMixin:  # type: ignore[no-redef]
        """Stands in for diffusers' own: its methods say what is missing."""

        def _refuse(self, *args, **kwargs):
            self._check_adapters_possible()

        fuse_lora = unfuse_lora = unload_lora_weights = disable_lora = enable_lora = _refuse
        set_adapters = delete_adapters = get_active_adapters = get_list_adapters = set_lora_device = _refuse


logger = logging.get_logger(__name__)

# Components that a pipeline may lack.
OPTIONAL_COMPONENTS = ("vae", "guide", "guider")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
LEARNED_VARIANCE = ("learned", "learned_range")
# Settings of a call that neither the caller nor `recommended_call` gives.
CALL_DEFAULTS = {
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "guidance_channels": None,
    "guidance_interval": (0.0, 1.0),
}
RECOMMENDED_SETTINGS = (*CALL_DEFAULTS, "num_jumps")
AUTOGUIDANCE_SCALE = 1.5
# Schedulers of diffusers that can't start in the middle of their schedule.
NO_IMAGE_TO_IMAGE = ("LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler")
# How far back towards noise an image is taken, if the caller gives none.
DEFAULT_STRENGTH = 0.8
# Options in which guide and transformer must agree, and their defaults where not every model has them.
SHARED_GUIDE_OPTIONS = {"in_channels": None, "num_classes": None, "noise_scale": 1.0, "interval_embedding": False}

OVERFLOW_HINT = (
    "Try float32 or bfloat16 weights, another scheduler or fewer steps than the training's timesteps, and a smaller "
    "`guidance_scale`; weights that are not finite give nothing else."
)
# What one call may ask for, far beyond what memory and patience allow: a typo must not fill the memory.
MAX_STEPS = 10_000
MAX_TRAIN_TIMESTEPS = 2**17
MAX_IMAGES = 2**20
MAX_GUIDANCE_SCALE = 1000
MAX_LORA_ALPHA = 2**20
MAX_SIDE = 2**16  # pixels
MAX_LATENT_VALUES = 2**30
# What diffusers' `AutoencoderRAE` adds to the deviations of latents, which contain RAE's own epsilon.
RAE_EPSILON = 1e-5
# Of `FlowMapEulerDiscreteScheduler.index_for_timestep`.
TIMESTEP_TOLERANCE = 1e-3


# The thread that holds a pipeline or component, by its id, once for each time that it entered. No attributes,
# so that a pipeline can be copied and pickled, and pipelines that share a component know of each other.
_HOLDERS: defaultdict[int, list[int]] = defaultdict(list)
_RELEASED = threading.Condition()
# Pipelines, transformers and schedulers in the middle of a call.
_IN_CALL: set[int] = set()


@contextmanager
def _locked(get_objects):
    """Locks the objects that `get_objects` returns for this thread, all at once, so that threads can't deadlock."""
    thread, found = threading.get_ident(), []

    def are_free():
        found[:] = get_objects()
        return all({thread}.issuperset(_HOLDERS.get(id(each), ())) for each in found)

    with _RELEASED:
        _RELEASED.wait_for(are_free)
        for each in found:
            _HOLDERS[id(each)].append(thread)
    try:
        yield
    finally:
        with _RELEASED:
            for each in found:
                _HOLDERS[id(each)].pop()
                if not _HOLDERS[id(each)]:
                    del _HOLDERS[id(each)]
            _RELEASED.notify_all()


def one_at_a_time(method: Callable, hold: str = "exclusive") -> Callable:
    """Makes a pipeline's method wait while another thread uses the pipeline or one of its components."""

    @wraps(method)
    def call(self, *args, **kwargs):
        with getattr(self, hold)():
            return method(self, *args, **kwargs)

    return call


def has_hooks(model: torch.nn.Module) -> bool:
    """Whether accelerate or diffusers move, cast or cache something while a model runs."""
    modules = [model]
    for module in modules:  # the list grows on the way, which is faster than `modules()`
        registry = vars(module).get("_diffusers_hook")
        if "_hf_hook" in vars(module) or (registry is not None and registry.hooks):
            return True
        modules.extend(child for child in module._modules.values() if child is not None)
    return False


def input_dtype(model: Any) -> torch.dtype:
    """The type of a model's inputs, which is `model.dtype`; diffusers looks for hooks more slowly."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in () if has_hooks(model) else model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            return parameter.dtype
    return model.dtype


def has_values(value: Any) -> bool:
    """False for a tensor that is sparse, nested, quantized, complex, on meta, or of 8-bit floats; else True."""
    if not isinstance(value, torch.Tensor):
        return True
    is_dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    is_float8 = value.is_floating_point() and value.element_size() == 1
    return is_dense and not is_float8 and not value.is_complex() and value.device.type != "meta"


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, numpy's too; a bool or a text is not."""
    if isinstance(value, (bool, str, bytes)) or not has_values(value):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several values
        return False


def trained_prediction(scheduler_config: Mapping) -> str:
    """
    What a model predicts, by the scheduler that samples it.

    Args:
        scheduler_config (`Mapping`): The scheduler's config with its `_class_name`.

    Returns:
        `str`: `"velocity"` for flow matching, `"edm"` for EDM's preconditioned output, else the `prediction_type`.

    Raises:
        ValueError: if the prediction is unknown, or only one of the two options is set that make a solver of diffusion
            models sample flow matching.
    """
    name, prediction = scheduler_config.get("_class_name", ""), scheduler_config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name} has prediction_type={prediction!r}; it must be one of {', '.join(PREDICTIONS)}.")
    if name.startswith(("FlowMatch", "FlowMap")):
        return "velocity"
    uses_flow_sigmas = bool(scheduler_config.get("use_flow_sigmas"))
    if uses_flow_sigmas != (prediction == "flow_prediction"):
        raise ValueError(
            f"{name} has use_flow_sigmas={uses_flow_sigmas} and prediction_type={prediction!r}: for flow matching "
            "pass use_flow_sigmas=True and prediction_type='flow_prediction', for diffusion neither."
        )
    if uses_flow_sigmas:
        return "velocity"
    return "edm" if name.startswith("EDM") else prediction


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler takes a predicted variance; others may have got DDPM's `variance_type` by `from_config`."""
    is_ddpm = isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))
    return is_ddpm and scheduler.config.variance_type in LEARNED_VARIANCE


def _takes_interval(scheduler):
    """Whether a scheduler steps along the mean velocity over an interval, as diffusers' one for flow maps."""
    return "r_timestep" in inspect.signature(scheduler.step).parameters


def takes_jumps(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is for flow maps: along a mean velocity, or to the data and back by fresh noise."""
    return isinstance(scheduler, FlowMatchLCMScheduler) or _takes_interval(scheduler)


def is_rae(vae: ModelMixin) -> bool:
    """Whether an autoencoder is an `AutoencoderRAE`: pixels in [0, 1], latents of one size that it normalises."""
    return "encoder_input_size" in vae.config


def rae_scale(vae: ModelMixin) -> torch.Tensor:
    """RAE's own deviations of latents over those of `AutoencoderRAE`, which have an epsilon twice; `(C, h, w)`."""
    std = vae._latents_std.float()
    return std / (std + RAE_EPSILON)


def rae_positions(width: int, tokens: int) -> torch.Tensor:
    """RAE's own positions of a decoder; `(1, 1 + tokens, width)`, the first of which is zero."""
    grid = math.isqrt(tokens)
    options = {"cls_token": True, "extra_tokens": 1, "base_size": grid, "output_type": "pt"}
    return get_2d_sincos_pos_embed(width, grid, **options)[None].float()


def correct_rae(vae: ModelMixin) -> None:
    """Gives an `AutoencoderRAE` RAE's own positions: diffusers stretches them to those of 16×16 patches."""
    grid, table = math.isqrt(vae.num_patches), vae.decoder.decoder_pos_embed
    positions = rae_positions(table.shape[-1], vae.num_patches).to(table)
    if table.device.type != "meta" and not torch.equal(table, positions):
        logger.warning(f"AutoencoderRAE has positions of 16×16 patches; they are corrected to {grid}×{grid}, its own.")
        vae.decoder.decoder_pos_embed = positions


def latent_channels(vae: ModelMixin) -> int | None:
    """Channels of a VAE's latents, as its config states them."""
    return vae.config.get("encoder_hidden_size" if is_rae(vae) else "latent_channels")


def spatial_factor(vae: ModelMixin) -> int:
    """Pixels per latent value along one side of a VAE; `ValueError` if neither it nor its config states them."""
    if is_rae(vae):
        return vae.config["patch_size"]
    if isinstance(ratio := getattr(vae, "spatial_compression_ratio", None), int):
        return ratio
    channels = vae.config.get("block_out_channels")
    if not isinstance(channels, (list, tuple)) or not channels:
        raise ValueError(f"{type(vae).__name__} does not state its spatial compression; it is not supported.")
    return 2 ** (len(channels) - 1)


class ClassNames:
    """
    Finds classes by name.

    Args:
        id2label (`Mapping[int, str]`): The class names; synonyms are separated by commas.
    """

    def __init__(self, id2label: Mapping[int, str]):
        # The whole entry goes before a synonym and the spelling as written before another case: ImageNet has a
        # "Cardigan" that is a dog and a "cardigan" that is not.
        self._ids: list[dict[str, set[int]]] = [{}, {}, {}, {}]
        for key, entry in id2label.items():
            for level, names in enumerate(([entry], entry.split(","))):
                for name in filter(None, map(str.strip, names)):
                    self._ids[level].setdefault(name, set()).add(key)
                    self._ids[level + 2].setdefault(name.casefold(), set()).add(key)

    def find(self, name: str) -> int | None:
        """The id of an entry or a synonym, in any case; None if there is none, `ValueError` if there are several."""
        spellings = (name.strip(), name.strip().casefold())
        for level, ids in enumerate(self._ids):
            if found := ids.get(spellings[level // 2]):
                if len(found) > 1:
                    raise ValueError(f"{name!r} is the name of classes {', '.join(map(str, sorted(found)))}")
                return min(found)
        return None

    def unambiguous(self) -> dict[str, int]:
        """Every entry and synonym that `find` resolves, as written -> id, in alphabetical order."""
        whole, synonyms = self._ids[:2]
        found = {name: whole.get(name) or synonyms[name] for name in sorted(whole.keys() | synonyms.keys())}
        return {name: min(ids) for name, ids in found.items() if len(ids) == 1}


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case; "o'clock" is one."""
    return set(re.findall(r"[\w']+", text.casefold()))


def nearest_names(name: str, known: Mapping[str, int]) -> list[str]:
    """Names of up to three classes: those that hold all words of a name or words like them, then similar names."""
    spelling = {other.casefold(): other for other in known}
    vocabulary = {word for other in spelling for word in words_of(other)}
    # Each word of the name, or if no class has it, the words like it.
    wanted = [
        {word} & vocabulary or set(difflib.get_close_matches(word, sorted(vocabulary), cutoff=0.75))
        for word in words_of(name)
    ]
    holding = [other for other in spelling if wanted and all(words & words_of(other) for words in wanted)]
    holding.sort(key=len)
    similar = difflib.get_close_matches(name.casefold(), spelling, n=6, cutoff=0.6)
    nearest: dict[int, str] = {}  # one name a class
    for other in (*holding, *similar):
        nearest.setdefault(known[spelling[other]], spelling[other])
    return list(nearest.values())[:3]


def check_id2label(id2label: Any) -> dict[int, str]:
    """Class names with numbers as keys, which JSON makes strings, in order; `ValueError` names an invalid entry."""
    if id2label is None:
        return {}
    if not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` is a {type(id2label).__name__}; it must be a dictionary, class id -> name.")
    names: dict[int, str] = {}
    for key, name in id2label.items():
        try:
            class_id = operator.index(int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) else key)
        except TypeError:
            class_id = -1
        if class_id < 0 or isinstance(key, bool):
            raise ValueError(f"`id2label` has a key that is not a class id: {str(key)[:100]!r}.")
        if class_id in names:
            raise ValueError(f"`id2label` has two names for class {class_id}.")
        if not isinstance(name, str):
            raise ValueError(f"`id2label` has {name!r} for class {class_id}; names must be strings.")
        names[class_id] = name
    return dict(sorted(names.items()))


def on_white(image: Any) -> Any:
    """A PIL image in RGB, on white where it is transparent."""
    if image.mode == "RGB":
        return image
    image = image.convert("RGBA")
    white = image.copy()
    white.paste((255, 255, 255, 255), (0, 0, *image.size))
    white.alpha_composite(image)
    return white.convert("RGB")


def is_guider(part: Any) -> bool:
    """Whether a value has the methods of diffusers' guiders, whose base class is experimental and may move."""
    methods = ("set_state", "prepare_inputs", "prepare_models", "cleanup_models", "__call__", "enable", "disable")
    return not isinstance(part, type) and all(callable(getattr(part, name, None)) for name in methods)


def check_component(name: str, part: Any) -> None:
    """Raises `ValueError` for what can't be that component of a pipeline."""
    if part is None and name in OPTIONAL_COMPONENTS:
        return
    if name == "guider":
        fits, what = is_guider(part), "guider, such as diffusers.AdaptiveProjectedGuidance()"
    elif name == "scheduler":
        fits, what = isinstance(part, SchedulerMixin), "scheduler"
    else:
        fits, what = isinstance(part, torch.nn.Module), "model"
    if not fits:
        given = f"the class {part.__name__}" if isinstance(part, type) else f"a {type(part).__name__}"
        raise ValueError(f"`{name}` is {given}; it must be a diffusers {what}.")


def check_callback_outputs(outputs: Any) -> None:
    """Raises `ValueError` unless a step callback returned a dictionary of tensors."""
    if not isinstance(outputs, Mapping) or not all(isinstance(each, torch.Tensor) for each in outputs.values()):
        raise ValueError(
            f"`callback_on_step_end` returned {shown(outputs)}; it must be None or a dictionary of tensors."
        )


def check_guide(guide: Mapping, transformer: Mapping) -> None:
    """Raises `ValueError` for the config of a guide that predicts for other latents or classes than a transformer."""
    for name, default in SHARED_GUIDE_OPTIONS.items():
        guiding, guided = guide.get(name, default), transformer.get(name, default)
        if guiding != guided:
            raise ValueError(
                f"The guide has {name}={guiding!r}, and the transformer {name}={guided!r}; a guide is a weaker model "
                "of the same latents and classes."
            )


def shown(value: Any) -> str:
    """`repr` of a value on one line, at most 200 characters of it, for error messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


@contextmanager
def raise_value_error(what: str) -> Iterator[None]:
    """Re-raises an exception of a library as a `ValueError` that begins with `what`."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{reason}") from error


def check_train_timesteps(name: Any, config: Mapping) -> None:
    """Raises `ValueError` for a scheduler's config, of a name, without a sensible number of timesteps."""
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{name} has num_train_timesteps={steps!r}; it must be a whole number from 1 to {MAX_TRAIN_TIMESTEPS}."
        )


def check_adapters(weights: Mapping, metadata: Any, prefix: str, layers: Mapping[str, torch.nn.Module]) -> None:
    """Raises `ValueError` for adapters that don't fit the layers, before anything is allocated for them."""
    names = {key: key.removeprefix(prefix).split(".lora_")[0] for key in weights}
    stray = [key for key in weights if not (key.startswith(prefix) and ".lora_" in key and names[key] in layers)]
    if stray or not weights:
        example, others = f"{prefix}transformer_blocks.0.attn.to_q.lora_A.weight", ", ".join(map(repr, stray[:2]))
        raise ValueError(
            f"{len(weights) - len(stray)} of the adapters' {len(weights)} keys belong to a layer of the transformer; "
            f"keys look like {example!r}, and these are not: {others or 'none'}."
        )
    largest_rank = 0
    for key, tensor in weights.items():
        if (
            not isinstance(tensor, torch.Tensor)
            or not tensor.is_floating_point()
            or not tensor.float().isfinite().all()
        ):
            given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"The adapters' {key!r} is not a tensor of finite floating-point numbers, but {given}.")
        name = names[key]
        layer = getattr(layers[name], "base_layer", layers[name])
        if not isinstance(layer, torch.nn.Linear):
            continue  # peft refuses layers that it does not know
        down, up = (weights.get(f"{prefix}{name}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            raise ValueError(f"The adapters of {name!r} have lora_A or lora_B alone; they need both.")
        rank = down.shape[0] if down.ndim == 2 else 0
        largest_rank = max(rank, largest_rank)
        sizes = (rank, layer.in_features), (layer.out_features, rank)
        if rank < 1 or (tuple(down.shape), tuple(up.shape)) != sizes:
            raise ValueError(
                f"The adapters of {name!r} have the shapes {tuple(down.shape)} and {tuple(up.shape)}; the layer needs "
                f"(rank, {layer.in_features}) and ({layer.out_features}, rank)."
            )
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ValueError(f"The adapters' metadata is a {type(metadata).__name__}; it must be a dictionary.")
    for key, value in (metadata or {}).items():
        option = key.rsplit(".", 1)[-1]
        if option not in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            continue
        if option.endswith("_pattern") and not isinstance(value, Mapping):
            raise ValueError(f"The adapters' metadata has {key}: {value!r}; it must be a dictionary.")
        is_rank = option.startswith("r")
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if is_rank:
                fits = type(number) is int and 1 <= number <= largest_rank
                allowed = f"a rank of the tensors, at most {largest_rank}"
            else:
                fits = is_finite(number) and 0 < abs(number) <= MAX_LORA_ALPHA
                allowed = f"a number up to {MAX_LORA_ALPHA}, and not 0, with which they have no effect"
            if not fits:
                raise ValueError(f"The adapters' metadata has {key}: {value!r}; it must be {allowed}.")


class ScaleGuidance:
    """
    Guidance by a scale: from a weaker prediction through the model's own, which a scale of 1 keeps. It has the
    methods of diffusers' guiders, any of which can take its place.
    """

    def __init__(self):
        self.guidance_scale = 1.0
        self.keeps_both = False  # whether both predictions are wanted by a step without guidance too
        self.enable()

    def enable(self):
        self._enabled = True

    def disable(self):
        self._enabled = False

    def set_state(self, step, num_inference_steps, timestep):
        self.is_guided = self._enabled and self.guidance_scale != 1

    def prepare_inputs(self, data):
        count = 2 if self.is_guided or self.keeps_both else 1
        return [SimpleNamespace(class_labels=labels) for labels in data["class_labels"][:count]]

    def __call__(self, batches):
        strong, *weak = (batch.noise_pred for batch in batches)
        return (weak[0] + self.guidance_scale * (strong - weak[0]) if self.is_guided else strong,)


def changes_model(guidance: Any) -> bool:
    """Whether a guider changes the model between its predictions, which are then no single batch."""
    classes = [each for each in type(guidance).__mro__ if each.__name__ != "BaseGuidance"]
    return any("prepare_models" in vars(each) for each in classes)


@contextmanager
def changed_by(guidance: Any, model: torch.nn.Module) -> Iterator[None]:
    """A model as a guider changes it for its next prediction; as it was, whatever happens."""
    if not changes_model(guidance):
        yield
        return
    try:
        guidance.prepare_models(model)
        yield
    finally:
        guidance.cleanup_models(model)


class CurrentScale(float):
    """The scale of a step, so that one which a callback sets in its place is known."""


def set_step(guidance: Any, scale: float, is_guided: bool, step: int, steps: int, timestep: torch.Tensor) -> None:
    """Tells a guider the step, the step's scale, and whether it guides there."""
    guidance.guidance_scale = float(scale)
    (guidance.enable if is_guided else guidance.disable)()
    guidance.set_state(step, steps, timestep)


def count_hooks(model: torch.nn.Module) -> int:
    """How many hooks of diffusers a model's modules have."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return sum(len(registry.hooks) for registry in registries if registry is not None)


def largest_scale(guidance_scale: float | Sequence[tuple[float, float]]) -> float:
    """A guidance scale, or the largest of a table by noise level."""
    if isinstance(guidance_scale, Sequence):
        return max(scale for _, scale in guidance_scale)
    return guidance_scale


def scale_schedule(table: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """The scale at a noise level, linear between the rows `(noise level, scale)` of a table and constant beyond."""
    rows = sorted((float(level), float(scale)) for level, scale in table)

    def scale_at(level):
        for (low, scale), (high, following) in zip(rows, rows[1:], strict=False):
            if low < level < high:
                return scale + (following - scale) * (level - low) / (high - low)
        return min(rows, key=lambda row: abs(row[0] - level))[1]

    return scale_at


class DiTLoraLoaderMixin(LoraBaseMixin):  # type: ignore[misc,valid-type]
    """Loads, fuses and saves LoRA adapters of the transformer."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """
        Puts adapters on the transformer.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict`): A file, a folder or a Hub id with
                `pytorch_lora_weights.safetensors`, or the tensors by their keys.
            adapter_name (`str`, *optional*): A name for the adapters.
            kwargs: `weight_name`, `subfolder`, `revision`, `token` … as with every diffusers pipeline.

        Raises:
            ImportError: if peft or transformers is missing.
            ValueError: if they can't be read, a key belongs to no layer of the transformer, a shape does not fit it,
                or a value is not finite; nothing is loaded then.
        """
        self._check_adapters_possible()
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name):
            raise ValueError(f"`adapter_name` is {adapter_name!r}; it must be a text without a dot.")
        options = {name: kwargs.pop(name) for name in ("low_cpu_mem_usage", "hotswap") if name in kwargs}
        kwargs = {"use_safetensors": True, "return_lora_metadata": True} | kwargs
        source = pretrained_model_name_or_path_or_dict
        named = "The adapters" if isinstance(source, Mapping) else f"The adapters of {source}"
        with raise_value_error(f"{named} can't be read"):
            weights, metadata = SD3LoraLoaderMixin.lora_state_dict(source, **kwargs)
        check_adapters(weights, metadata, f"{self.transformer_name}.", dict(self.transformer.named_modules()))
        before = set(getattr(self.transformer, "peft_config", {}))
        try:
            with raise_value_error(f"{named} can't be put on the transformer"):
                self.transformer.load_lora_adapter(
                    dict(weights),
                    prefix=self.transformer_name,
                    adapter_name=adapter_name,
                    metadata=metadata,
                    **options,
                )
        except ValueError:
            if not before:
                self.transformer.unload_lora()
            elif added := set(self.transformer.peft_config) - before:
                self.transformer.delete_adapters(list(added))
            raise

    @classmethod
    def save_lora_weights(cls, save_directory: str | Path, transformer_lora_layers: dict[str, torch.Tensor], **kwargs):
        """
        Writes adapters for `load_lora_weights`.

        Args:
            save_directory (`str` or `Path`): Created if it does not exist.
            transformer_lora_layers (`dict[str, torch.Tensor]`): From `peft.get_peft_model_state_dict`.
            kwargs: `weight_name`, `transformer_lora_adapter_metadata` (rank and alpha) … as with diffusers' pipelines.
        """
        cls._check_adapters_possible()
        SD3LoraLoaderMixin.save_lora_weights(save_directory, transformer_lora_layers=transformer_lora_layers, **kwargs)

    @staticmethod
    def _check_adapters_possible():
        if SD3LoraLoaderMixin is None or not is_peft_available():
            missing = "transformers" if SD3LoraLoaderMixin is None else "peft"
            raise ImportError(f"LoRA needs {missing}: pip install 'dit_hf[train]', or peft and transformers.")

    def fuse_lora(self, components: list[str] = ["transformer"], **kwargs):
        """Adds the adapters to the weights; `unfuse_lora` subtracts them."""
        self._check_adapters_possible()
        super().fuse_lora(components=components, **kwargs)

    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs):
        """Subtracts the adapters that `fuse_lora` has added."""
        self._check_adapters_possible()
        super().unfuse_lora(components=components, **kwargs)


class DiTClassCondPipeline(DiffusionPipeline, DiTLoraLoaderMixin):
    r"""
    Pipeline for class-conditional image generation with DiT (https://arxiv.org/abs/2212.09748).

    Args:
        transformer (`DiTTransformer2DModel`): Predicts noise, velocity or whatever the scheduler's
            `prediction_type` says, from latents, timestep and class.
        scheduler (`SchedulerMixin`):
            A sampler for what the model was trained on. It defines that for the pipeline: a scheduler that is set
            later must sample the same. EDM's are for models trained inside EDM's preconditioning, which is not the
            diffusion of DiT.
        vae (`AutoencoderKL`, *optional*): Decodes latents; without one the model works on pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*): Class names; synonyms are separated by commas.
        recommended_call (`dict`, *optional*):
            Settings for calls that don't give them: `num_inference_steps`, `guidance_scale`, `guidance_channels`,
            `guidance_interval`; and `num_jumps`, the steps of samplers that take jumps (`flow_lcm`, `flow_map`).
        guide (`DiTTransformer2DModel`, *optional*):
            A weaker model of the same latents and classes. Guidance leads away from what it predicts for the same
            class (autoguidance, https://arxiv.org/abs/2406.02507), and not from the null class.
        guider (`diffusers.BaseGuidance`, *optional*):
            How predictions are combined, such as `AdaptiveProjectedGuidance`, in the place of `guidance_scale` alone.

    Raises:
        ValueError: if the components don't fit together; the message names what differs.
    """

    model_cpu_offload_seq = "transformer->guide->vae"
    _optional_components = [*OPTIONAL_COMPONENTS]
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        recommended_call: dict | None = None,
        guide: ModelMixin | None = None,
        guider: Any = None,
    ):
        super().__init__()
        parts = {"transformer": transformer, "scheduler": scheduler, "vae": vae, "guide": guide, "guider": guider}
        for name, part in parts.items():
            check_component(name, part)
        self.register_modules(**parts)
        if vae is not None and is_rae(vae):
            correct_rae(vae)
        self._check_diffusion()
        self._trained_prediction = self._scheduler_prediction()
        self._trained_alphas = getattr(scheduler, "alphas_cumprod", None)
        self._trained_timesteps = scheduler.config.get("num_train_timesteps")
        self.id2label = check_id2label(id2label)
        self._indexed_names: tuple[dict[int, str], ClassNames] | None = None
        if recommended_call is not None and not isinstance(recommended_call, Mapping):
            raise ValueError(f"`recommended_call` is {shown(recommended_call)}; it must be a dictionary.")
        with raise_value_error("`recommended_call` can't be saved"):
            json.dumps(dict(recommended_call or {}))
        self.register_to_config(id2label=self.id2label or None, recommended_call=recommended_call)
        self._check_vae()
        self._check_guide()
        self._current_timestep = None
        try:
            self.resolve_call()
        except ValueError as error:
            raise ValueError(f"`recommended_call` can't be used: {error}") from None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """
        A pipeline of this class that shares another one's components.

        Args:
            pipeline (`DiffusionPipeline`): With a `transformer`, a `scheduler`, perhaps a `vae`, a `guide` and a
                `guider`.
            kwargs: Components and arguments of the constructor that replace the pipeline's; `dtype` casts the weights.

        Returns:
            `DiTClassCondPipeline`
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"`pipeline` is a {type(pipeline).__name__}; it must be a diffusers pipeline.")
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        arguments = {name: pipeline.config[name] for name in names if name in pipeline.config} | pipeline.components
        scheduler = kwargs.pop("scheduler", None)  # the pipeline's own tells what the model was trained for
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"`dtype` is {shown(dtype)}; it must be a torch.dtype.")
        new_pipeline = cls(**({name: arguments[name] for name in names if name in arguments} | kwargs))
        if scheduler is not None:
            new_pipeline.scheduler = scheduler
        return new_pipeline if dtype is None else new_pipeline.to(dtype)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Drops `auto_map`, which only tells diffusers where the code is."""
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """
        Context manager that reserves the pipeline and its components for this thread; other threads wait. Calls,
        decoding, moving, offloading, setting components and changing adapters lock by themselves; use this to run
        several of them as one.

        Example:

            >>> from dit_hf import DiTClassCondPipeline, make_scheduler
            >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
            >>> with pipe.exclusive():
            ...     pipe.scheduler = make_scheduler("flow_heun")
            ...     image = pipe("sloth", num_inference_steps=4).images[0]
        """
        with _locked(lambda: [self, *(part for part in self.components.values() if part is not None)]):
            yield

    @contextmanager
    def _occupied(self):
        """As `exclusive`, and refused in the middle of a call, whose state in scheduler and caches would be lost."""
        with self.exclusive():
            parts = {id(part) for part in (self, *self._predictors, self.scheduler)}
            if not _IN_CALL.isdisjoint(parts):
                raise ValueError(
                    "The pipeline, or one that shares its transformer or scheduler, is in the middle of a call: a "
                    "callback must not call, optimize or restore it."
                )
            _IN_CALL.update(parts)
            try:
                yield
            finally:
                _IN_CALL.difference_update(parts)

    def __setattr__(self, name, value):
        if name in ("transformer", "scheduler", *OPTIONAL_COMPONENTS) and name in vars(self):
            if value is not None:  # to free its memory; a call asks for what it needs
                check_component(name, value)
            if name == "vae" and value is not None and is_rae(value):
                correct_rae(value)
            with _locked(lambda: [self]):
                if vars(self)[name] is None:
                    del vars(self)[name]
                    self.register_modules(**{name: value})  # or it would be missing where the pipeline is saved
                else:
                    super().__setattr__(name, value)
        else:
            super().__setattr__(name, value)

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes `model_index.json`, and beside it this file, which `trust_remote_code=True` runs."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, folder / Path(__file__).name)
        self._remove_origins(folder)
        super().save_config(folder, push_to_hub, **kwargs)

    def to_json_string(self):
        """The index, which names this file and the components' as the code, and not where they came from."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # may be a path of this machine
        index["_class_name"] = [Path(__file__).stem, type(self).__name__]
        for name in ("guide", "guider"):
            if getattr(self, name) is None:
                del index[name]
        for name in ("scheduler", "guide", "transformer"):
            part = getattr(self, name)
            auto_map = None if part is None else json.loads(part.to_json_string()).get("auto_map")
            if auto_map is not None:
                index |= {name: auto_map["AutoModel"].split("."), "auto_map": auto_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _remove_origins(self, folder):
        """Where the other components were loaded from is of no use to others, and may be a path of this machine."""
        for name in self.components:
            for file in filter(Path.is_file, (folder / name / "config.json", folder / name / "scheduler_config.json")):
                config = json.loads(file.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def is_flow_matching(self) -> bool:
        """Whether the model was trained with flow matching, by the scheduler that the pipeline was built with."""
        return self._trained_prediction == "velocity"

    @property
    def _predictors(self):
        """The models that a call evaluates."""
        return [self.transformer] if self.guide is None else [self.transformer, self.guide]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent value along one side."""
        return 1 if self.vae is None else spatial_factor(self.vae)

    @property
    def image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> id, in alphabetical order, synonyms too; a name of several classes is not in it."""
        return self._class_names().unambiguous()

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Class names to ids.

        Args:
            label (`str` or `list[str]`): One name or several; a synonym, or the whole `id2label` entry.

        Returns:
            `list[int]`

        Raises:
            ValueError: if a name is unknown, the message suggests the nearest; or if it is the name of several
            classes.
        """
        names = self._class_names()
        label = [label] if isinstance(label, str) else label
        if not isinstance(label, (list, tuple)) or not all(isinstance(name, str) for name in label):
            raise ValueError(f"`label` is {shown(label)}; it must be a class name or a list of them.")
        return [self._get_label_id(names, name) for name in label]

    def _class_names(self):
        """The index of the names, which is built again only if `id2label` has changed."""
        indexed = self._indexed_names
        if indexed is None or indexed[0] != self.id2label:
            indexed = self._indexed_names = dict(self.id2label), ClassNames(self.id2label)
        return indexed[1]

    def _get_label_id(self, names, name):
        try:
            known_id = names.find(name)
        except ValueError as error:
            raise ValueError(f"{error}; pass the id.") from None
        if known_id is not None:
            return known_id
        if not self.id2label:
            raise ValueError(f"There is no class {name!r}: this pipeline has no `id2label`; pass ids.")
        nearest = nearest_names(name, names.unambiguous())
        hint = f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else "See `pipe.labels`."
        if not nearest and len(self.id2label) <= 20:
            hint = f"There are {', '.join(map(repr, self.id2label.values()))}."
        raise ValueError(f"There is no class {name!r}. {hint}")

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep under way, for caches that skip work in a part of the trajectory; None outside of a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def _has_null_class(self):
        return self.transformer.config.class_dropout_prob > 0

    @property
    def _takes_jumps(self):
        """Whether the sampler goes over intervals, of a model that predicts the mean velocity over them."""
        return self.transformer.config.get("interval_embedding", False) and takes_jumps(self.scheduler)

    @property
    def _has_guided_jumps(self):
        """Whether guidance is in the weights of the jumps only, so that the velocity can be guided."""
        return self.transformer.config.get("guidance_in_weights") == "jumps"

    @property
    def _guidance_in_weights(self):
        trained = self.transformer.config.get("guidance_in_weights", False)
        return self._takes_jumps if self._has_guided_jumps else trained

    @property
    def _what_is_guided(self):
        """Why guidance is refused, as the start of an error's reason."""
        if self._has_guided_jumps:
            return "this model's jumps were trained with guidance"
        return "this model was trained to predict the guided velocity"

    @property
    def _velocity_hint(self):
        """How to sample with guidance if only the jumps have it in their weights, as the end of an error."""
        if not self._has_guided_jumps:
            return ""
        return ", or set a sampler of the velocity: `pipe.scheduler = dit_hf.make_scheduler('flow_euler')`"

    def resolve_call(self, guider: Any = None, **given) -> dict:
        """
        The settings that a call uses.

        Args:
            guider (`diffusers.BaseGuidance`, *optional*): That of the call; the pipeline's if not given.
            given: `num_inference_steps`, `guidance_scale`, `guidance_channels`, `guidance_interval`; None counts as
                not given.

        Returns:
            `dict`: all four settings. In order of precedence: the given ones, the guider's scale, `recommended_call`,
            50 steps at scale 4 (1.5 with a guide; 1 for a model without a null class or with guidance in its weights).
            The recommended interval is not used with a guider or a scale by noise level, and no recommended guidance
            with guided jumps. `num_jumps` of `recommended_call` replaces its steps with a sampler that takes jumps.

        Raises:
            ValueError: if a setting is unknown or out of range.
        """
        if unknown := sorted(given.keys() - CALL_DEFAULTS.keys()):
            raise ValueError(f"{unknown[0]!r} is not a setting of a call; there are {', '.join(CALL_DEFAULTS)}.")
        scale = CALL_DEFAULTS["guidance_scale"] if self.guide is None else AUTOGUIDANCE_SCALE
        takes_guidance = (self._has_null_class or self.guide is not None) and not self._guidance_in_weights
        settings = CALL_DEFAULTS | {"guidance_scale": scale if takes_guidance else 1.0}
        recommended = dict(self.config.get("recommended_call") or {})
        if unknown := sorted(map(str, recommended.keys() - {*RECOMMENDED_SETTINGS})):
            raise ValueError(f"`recommended_call` has {unknown[0]!r}; it may hold {', '.join(RECOMMENDED_SETTINGS)}.")
        jumps = recommended.pop("num_jumps", None)
        if jumps is not None:
            self._check_count("num_jumps", jumps, MAX_STEPS)
            recommended |= {"num_inference_steps": jumps} if self._takes_jumps else {}
        if self._has_guided_jumps and self._takes_jumps:  # the recommended guidance is for the velocity
            recommended = {name: value for name, value in recommended.items() if not name.startswith("guidance")}
        guider = self.guider if guider is None else guider
        if callable(recommended.get("guidance_scale")):
            raise ValueError(
                "`recommended_call` has a function as `guidance_scale`, which can't be saved; give a table."
            )
        if guider is not None:
            check_component("guider", guider)
            recommended["guidance_scale"] = getattr(guider, "guidance_scale", 1.0)
        scale_given = given.get("guidance_scale")
        if guider is not None or (scale_given is not None and not is_finite(scale_given)):
            recommended.pop("guidance_interval", None)  # these have their own
        settings |= recommended
        settings |= {name: value for name, value in given.items() if value is not None}
        table: Any = settings["guidance_scale"]
        if getattr(table, "ndim", 0) == 2 and has_values(table):  # numpy's or torch's
            settings["guidance_scale"] = table.tolist()
        if isinstance(settings["guidance_interval"], list):  # as JSON has it
            settings["guidance_interval"] = tuple(settings["guidance_interval"])
        steps = self._check_count("num_inference_steps", settings["num_inference_steps"], MAX_STEPS)
        settings["num_inference_steps"] = steps
        self._check_guidance(guider, *(settings[f"guidance_{name}"] for name in ("scale", "channels", "interval")))
        if settings["guidance_scale"] != 1 and guider is not None and not hasattr(guider, "guidance_scale"):
            raise ValueError(
                f"`guidance_scale` is {shown(settings['guidance_scale'])}, but {type(guider).__name__} has scales of "
                "its own; give them to it."
            )
        return settings

    def check_components(self) -> None:
        """Raises `ValueError` if scheduler, VAE or guide do not fit the transformer, as a call does."""
        self._check_vae()
        self._check_guide()
        self._check_scheduler(None, None, 0.0)

    def resolve_class_labels(self, class_labels) -> list[int]:
        """
        What `class_labels` takes, as ids.

        Args:
            class_labels (`int`, `str`, None, `list` of these, or a 1-D `torch.Tensor`):
                Class ids or names; None is the null class.

        Returns:
            `list[int]`

        Raises:
            ValueError: if there is none, or one is unknown or out of range.
        """
        if not has_values(class_labels):
            raise ValueError(
                f"`class_labels` is {shown(class_labels)}; a tensor of them must be a dense one of integers."
            )
        shape = getattr(class_labels, "shape", ())  # torch's and numpy's
        if any(side != 1 for side in shape[1:]):
            raise ValueError(
                f"`class_labels` has shape {tuple(shape)}; it must have one id per image. One-hot labels become ids "
                "by `.argmax(-1)`."
            )
        if hasattr(class_labels, "tolist"):
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not 0 < len(class_labels) <= MAX_IMAGES:
            given = "is empty" if len(class_labels) == 0 else f"has {len(class_labels):,} entries"
            raise ValueError(f"`class_labels` {given}; give 1 to {MAX_IMAGES:,} class ids or names.")
        names = [label for label in class_labels if isinstance(label, str)]
        ids_by_name = dict(zip(names, self.get_label_ids(names), strict=True)) if names else {}
        return [self._check_label(ids_by_name[label] if isinstance(label, str) else label) for label in class_labels]

    def _check_label(self, label):
        num_classes = self.transformer.config.num_classes
        if label is None and not all(model.config.class_dropout_prob > 0 for model in self._predictors):
            raise ValueError("`class_labels` holds None, the null class, which this model was trained without.")
        if label is None:
            return num_classes
        try:
            number = operator.index(label)
        except TypeError:
            number = None
        if number is None or isinstance(label, bool):
            raise ValueError(f"`class_labels` holds {shown(label)}; it must hold ids (int) or names (str).")
        if not 0 <= number < num_classes:
            raise ValueError(f"`class_labels` holds {number}; the model's classes are 0 to {num_classes - 1}.")
        return number

    def _check_count(self, argument, number, largest, multiple=1):
        """A whole number from 1, numpy's too, as an int."""
        try:
            count = 0 if isinstance(number, bool) else operator.index(number)
        except (TypeError, RuntimeError):  # RuntimeError: a tensor of several values
            count = 0
        if not 1 <= count <= largest or count % multiple:
            kind = "a whole number" if multiple == 1 else f"a positive multiple of {multiple} pixels,"
            raise ValueError(f"`{argument}` is {shown(number)}; it must be {kind} from {multiple} to {largest}.")
        return count

    def _check_guidance(self, guider, guidance_scale, guidance_channels, guidance_interval):
        config = self.transformer.config
        for scale in self._table_scales(guidance_scale):
            self._check_scale(scale, guider)
        if guidance_channels is not None:
            self._check_count("guidance_channels", guidance_channels, config.in_channels)
        ends = guidance_interval if isinstance(guidance_interval, (tuple, list)) else ()
        if len(ends) != 2 or not all(map(is_finite, ends)) or not 0.0 <= ends[0] < ends[1] <= 1.0:
            raise ValueError(
                f"`guidance_interval` is {shown(guidance_interval)}; it must be (start, end) with 0 ≤ start < end ≤ 1."
            )

    def _table_scales(self, guidance_scale):
        """The scales of a table by noise level, the one of a number, none of a function."""
        if callable(guidance_scale):
            return []
        if not isinstance(guidance_scale, (list, tuple)):
            return [guidance_scale]
        rows = [row if isinstance(row, (list, tuple)) and len(row) == 2 else (None, None) for row in guidance_scale]
        levels = [level for level, _ in rows]
        fit = all(is_finite(level) and 0 <= level <= 1 for level in levels)
        if not rows or not fit or len(set(map(float, levels))) < len(levels):
            raise ValueError(
                f"`guidance_scale` is {shown(guidance_scale)}; a table of it must hold pairs (noise level, scale), at "
                "least one, with different levels from 0, the data, to 1, pure noise."
            )
        return [scale for _, scale in rows]

    def _check_scale(self, scale, guider):
        """Refuses a scale; whether a guider can guide this model with it is seen from what it asks for."""
        if not is_finite(scale) or not 0 <= float(scale) <= MAX_GUIDANCE_SCALE:
            raise ValueError(
                f"`guidance_scale` is {shown(scale)}; it must be a number from 0 to {MAX_GUIDANCE_SCALE} (0 ignores "
                "the class, 1 is no guidance), or a table or a function of the noise level with such numbers."
            )
        if guider is not None:
            return
        if scale != 1 and not self._has_null_class and self.guide is None:
            raise ValueError(
                f"`guidance_scale` is {scale}, but the model was built with `class_dropout_prob=0` and has no null "
                "class to guide away from; pass `guidance_scale=1`."
            )
        if scale > 1 and self._guidance_in_weights:
            raise ValueError(
                f"`guidance_scale` is {scale}, but {self._what_is_guided} (`guidance_in_weights`) and would be guided "
                f"twice; pass `guidance_scale=1`{self._velocity_hint}."
            )

    def _scales(self, guidance_scale, schedule, guider):
        """The scale of each step; those that a function gives are checked."""
        if not callable(guidance_scale) and not isinstance(guidance_scale, (list, tuple)):
            return [float(guidance_scale)] * len(schedule)
        scheduler = self.scheduler
        if type(scheduler).__name__.startswith("EDM"):
            raise ValueError(
                f"`guidance_scale` depends on the noise level, and the timesteps of {type(scheduler).__name__} are no "
                "fractions of it; give one number."
            )
        levels = (schedule.double() / scheduler.config.get("num_train_timesteps", 1000)).tolist()
        if not callable(guidance_scale):
            return list(map(scale_schedule(guidance_scale), levels))
        scales = list(map(guidance_scale, levels))
        for scale in scales:
            self._check_scale(scale, guider)
        return list(map(float, scales))

    def _check_guider(self, guider, scales, in_interval):
        """Goes through a guider's steps without the model; refuses one that asks for what this model can't predict."""
        labels, prepared, is_changed = (torch.zeros(1), torch.ones(1)), 0, not changes_model(guider)
        hooks_before = count_hooks(self.transformer)
        prediction = torch.ones(1, self.transformer.config.in_channels, 16, 16)
        guider = copy.deepcopy(guider)
        with raise_value_error(f"{type(guider).__name__} can't guide this pipeline"):
            for step, (scale, is_guided) in enumerate(zip(scales, in_interval, strict=True)):
                set_step(guider, scale, is_guided, step, len(scales), torch.zeros(()))
                batches = guider.prepare_inputs({"class_labels": labels})
                self._check_predictions(guider, batches, labels[1])
                if len(batches) == prepared:
                    continue
                prepared = len(batches)
                for batch in batches:
                    with changed_by(guider, self.transformer):
                        is_changed |= count_hooks(self.transformer) > hooks_before
                    batch.noise_pred = prediction
                guider(batches)
        if not is_changed:
            logger.warning(
                f"{type(guider).__name__} changes the model at none of these {len(scales)} steps, and so guides as "
                "plain guidance does: give it another start and stop, or more steps; or this diffusers does not apply "
                "it."
            )

    def _check_predictions(self, guider, batches, null_labels):
        """Refuses the null class where there is none, is no need of it, or diffusers mistakes it for another."""
        names = [getattr(batch, getattr(guider, "_identifier_key", ""), "pred_uncond") for batch in batches]
        names = [name for name, batch in zip(names, batches, strict=True) if batch.class_labels is null_labels]
        if names and not self._has_null_class and self.guide is None:
            raise ValueError("it needs the null class, which this model was trained without")
        if names and self._guidance_in_weights:
            raise ValueError(f"{self._what_is_guided} and would be guided twice; omit the guider{self._velocity_hint}")
        if any(name != "pred_uncond" for name in names):
            raise ValueError(
                "where `guidance_scale` is 1, diffusers takes the null class for the perturbed model; give another one"
            )

    def _scheduler_prediction(self):
        return trained_prediction(dict(self.scheduler.config) | {"_class_name": type(self.scheduler).__name__})

    def _check_scheduler(self, timesteps, sigmas, eta):
        """Refuses a scheduler that samples something else than the model was trained for, and options it lacks."""
        self._check_diffusion()
        name, config = type(self.scheduler).__name__, self.scheduler.config
        prediction = self._scheduler_prediction()
        if prediction != self._trained_prediction:
            recipe = "flow_euler" if self._trained_prediction == "velocity" else "ddim"
            raise ValueError(
                f"{name} samples models that predict {prediction!r}, and this pipeline was built for "
                f"{self._trained_prediction!r}; `dit_hf.make_scheduler({recipe!r})` fits. DPM-Solver++ "
                "and UniPC sample flow matching with use_flow_sigmas=True and prediction_type='flow_prediction'."
            )
        try:
            inspect.signature(self.scheduler.step).bind("model_output", "timestep", "sample")
        except (AttributeError, TypeError):
            raise ValueError(f"{name} has no `step(model_output, timestep, sample)`; use another scheduler.") from None
        if not self._samples_what_was_trained():
            raise ValueError(
                f"{name} does not sample the diffusion or flow of the scheduler that this pipeline was built with "
                "(its betas, or its number of timesteps); build it with "
                f"`{name}.from_config(pipe.scheduler.config)` of that one, or by `dit_hf.make_scheduler`."
            )
        if takes_jumps(self.scheduler) and not self._takes_jumps:
            logger.warning(
                f"{name} is for models of few steps, and this one predicts a velocity only: it needs many steps, as "
                "with `dit_hf.make_scheduler('flow_euler')`."
            )
        in_latent_space = self.vae is not None or self.transformer.config.in_channels not in (1, 3)
        for option in ("clip_sample", "thresholding"):
            if config.get(option) and in_latent_space:
                raise ValueError(
                    f"{name} has {option}=True, which limits samples to the range of pixels, and this model works on "
                    f"latents; set it with {option}=False."
                )
        adds_noise = isinstance(self.scheduler, FlowMatchLCMScheduler) or name == "FlowMatchSDEScheduler"
        noise_scale = self.transformer.config.get("noise_scale", 1.0)
        if noise_scale != 1 and (adds_noise or config.get("stochastic_sampling")):
            raise ValueError(
                f"{name} adds noise of standard deviation 1 between steps, and the model was trained with "
                f"{noise_scale}; use a sampler without noise, such as 'flow_heun'."
            )
        if config.get("use_dynamic_shifting"):
            raise ValueError(f"{name} has use_dynamic_shifting=True, which is for text-to-image; set a fixed shift.")
        if takes_variance(self.scheduler) and not self.transformer.config.get("learn_sigma", False):
            raise ValueError(
                f"{name} has variance_type={config.variance_type!r}, but the model predicts no variance "
                "(`learn_sigma=False`); use variance_type='fixed_large'."
            )
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if timesteps is not None and sigmas is not None:
            raise ValueError("`timesteps` and `sigmas` were both given; a schedule is one or the other.")
        for argument, schedule in (("timesteps", timesteps), ("sigmas", sigmas)):
            if schedule is None:
                continue
            # EDMEulerScheduler's `sigmas` are positions on its own schedule, not sigmas.
            if argument not in accepted or name == "EDMEulerScheduler":
                raise ValueError(f"`{argument}` was given, but {name} takes no custom {argument}.")
            self._check_given_schedule(argument, schedule)
        if not is_finite(eta) or not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {shown(eta)}; it must be a number from 0 to 1.")
        if eta != 0 and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"`eta` is {eta}, but {name} has no such parameter; leave it at 0.")

    def _check_diffusion(self):
        """Refuses a scheduler whose `alphas_cumprod` leave [0, 1] or are not one per training timestep."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        check_train_timesteps(name, config)
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        fits = alphas is None or alphas.shape == (config.get("num_train_timesteps", 1000),)
        if not fits or (alphas is not None and not ((alphas >= 0) & (alphas <= 1)).all()):  # nor is NaN
            options = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
            betas = ", ".join(f"{option}={str(config.get(option))[:100]}" for option in options)
            raise ValueError(f"{name} has {betas}; betas must be numbers from 0 to 1, one per training timestep.")

    def _check_given_schedule(self, argument, schedule):
        """Refuses a caller's timesteps or sigmas that are not finite numbers, descending from at most the first."""
        values = schedule.tolist() if hasattr(schedule, "tolist") and has_values(schedule) else schedule
        given = f"`{argument}` is {shown(values)}"
        if (
            not isinstance(values, (list, tuple))
            or not all(map(is_finite, values))
            or not 0 < len(values) <= MAX_STEPS
        ):
            raise ValueError(f"{given}; it must be a list of 1 to {MAX_STEPS} finite numbers.")
        largest = self.scheduler.config.get("num_train_timesteps", math.inf) if argument == "timesteps" else math.inf
        descending = all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
        if not descending or values[0] > largest or values[-1] < 0:
            raise ValueError(
                f"{given}; it must be descending, without repetitions, "
                + ("down to 0 at the lowest." if largest == math.inf else f"from at most {largest} to 0.")
            )

    def _check_schedule(self, num_inference_steps):
        """Refuses a schedule that the scheduler can't run: one that divides by zero or goes beyond its tables."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        schedule, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
        if not all(torch.isfinite(torch.as_tensor(table)).all() for table in (schedule, sigmas) if table is not None):
            raise ValueError(f"{name} makes a schedule that is not finite, with the config {dict(scheduler.config)}.")
        # diffusers' scheduler of flow maps takes timesteps this close for one another.
        if _takes_interval(scheduler) and (schedule.diff().abs() <= 2 * TIMESTEP_TOLERANCE).any():
            raise ValueError(
                f"{name} has timesteps closer than {2 * TIMESTEP_TOLERANCE}, which it can't tell apart: give fewer "
                "steps, and its config num_train_timesteps=1000."
            )
        # Solvers in the logarithm of the signal-to-noise ratio divide by its differences; some allow for none.
        repeated = hasattr(scheduler, "lambda_t") and (torch.as_tensor(sigmas).diff() == 0).any()
        if repeated and not self._stays_finite():
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, with which {name} visits a noise level twice and "
                "divides by zero; give fewer than the training's "
                f"{scheduler.config.get('num_train_timesteps')}, or descending `timesteps`."
            )
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if sigmas is None and alphas is not None and not ((schedule >= 0) & (schedule < len(alphas))).all():
            raise ValueError(
                f"{name} starts at timestep {int(schedule.max())}, and the model was trained up to {len(alphas) - 1}; "
                "its steps_offset or the number of steps is too large."
            )

    def _stays_finite(self):
        """Whether the schedule, run on one value, ends in a number."""
        scheduler, sample = copy.deepcopy(self.scheduler), torch.ones(1, 1, 1, 1)
        options = self._step_options(generator=torch.Generator())  # not the caller's, nor the global one
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample, **options)[0]
        return bool(torch.isfinite(sample).all())

    def _step_options(self, **options):
        """Those that the scheduler's `step` takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in options.items() if name in accepted}

    def _samples_what_was_trained(self):
        """Whether timesteps, and for diffusion betas, are those of the scheduler that the pipeline was built with."""
        timesteps = self.scheduler.config.get("num_train_timesteps")
        if None not in (timesteps, self._trained_timesteps) and timesteps != self._trained_timesteps:
            return False
        if self.is_flow_matching or self._trained_alphas is None:
            return True
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        return alphas is not None and torch.allclose(alphas.cpu(), self._trained_alphas.cpu(), rtol=1e-3, atol=1e-6)

    def _check_vae(self):
        """Refuses a VAE whose latents are not the transformer's."""
        channels = None if self.vae is None else latent_channels(self.vae)
        if channels is not None and channels != self.transformer.config.in_channels:
            raise ValueError(
                f"The VAE has {channels} latent channels and the transformer {self.transformer.config.in_channels}; "
                "they don't belong together."
            )
        if self.vae is not None and is_rae(self.vae):
            grid, size = math.isqrt(self.vae.num_patches), self.transformer.config.sample_size
            if grid != size:
                raise ValueError(
                    f"The VAE has latents of {grid}×{grid} and the transformer of {size}×{size}; they don't belong "
                    "together."
                )
        if self.vae is None or is_rae(self.vae):
            return
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            value, per_channel = self.vae.config.get(name), name.startswith("latents_")
            values = value if isinstance(value, (list, tuple)) else [value]
            fits = isinstance(value, (list, tuple)) == per_channel and all(map(is_finite, values))
            fits = fits and (name not in ("scaling_factor", "latents_std") or all(each > 0 for each in values))
            if value is not None and not (fits and len(values) == (channels or len(values) if per_channel else 1)):
                allowed = f"{channels or ''} finite numbers" if per_channel else "a finite number"
                allowed += ", above 0" if name in ("scaling_factor", "latents_std") else ""
                raise ValueError(f"The VAE's config has {name}={str(value)[:100]}; it must be {allowed}.")

    def _check_guide(self):
        """Refuses a guide that predicts something else than the transformer."""
        if self.guide is not None:
            check_guide(self.guide.config, self.transformer.config)

    def _check_encoder_refresh(self, steps, guider):
        """The number of steps of one encoder state; refused where there is none, or another reuse beside it."""
        steps = self._check_count("encoder_refresh_steps", steps, MAX_STEPS)
        reasons = {
            f"{type(self.transformer).__name__} has no encoder": "num_encoder_layers" not in self.transformer.config,
            "the pipeline has a guide, which is weaker by itself": self.guide is not None,
            "a guider decides what is predicted": guider is not None,
            "a cache of blocks is enabled": getattr(self.transformer, "is_cache_enabled", False),
        }
        if steps > 1 and any(reasons.values()):
            reason = next(reason for reason, holds in reasons.items() if holds)
            raise ValueError(f"`encoder_refresh_steps` is {steps}, but {reason}; leave it at 1.")
        return steps

    def _check_generator(self, generator, count):
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} images; pass one per image.")
        for each in generator if isinstance(generator, list) else [generator]:
            if not isinstance(each, torch.Generator) and generator is not None:
                raise ValueError(f"`generator` is a {type(each).__name__}; it must be a torch.Generator or a list.")

    def _check_size(self, height, width, latents, batch_size):
        """The shape of the latents that the arguments ask for; those given are finite."""
        is_tensor = isinstance(latents, torch.Tensor) and has_values(latents)
        if latents is not None and not (is_tensor and latents.is_floating_point()):
            given = latents.dtype if is_tensor else type(latents).__name__
            raise ValueError(
                f"`latents` is a {given}; it must be a dense floating-point torch.Tensor of 16 bits or more."
            )
        config = self.transformer.config
        factor = self.vae_scale_factor
        patch_size = math.lcm(*(model.config.patch_size for model in self._predictors))
        sizes = {"height": height, "width": width}
        multiple = factor * patch_size
        for argument, pixels in sizes.items():
            sizes[argument] = None if pixels is None else self._check_count(argument, pixels, MAX_SIDE, multiple)
        if latents is not None and height is None and width is None and latents.ndim == 4:
            sizes = dict(zip(sizes, (side * factor for side in latents.shape[-2:]), strict=True))
        sides = [(pixels or config.sample_size * factor) // factor for pixels in sizes.values()]
        shape = (batch_size, config.in_channels, *sides)
        self._check_grid(*sides)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; these arguments need {shape}.")
        if math.prod(shape) > MAX_LATENT_VALUES:
            raise ValueError(
                f"`class_labels`, `num_images_per_label`, `height` and `width` ask for latents of {shape}; one call "
                f"makes at most {MAX_LATENT_VALUES:,} values."
            )
        if any(side % patch_size for side in sides):
            raise ValueError(f"`latents` of {sides[0]}×{sides[1]} are not divisible by patches of {patch_size}.")
        if latents is not None:
            self._check_finite("given latents", latents, "They must be finite numbers.")
        return shape

    def _check_grid(self, height, width):
        """Refuses latents of another size than the one of an `AutoencoderRAE`."""
        grid = math.isqrt(self.vae.num_patches) if self.vae is not None and is_rae(self.vae) else None
        if grid is not None and (height, width) != (grid, grid):
            raise ValueError(
                f"The latents are {height}×{width}, and the AutoencoderRAE's {grid}×{grid}; it has no other size."
            )

    def _check_output(self, output_type):
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {shown(output_type)}; it must be 'pil', 'np', 'pt' or 'latent'.")
        channels = self.transformer.config.in_channels
        if self.vae is None and output_type != "latent" and channels not in (1, 3):
            raise ValueError(
                f"`output_type` is {output_type!r}, but this pipeline has no VAE and its model's {channels} channels "
                "are not an image; pass `output_type='latent'`, or set `vae`."
            )

    def _check_callback(self, callback, names):
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` is {shown(callback)}; it must be callable.")
        allowed = self._callback_tensor_inputs
        if not isinstance(names, (list, tuple)) or not all(name in allowed for name in names):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {shown(names)}; it must be a list of {allowed}."
            )

    @property
    def _execution_device(self):
        """Where models run; diffusers takes a millisecond to find it, and where nothing has hooks the weights tell."""
        models = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        if any(has_hooks(model) for model in models):
            return getattr(super(), "_execution_device", self.device)
        devices = [parameter.device for model in models for parameter in islice(model.parameters(), 1)]
        return next((device for device in devices if device.type not in ("cpu", "meta")), devices[0])

    @contextmanager
    def _trajectory(self):
        """Resets timestep, block caches and offloaded models when a trajectory ends, is interrupted or fails."""
        scheduler = self.scheduler
        variance_type = scheduler.config.get("variance_type")
        # Solvers that got it from a DDPM would cut the prediction down to three channels.
        hides_variance = variance_type in LEARNED_VARIANCE and not takes_variance(scheduler)
        self._trajectory_thread = threading.get_ident()
        try:
            if hides_variance:
                scheduler.register_to_config(variance_type=None)
            yield
        finally:
            if hides_variance:
                scheduler.register_to_config(variance_type=variance_type)
            self._current_timestep = self._trajectory_thread = None
            self.maybe_free_model_hooks()  # resets caches too

    def _set_timesteps(self, num_inference_steps, timesteps, sigmas, device):
        """The scheduler's own spacing, the caller's, or for flow matching N equal steps from noise to data."""
        scheduler = self.scheduler
        if timesteps is not None:
            scheduler.set_timesteps(timesteps=timesteps, device=device)
        elif sigmas is not None:
            if isinstance(scheduler, UniPCMultistepScheduler):
                sigmas = torch.tensor(sigmas, dtype=torch.float64).numpy()  # it multiplies them
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        elif isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)):
            sigmas = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            # It takes no sigmas; its own spacing would waste a step between 1/1000 and 0.
            sigma_min, scheduler.sigma_min = scheduler.sigma_min, 1.0 / num_inference_steps
            try:
                scheduler.set_timesteps(num_inference_steps, device=device)
            finally:
                scheduler.sigma_min = sigma_min
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # looking the first timestep up fails where it occurs twice
        return scheduler.timesteps

    def _check_strength(self, strength, image):
        """The part of the steps that is run; 1 without an image."""
        if image is None and strength is not None:
            raise ValueError(f"`strength` is {shown(strength)}, but no `image` was given; give both or neither.")
        strength = (DEFAULT_STRENGTH if image is not None else 1) if strength is None else strength
        if not is_finite(strength) or not 0 < float(strength) <= 1:
            raise ValueError(f"`strength` is {shown(strength)}; it must be a number above 0, at most 1.")
        adds_noise = any(hasattr(self.scheduler, name) for name in ("scale_noise", "add_noise"))
        if strength < 1 and (type(self.scheduler).__name__ in NO_IMAGE_TO_IMAGE or not adds_noise):
            raise ValueError(
                f"`image` was given, but {type(self.scheduler).__name__} begins with pure noise only; use another "
                "scheduler, such as 'dpm++' or 'flow_euler' of `dit_hf.make_scheduler`."
            )
        return float(strength)

    def _in_interval(self, guidance_interval, scales, guider, first):
        """Whether each step may be guided; warns if an interval guides none of the steps that run, from `first` on."""
        may_guide, count = guider is None or getattr(guider, "_enabled", True), len(scales)
        start, end = guidance_interval
        in_interval = [may_guide and start <= step / count < end for step in range(count)]
        wanted = [step for step in range(first, count) if scales[step] != 1]
        if wanted and not any(in_interval[step] for step in wanted):
            logger.warning(
                f"`guidance_interval` {guidance_interval} guides none of the {count - first} steps that run, "
                f"{first} to {count - 1} of {count}."
            )
        return in_interval

    def _encode_init_image(self, image, shape, count):
        """Latents of a shape, of the images to start from, each `count` times."""
        is_tensor = isinstance(image, torch.Tensor) and has_values(image) and image.ndim == 4
        channels, sides = shape[1], [side * self.vae_scale_factor for side in shape[2:]]
        are_pixels = self.vae is None and channels in (1, 3)
        if is_tensor and image.shape[1:] == shape[1:] and not are_pixels:
            encoded = image.float().to(self._execution_device)
            self._check_finite("given latents", encoded, "They must be finite numbers.")
        else:
            encoded = self.encode_images(image, *sides)
        labels = shape[0] // count
        if encoded.shape[1:] != shape[1:] or len(encoded) not in (1, labels):
            raise ValueError(
                f"`image` gives latents {tuple(encoded.shape)} for {labels} labels; these arguments need one, or one "
                f"per label, of {tuple(shape[1:])}."
            )
        return encoded.expand(labels, *shape[1:]).repeat_interleave(count, dim=0)

    def _first_step(self, strength, evaluations):
        """The index of the first evaluation that a strength leaves, of a scheduler that may need several a step."""
        order = getattr(self.scheduler, "order", 1)
        steps = -(-evaluations // order)
        left = int(steps * strength + 1e-6)  # products of decimals may miss a whole number by their rounding
        if left < 1:
            raise ValueError(
                f"`strength` is {strength}, which leaves none of {steps} steps; give more steps or a strength of at "
                f"least {1 / steps:.6f}."
            )
        return (steps - left) * order

    def _prepare_latents(self, shape, latents, generator, device, start=None, first=0):
        """Unit noise (drawn or given) at the scheduler's starting scale, float32; or images with noise of a step."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * self.transformer.config.get("noise_scale", 1.0)
        if start is None:
            return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        timesteps = self.scheduler.timesteps[first : first + 1].expand(len(latents))
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            return self.scheduler.scale_noise(start, timesteps, latents)
        return self.scheduler.add_noise(start, latents, timesteps.to(device))

    def _position(self, index, schedule):
        """Where the trajectory is, for caches of blocks."""
        position = {"timestep": schedule[index], "step_index": index, "num_inference_steps": len(schedule)}
        has_sigmas = hasattr(self.scheduler, "sigmas")
        return position | {"sigma": float(self.scheduler.sigmas[index])} if has_sigmas else position

    def _interval_ends(self):
        """
        The timesteps `(S,)` at which the intervals of a schedule's steps end, for a model that predicts the mean
        velocity over an interval: the next timestep for a scheduler of flow maps, the data for one that adds noise
        again. Any other integrates the velocity itself, as with other models, and None is returned.
        """
        schedule = self.scheduler.timesteps
        if not self._takes_jumps:
            return None
        if isinstance(self.scheduler, FlowMatchLCMScheduler):
            return torch.zeros_like(schedule)
        return torch.cat([schedule[1:], schedule.new_zeros(1)])

    def _predict(
        self, guidance, model_input, class_labels, times, guidance_channels=None, position=None, encoder_cache=None
    ):
        """
        What the scheduler steps by, `(B, C, H, W)` or with the variance that it takes `(B, 2C, H, W)`, float32: the
        first channels as a guider combines the predictions it asks for, the rest of the conditional one.
        """
        channels = model_input.shape[1]
        count = guidance_channels or channels
        null_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
        batches = guidance.prepare_inputs({"class_labels": (class_labels, null_labels)})
        evaluate = partial(self._evaluate, times=times, position=position)
        if self.guide is None and not changes_model(guidance):
            # Unconditional first: the order diffusers' caches expect.
            labels = torch.cat([batch.class_labels for batch in reversed(batches)])
            inputs, context = torch.cat([model_input] * len(batches)), "guided" if len(batches) > 1 else "conditional"
            outputs = evaluate(self.transformer, inputs, labels, context=context, encoder_cache=encoder_cache).chunk(
                len(batches)
            )
            outputs = outputs[::-1]
        else:
            outputs = [
                self._evaluate_alone(guidance, batch, index, class_labels, null_labels, model_input, evaluate)
                for index, batch in enumerate(batches)
            ]
        for batch, output in zip(batches, outputs, strict=True):
            batch.noise_pred = output[:, :count]
        output = torch.cat([guidance(batches)[0], outputs[0][:, count:]], dim=1)
        return output if takes_variance(self.scheduler) else output[:, :channels]

    def _evaluate_alone(self, guidance, batch, index, class_labels, null_labels, model_input, evaluate):
        """One of a guider's predictions: by the guide in the place of the null class, or by a model it has changed."""
        is_null = batch.class_labels is null_labels
        with changed_by(guidance, self.transformer):
            if is_null and self.guide is not None:
                return evaluate(self.guide, model_input, class_labels, context="guide")
            context = "unconditional" if is_null else "perturbed" if index else "conditional"
            return evaluate(self.transformer, model_input, batch.class_labels, context=context)

    @staticmethod
    def _evaluate(model, model_input, class_labels, times, context, position=None, encoder_cache=None):
        """What a model predicts, float32; its encoder's state is read from `encoder_cache`, or written to it."""
        times = {name: time.expand(len(model_input)) for name, time in times.items() if time is not None}
        if "kwargs" not in inspect.signature(model.cache_context).parameters:
            position = None  # before diffusers 0.41 caches don't ask
        with model.cache_context(context, **(position or {})):
            inputs = {"hidden_states": model_input.to(input_dtype(model)), "class_labels": class_labels}
            output = model(**inputs, return_dict=False, **times, **(encoder_cache or {}))
        if encoder_cache is not None:
            encoder_cache["encoder_state"] = output[1]
        return output[0].float()

    @torch.no_grad()
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        """
        Decodes what a call with `output_type="latent"` returns.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Latents as the transformer works on them.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"` (values in [0, 1]).
            generator (`torch.Generator` or `list`, *optional*): For decoders that sample, such as a consistency
            decoder.

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` of shape `(B, height, width, 3)` or `torch.Tensor` of shape
            `(B, 3, height, width)`.

        Raises:
            ValueError: if an image has values that are not finite.
        """
        if isinstance(latents, torch.Tensor) and has_values(latents):
            latents = latents.to(self._execution_device)
        return self._decode_latents(latents, output_type, generator)

    def _decode_latents(self, latents, output_type, generator):
        """As `decode_latents`, of latents that are on the right device."""
        self._check_output(output_type)
        if output_type == "latent":
            raise ValueError("`output_type` is 'latent'; decoded images are 'pil', 'np' or 'pt'.")
        channels = self.transformer.config.in_channels
        is_tensor = isinstance(latents, torch.Tensor) and has_values(latents)
        if not is_tensor or latents.ndim != 4 or latents.shape[1] != channels:
            given = tuple(latents.shape) if is_tensor else type(latents).__name__
            raise ValueError(f"`latents` is {given}; it must be a dense tensor (batch, {channels}, height, width).")
        self._check_vae()
        self._check_grid(*latents.shape[-2:])
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._check_generator(generator, len(latents))
        self._check_finite("given latents", latents, "They must be finite numbers.")
        if self.vae is None:
            return self.image_processor.postprocess(latents, output_type=output_type)
        latents = self._denormalize(latents.float())
        generators = [each for each in (generator if isinstance(generator, list) else [generator]) if each is not None]
        states = [each.get_state() for each in generators]

        def decode():
            for each, state in zip(generators, states, strict=True):
                each.set_state(state)  # a decoder that samples gets the same noise in a second pass
            return self._decode(latents, generator)

        images = self._without_overflow(decode)
        self._check_finite("decoded images", images)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _without_overflow(self, run):
        """What a pass of the VAE gives; if it overflows in the VAE's type, that of a second pass in float32."""
        output, dtype = run(), input_dtype(self.vae)
        if dtype == torch.float32 or torch.isfinite(output).all():
            return output
        logger.warning(f"The VAE overflows in {dtype}; it is run in float32.")
        torch.nn.Module.to(self.vae, torch.float32)  # diffusers' own warns of what it does not do here
        try:
            return run()
        finally:
            torch.nn.Module.to(self.vae, dtype)

    def _denormalize(self, latents):
        """Latents as the VAE decodes them; an `AutoencoderRAE` does the most by itself."""
        if is_rae(self.vae):
            return latents * rae_scale(self.vae).to(latents.device)
        config = self.vae.config
        latents = latents / (config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
            )
            latents = latents * std + mean
        return latents + (config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def encode_images(self, image: Any, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """
        Encodes images as the latents that the transformer works on; `decode_latents` is the way back.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a `list` of these):
                PIL images of any mode, on white where they are transparent; arrays `(B, height, width, 3)` and tensors
                `(B, 3, height, width)` with values in [0, 1]. Images of another size or shape are resized.
            height, width (`int`, *optional*): Pixels; the model's own size if not given.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32: the mean where the encoder predicts a distribution.

        Raises:
            ValueError: if `image` can't be read or encoded.
        """
        size = self.transformer.config.sample_size * self.vae_scale_factor
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        sides = {"height": size if height is None else height, "width": size if width is None else width}
        sides = {name: self._check_count(name, pixels, MAX_SIDE, multiple) for name, pixels in sides.items()}
        images = image if isinstance(image, (list, tuple)) else [image]
        if all(hasattr(each, "convert") for each in images):  # PIL's
            image = [on_white(each) for each in images]
        with raise_value_error("`image` can't be read; give a PIL image, an array, a tensor, or a list of these"):
            pixels = self.image_processor.preprocess(image, **sides)
        channels = self.transformer.config.in_channels if self.vae is None else self.vae.config.get("in_channels", 3)
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ValueError(
                f"`image` has shape {tuple(pixels.shape)}; it must be (batch, {channels}, height, width)."
            )
        if not -1 <= float(pixels.min()) <= float(pixels.max()) <= 1:
            raise ValueError("`image` has values beyond [0, 1] or that are not finite; divide 8-bit values by 255.")
        pixels = pixels.to(self._execution_device)
        if self.vae is None:
            return pixels.float()
        if not callable(getattr(self.vae, "encode", None)):
            raise ValueError(f"`image` was given, but {type(self.vae).__name__} has no encoder.")
        latents = self._without_overflow(lambda: self._encode(pixels.to(self.vae.dtype)))
        self._check_finite("latents of the given images", latents, "The VAE overflows; load it in float32.")
        return latents

    def _encode(self, pixels):
        """Latents as the transformer works on them, float32, of pixels in [-1, 1]."""
        if is_rae(self.vae):
            return (self.vae.encode((pixels + 1) / 2).latent / rae_scale(self.vae).to(pixels)).float()
        output = self.vae.encode(pixels)
        latents = output.latent_dist.mode() if "latent_dist" in output else output[0]
        return self._normalize(latents.float())

    def _normalize(self, latents):
        """The inverse of `_denormalize`, of a VAE that does not normalise by itself."""
        one, zero = (latents.new_full((1, latents.shape[1], 1, 1), value) for value in (1, 0))
        shift = self._denormalize(zero)
        return (latents - shift) / (self._denormalize(one) - shift)

    def _decode(self, latents, generator):
        """Pixels in [-1, 1]."""
        takes_generator = "generator" in inspect.signature(self.vae.decode).parameters
        options = {"generator": generator} if takes_generator else {}
        pixels = self.vae.decode(latents.to(input_dtype(self.vae)), return_dict=False, **options)[0].float()
        return 2 * pixels - 1 if is_rae(self.vae) else pixels

    def _check_finite(self, what, values, hint=OVERFLOW_HINT, overflows=False):
        bad = ~torch.isfinite(values).flatten(1).all(dim=1) | overflows
        if bad.any():
            raise ValueError(f"The {what} {bad.nonzero().flatten().tolist()} are not finite. {hint}")

    @torch.no_grad()
    @partial(one_at_a_time, hold="_occupied")
    def __call__(
        self,
        class_labels: int | str | None | Sequence[int | str | None] | torch.Tensor,
        guidance_scale: float | Sequence[tuple[float, float]] | Callable[[float], float] | None = None,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_label: int = 1,
        eta: float = 0.0,
        output_type: str = "pil",
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        return_dict: bool = True,
        encoder_refresh_steps: int = 1,
        guider: Any = None,
        image: Any = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images of the given classes. Calls from several threads wait for each other; a callback must not call
        the pipeline.

        Args:
            class_labels (`int`, `str`, None, `list` of these, or `torch.Tensor` of shape `(B,)`):
                Class ids or names (see `labels`); None is the null class.
            guidance_scale (`float`, `list` of pairs or `Callable`, *optional*):
                Scale of classifier-free guidance, or of autoguidance if the pipeline has a guide, from 0 to 1000. 1
                disables guidance; 0 gives the prediction without a class, or the guide's. A list of pairs (noise
                level, scale) is interpolated linearly; a function is called with the noise level, from 1 for pure
                noise to 0 for the data (the timestep over `num_train_timesteps`). The pipeline's recommended scale if
                not given (see `resolve_call`), as the next three.
            guidance_channels (`int`, *optional*):
                How many of the first channels are guided. The paper's results guide 3 of 4.
            guidance_interval (`tuple[float, float]`, *optional*):
                Guidance is applied from `start` to before `end`, as fractions of the model evaluations. Outside, only
                the prediction for the class is computed. The recommended one is not used with a guider, a
                scale by noise level, or a `strength` below 1.
            num_inference_steps (`int`, *optional*): Steps; the scheduler's spacing.
            timesteps (`list[int]`, *optional*): Timesteps in place of the scheduler's own, if it takes them.
            sigmas (`list[float]`, *optional*):
                Sigmas in place of the scheduler's own, if it takes them; with a last 0 where it wants one.
            generator (`torch.Generator` or `list`, *optional*):
                One, or one per image: then each image depends on its own generator only.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Unit noise to start from.
            height, width (`int`, *optional*): Pixels; the model's own size if not given.
            num_images_per_label (`int`, defaults to 1): Images of each label, one after the other.
            eta (`float`, defaults to 0.0): DDIM's eta, for schedulers that have it.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` (values in [0, 1]) or `"latent"`.
            callback_on_step_end (`Callable`, *optional*):
                `f(pipe, step, timestep, tensors) -> tensors`, called after each step; None changes nothing.
            callback_on_step_end_tensor_inputs (`list[str]`): Which of `latents`, `class_labels` it gets.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput`.
            encoder_refresh_steps (`int`, defaults to 1):
                For models with an encoder (DDT): it runs once in this many evaluations of the model, and those between
                take the state of the last one, which saves the larger part of their time.
            guider (`diffusers.BaseGuidance`, *optional*):
                Combines the predictions in the place of the pipeline's `guider`, or of plain guidance by
                `guidance_scale`, which sets the scale of a guider that has one. `guidance_channels` and
                `guidance_interval` hold for it as well. The call works on a copy of it.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a `list` of these, *optional*):
                Images to start from in the place of pure noise, as `encode_images` takes them, or their latents `(B,
                C, H, W)`: one, or one per label.
            strength (`float`, *optional*):
                With `image`, the part of the steps that is run, above 0, at most 1; 0.8 if not given. 1 ignores the
                image. `guidance_interval` and a guider's start and stop are counted on all steps.

        Returns:
            `ImagePipelineOutput` or `tuple`: `images`.

        Raises:
            ValueError: if an argument is out of range or contradicts another, before any compute; or if the latents or
                images are not finite at the end; the message has their indices.

        Example:

            >>> from dit_hf import DiTClassCondPipeline
            >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
            >>> images = pipe(["red apple", "sloth"], num_inference_steps=4).images
            >>> images[0].size
            (64, 64)
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check everything before any compute
        class_ids = self.resolve_class_labels(class_labels)
        count = self._check_count("num_images_per_label", num_images_per_label, MAX_IMAGES)
        strength = self._check_strength(strength, image)
        settings = self.resolve_call(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            # The recommended one may lie before the first step that runs.
            guidance_interval=(0.0, 1.0) if strength < 1 and guidance_interval is None else guidance_interval,
            guider=guider,
        )
        guider = self.guider if guider is None else guider
        num_inference_steps = settings["num_inference_steps"]
        guidance_channels, guidance_interval = settings["guidance_channels"], settings["guidance_interval"]
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._check_generator(generator, len(class_ids) * count)
        for name, model in zip(("transformer", "guide"), self._predictors, strict=False):
            if model.training and model.config.class_dropout_prob > 0:
                raise ValueError(f"The {name} is in training mode and drops labels; call `pipe.{name}.eval()`.")
        self._check_output(output_type)
        self._check_vae()
        self._check_guide()
        self._check_scheduler(timesteps, sigmas, eta)
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        encoder_refresh_steps = self._check_encoder_refresh(encoder_refresh_steps, guider)
        shape = self._check_size(height, width, latents, len(class_ids) * count)
        class_ids = [label for label in class_ids for _ in range(count)]
        self._interrupt = False

        # 2. Prepare schedule, labels and noise
        device = self._execution_device
        # The schedule stays on the CPU with the scheduler's tables: looking up a timestep on a GPU would synchronise,
        # and some are float64, which not every device has. The model's copy is moved once.
        with raise_value_error(f"{type(self.scheduler).__name__} can't make this schedule"):
            schedule = self._set_timesteps(num_inference_steps, timesteps, sigmas, "cpu")
        self._check_schedule(num_inference_steps)
        first = self._first_step(strength, len(schedule))
        scales = self._scales(settings["guidance_scale"], schedule, guider)
        in_interval = self._in_interval(guidance_interval, scales, guider, first)
        guidance = ScaleGuidance() if guider is None else copy.deepcopy(guider)
        if guider is not None:
            self._check_guider(guider, scales, in_interval)
        init_latents = None if image is None else self._encode_init_image(image, shape, count)
        model_schedule = schedule.float().to(device)
        interval_ends = self._interval_ends()
        interval_ends = [None] * len(schedule) if interval_ends is None else interval_ends.float().to(device)
        self._num_timesteps = len(schedule) - first
        class_labels = torch.tensor(class_ids, device=device)
        latents = self._prepare_latents(
            shape, latents, generator, device, init_latents if strength < 1 else None, first
        )
        step_options = self._step_options(eta=eta, generator=generator, return_dict=False)

        for index in range(first):  # a guider that averages over the steps begins with the first
            set_step(guidance, scales[index], in_interval[index], index, len(schedule), schedule[index])
            guidance.prepare_inputs({"class_labels": (class_labels, class_labels)})

        # 3. Denoise
        overflows = torch.zeros(len(latents), dtype=torch.bool, device=device)
        encoder_cache: dict | None = {} if encoder_refresh_steps > 1 else None
        with self._trajectory():
            with self.progress_bar(total=self._num_timesteps) as progress_bar:
                for index, timestep in enumerate(schedule[first:], start=first):
                    if self._interrupt:
                        break
                    self._current_timestep = timestep
                    self._guidance_scale = CurrentScale(scales[index])
                    if encoder_cache is not None and (index - first) % encoder_refresh_steps == 0:
                        encoder_cache.clear()
                        # The encoder's state is of both predictions if any step that takes it is guided.
                        steps = range(index, min(index + encoder_refresh_steps, len(schedule)))
                        guidance.keeps_both = any(in_interval[step] and scales[step] != 1 for step in steps)
                    set_step(guidance, scales[index], in_interval[index], index, len(schedule), timestep)
                    model_input = latents
                    if hasattr(self.scheduler, "scale_model_input"):
                        model_input = self.scheduler.scale_model_input(latents, timestep)
                    position = self._position(index, model_schedule)
                    times = {"timestep": model_schedule[index], "r_timestep": interval_ends[index]}
                    output = self._predict(
                        guidance, model_input, class_labels, times, guidance_channels, position, encoder_cache
                    )
                    overflows |= ~torch.isfinite(output).flatten(1).all(dim=1)  # a scheduler that clips would hide it
                    latents = self.scheduler.step(output, timestep, latents, **step_options)[0]
                    if callback_on_step_end is not None:
                        given = {"latents": latents, "class_labels": class_labels}
                        tensors = {name: given[name] for name in callback_on_step_end_tensor_inputs}
                        outputs = callback_on_step_end(self, index - first, timestep, tensors) or {}
                        check_callback_outputs(outputs)
                        latents = outputs.get("latents", latents)
                        class_labels = outputs.get("class_labels", class_labels)
                        has_new_scale = not isinstance(self._guidance_scale, CurrentScale)  # set to end guidance
                        if has_new_scale:
                            scales[index:] = [self._guidance_scale] * (len(scales) - index)
                        if encoder_cache is not None and (has_new_scale or class_labels is not given["class_labels"]):
                            encoder_cache.clear()
                        if len(latents) != len(overflows):  # the callback alone knows which of them are left
                            overflows = torch.zeros(len(latents), dtype=torch.bool, device=device)
                    progress_bar.update()
            self._check_finite("latents", latents, overflows=overflows)

            # 4. Decode
            images = latents if output_type == "latent" else self._decode_latents(latents, output_type, generator)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


# Whatever moves or changes the weights, diffusers' methods too.
for _name in (
    *(
        "to",
        "decode_latents",
        "encode_images",
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_group_offload",
    ),
    *("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "enable_lora", "disable_lora"),
    *("set_adapters", "delete_adapters", "set_lora_device"),
):
    setattr(DiTClassCondPipeline, _name, one_at_a_time(getattr(DiTClassCondPipeline, _name)))
