"""Class-conditional image generation with a Diffusion Transformer, any diffusers scheduler and any VAE.

Shapes: `B` images, `C` channels, `H W` latent size.

The file is self-contained: it imports torch and diffusers only, so that it is also the code a Hub repository carries.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel as StockDiTTransformer2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import FasterCacheConfig
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.image_processor import VaeImageProcessor
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
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


try:
    # The loader for pipelines whose only adapted part is the transformer; nothing in it is Sana's.
    from diffusers.loaders import SanaLoraLoaderMixin as LoraLoaderMixin
except ImportError:  # diffusers has none without transformers

    class LoraLoaderMixin:  # type: ignore[no-redef]
        """Adapters need transformers and peft."""


logger = logging.get_logger(__name__)

LEARNED_VARIANCE = ("learned", "learned_range")
# Steps × classes whose modulation is held at a time: 200 MB for XL/2 in float32.
MODULATION_ROWS = 256
BUNDLED = Path(__file__).parent / "bundled"


def _is_flow_matching(scheduler):
    """Whether a scheduler samples flow-matching models; the others sample diffusion models."""
    flow_sigmas = scheduler.config.get("prediction_type") == "flow_prediction" or scheduler.config.get(
        "use_flow_sigmas"
    )
    return type(scheduler).__name__.startswith("FlowMatch") or bool(flow_sigmas)


def _correct_stock_model(transformer):
    """Diffusers' own DiT computes the timestep embedding with a shift that its weights were not trained with."""
    stock = _package("checkpoints.diffusers_dit")
    logger.warning(f"{stock.CORRECTED[0].upper()}{stock.CORRECTED[1:]}.")
    return stock.correct_stock_model(_package("transformer_dit").DiTTransformer2DModel, transformer)


def _package(module):
    """A module of the installed package: this file also travels alone."""
    if importlib.util.find_spec("dit_hf") is None:
        raise ImportError("This needs the dit_hf package, which is not installed.")
    return importlib.import_module(f"dit_hf.{module}")


def _is_installed():
    """Whether this file is the package's, not a copy that came with a model."""
    return __name__.startswith("dit_hf.")


def find_class(id2label: dict[int, str], name: str) -> int | None:
    """
    The class of a name.

    Args:
        id2label (`dict[int, str]`): Class names; synonyms are separated by commas.
        name (`str`): A whole entry or a synonym, in any case.

    Returns:
        `int`: its id, or None.

    Raises:
        ValueError: if several classes have the name.
    """
    # The whole entry goes before a synonym and the spelling as written before another case: ImageNet has a
    # "Cardigan" that is a dog and a "cardigan" that is not.
    for fold in (str.strip, lambda text: text.strip().casefold()):
        for whole in (True, False):
            ids = [
                key
                for key, names in id2label.items()
                if fold(name) in [fold(part) for part in ([names] if whole else names.split(","))]
            ]
            if len(ids) > 1:
                raise ValueError(f"{name!r} is the name of classes {', '.join(map(str, ids))}")
            if ids:
                return ids[0]
    return None


class ModulationTable:
    """What the adaptive norms get at each step, once a step and class: computed ahead, shared by images of a class."""

    def __init__(self, transformer, schedule, class_ids):
        has_null_class = transformer.config.class_dropout_prob > 0
        classes = sorted(set(class_ids)) + [transformer.config.num_classes] * has_null_class
        self.transformer, self.schedule = transformer, schedule
        self.classes = torch.tensor(classes, device=schedule.device)
        self.conditional_rows = torch.tensor([classes.index(label) for label in class_ids], device=schedule.device)
        null_rows = torch.full_like(self.conditional_rows, len(classes) - 1)
        self.guided_rows = torch.cat([null_rows, self.conditional_rows])
        self.steps_at_a_time = max(1, MODULATION_ROWS // len(classes))
        self.first, self.vectors = 0, None

    def rows(self, index, guided):
        """`(B, M)` of a step, or guided `(2B, M)`, unconditional first."""
        first = index - index % self.steps_at_a_time
        if self.vectors is None or first != self.first:
            self.vectors = None  # before the next ones are made
            steps = self.schedule[first : first + self.steps_at_a_time]
            timesteps, classes = steps.repeat_interleave(len(self.classes)), self.classes.repeat(len(steps))
            self.vectors = self.transformer.compute_modulation(timesteps, classes).unflatten(0, (len(steps), -1))
            self.first = first
        return self.vectors[index - first].index_select(0, self.guided_rows if guided else self.conditional_rows)


class DiTClassCondPipeline(DiffusionPipeline, LoraLoaderMixin):
    r"""
    Pipeline for class-conditional image generation with DiT (https://arxiv.org/abs/2212.09748).

    Args:
        transformer (`DiTTransformer2DModel`): Predicts noise, velocity or whatever the scheduler's
            `prediction_type` says, from latents, timestep and class.
        scheduler (`SchedulerMixin`):
            Any of diffusers' samplers for what the model was trained on; EDM's are for models trained inside EDM's
            preconditioning, which is not the diffusion of DiT.
        vae (`AutoencoderKL`, *optional*): Decodes latents; without one the model works on pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*): Class names; synonyms are separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        if isinstance(transformer, StockDiTTransformer2DModel):
            transformer = _correct_stock_model(transformer)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._built_for_flow_matching = _is_flow_matching(scheduler)
        # JSON turns the keys into strings; they are numbers again here.
        self.id2label = dict(sorted((int(key), name) for key, name in (id2label or {}).items()))
        self.register_to_config(id2label=self.id2label or None)
        self.vae_scale_factor = 1
        if vae is not None:
            ratio = getattr(vae, "spatial_compression_ratio", None)  # AutoencoderDC
            self.vae_scale_factor = ratio or 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._current_timestep = None

    @classmethod
    def from_bundled(cls, name: str = "emoji64", **kwargs) -> "DiTClassCondPipeline":
        """
        Loads a small trained pipeline that comes with the package.

        Args:
            name (`str`, defaults to `"emoji64"`): Folder under `dit_hf/bundled`.
            kwargs: Passed on to `from_pretrained`.

        Returns:
            `DiTClassCondPipeline`: in float32 unless `dtype` says otherwise.

        Raises:
            ValueError: if there is no such pipeline.
        """
        folder = BUNDLED / name
        if not (folder / "model_index.json").is_file():
            have = ", ".join(sorted(path.parent.name for path in BUNDLED.glob("*/model_index.json"))) or "none"
            raise ValueError(f"There is no bundled pipeline {name!r}; this installation has {have}.")
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)  # the files are float16
        return cls.from_pretrained(folder, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """
        Reads a `model_index.json`; for the installed class, whatever it names as code is this package's.

        Then no remote code is needed, and a folder of diffusers' own DiT is read by our transformer, which corrects it.
        """
        config = super()._dict_from_json_file(json_file)
        if _is_installed() and isinstance(config.get("transformer"), list):
            config |= {"_class_name": cls.__name__, "transformer": ["dit_hf", "DiTTransformer2DModel"]}
            config.pop("auto_map", None)
        return config

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Leaves out what only tells diffusers where the code is."""
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        variant=None,
        max_shard_size=None,
        push_to_hub=False,
        use_flashpack=False,
        *,
        card=None,
        **kwargs,
    ):
        """
        Saves the pipeline, its code and a model card, so that the folder and its copy on the Hub load anywhere.

        Args:
            save_directory (`str` or `Path`): Created if it does not exist.
            safe_serialization, variant, max_shard_size, use_flashpack: As with every pipeline.
            push_to_hub (`bool`, defaults to `False`): Whether to publish the folder as well.
            card (`dit_hf.hub.CardFacts`, *optional*): What the model can't tell of itself.
            kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for `push_to_hub`.
        """
        if "_before_optimization" in vars(self):
            raise ValueError("The pipeline is optimized for speed; call `dit_hf.restore(pipe)` before saving it.")
        hub = _package("hub") if push_to_hub or _is_installed() else None
        folder = Path(save_directory)
        own_card = folder / "transformer" / "README.md"
        keep = own_card.exists()
        super().save_pretrained(folder, safe_serialization, variant, max_shard_size, use_flashpack=use_flashpack)
        if not keep:
            own_card.unlink(missing_ok=True)  # a component needs no card of its own
        if hub is not None:
            hub.carry_over(self, folder, "transformer/projectors.safetensors")
            hub.write_card(self, folder, facts=card)
        else:
            source = Path(str(self.config.get("_name_or_path"))) / "README.md"
            if source.is_file() and source.parent.resolve() != folder.resolve():
                shutil.copyfile(source, folder / source.name)
        if push_to_hub:
            hub.publish_folder(folder, kwargs.pop("repo_id", folder.resolve().name), self, card, **kwargs)

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes `model_index.json`, naming the code that lies beside it for `trust_remote_code=True`."""
        super().save_config(save_directory)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index["_class_name"] = ["pipeline_dit_class_cond", "DiTClassCondPipeline"]
        index["transformer"] = ["transformer_dit", "DiTTransformer2DModel"]
        index["auto_map"] = {"AutoModel": "transformer_dit.DiTTransformer2DModel"}
        (folder / self.config_name).write_text(json.dumps(index))
        parts = [folder / part / name for part in self.components for name in ("config.json", "scheduler_config.json")]
        for file in (folder / self.config_name, *filter(Path.is_file, parts)):
            # Where the parts were loaded from is of no use to others, and may be a path of this machine.
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(__file__, folder / "pipeline_dit_class_cond.py")
        if push_to_hub:
            _package("hub").publish_folder(folder, kwargs.pop("repo_id", folder.resolve().name), self, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """
        Publishes the pipeline: weights, code, and a model card; a card on the Hub is updated, not overwritten.

        Args:
            repo_id (`str`): `"name"` or `"user/name"`; created if it does not exist.
            kwargs: `commit_message`, `private`, `token`, `create_pr`, `variant`, `max_shard_size` as with every
                pipeline, and `card` ([`dit_hf.hub.CardFacts`]), what the model can't tell of itself.

        Returns:
            `str`: address of the commit.

        Raises:
            OSError: if the upload fails; the message says how to go on.
        """
        return _package("hub.publish").push(self, repo_id, **kwargs)

    @property
    def is_flow_matching(self) -> bool:
        """Whether the pipeline was built with a sampler of flow matching, and so with a model that was trained for it."""
        return self._built_for_flow_matching

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> id, in alphabetical order; every synonym is a name of its own."""
        pairs = [(name.strip(), key) for key, names in self.id2label.items() for name in names.split(",")]
        return dict(sorted(pairs))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Class names to ids.

        Args:
            label (`str` or `list[str]`): One name or several; a synonym, or the whole `id2label` entry.

        Returns:
            `list[int]`

        Raises:
            ValueError: if a name is unknown, the message suggests the nearest; or if it is the name of several classes.
        """
        return [self._get_label_id(name) for name in ([label] if isinstance(label, str) else label)]

    def _get_label_id(self, name):
        try:
            known_id = find_class(self.id2label, name)
        except ValueError as error:
            raise ValueError(f"{error}; give the id.") from None
        if known_id is not None:
            return known_id
        if not self.id2label:
            raise ValueError(f"There is no class {name!r}: this pipeline has no `id2label`; use ids.")
        spelling = {known.casefold(): known for known in self.labels}
        nearest = [spelling[known] for known in difflib.get_close_matches(name.casefold(), spelling, n=3, cutoff=0.5)]
        hint = f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else "See `pipe.labels`."
        if not nearest and len(self.id2label) <= 20:
            hint = f"There are {', '.join(map(repr, self.id2label.values()))}."
        raise ValueError(f"There is no class {name!r}. {hint}")

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

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

    def resolve_class_labels(self, class_labels):
        """
        What `class_labels` takes, as ids.

        Args:
            class_labels (`int`, `str`, `list` of either, or `torch.Tensor`): Class ids or names.

        Returns:
            `list[int]`

        Raises:
            ValueError: if there is none, or one is unknown or out of range.
        """
        if hasattr(class_labels, "tolist"):  # torch's and numpy's
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty; give at least one class id or name.")
        class_labels = [label.tolist() if hasattr(label, "tolist") else label for label in class_labels]
        ids = [self._get_label_id(label) if isinstance(label, str) else label for label in class_labels]
        num_classes = self.transformer.config.num_classes
        for label in ids:
            if isinstance(label, bool) or not isinstance(label, int):
                raise ValueError(f"`class_labels` holds {label!r}; it must hold ids (int) or names (str).")
            if not 0 <= label < num_classes:
                raise ValueError(f"`class_labels` holds {label}; the model's classes are 0 to {num_classes - 1}.")
        return ids

    def _check_guidance(self, guidance_scale, guidance_channels, guidance_interval):
        config = self.transformer.config
        if not isinstance(guidance_scale, (int, float)) or not 0 <= guidance_scale < float("inf"):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale!r}; it must be a number from 0 (1 or less is no guidance)."
            )
        if guidance_scale > 1 and config.class_dropout_prob == 0:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but the model was built with `class_dropout_prob=0` and has "
                "no null class to guide away from; pass `guidance_scale=1`."
            )
        whole = isinstance(guidance_channels, int) and not isinstance(guidance_channels, bool)
        if guidance_channels is not None and not (whole and 1 <= guidance_channels <= config.in_channels):
            raise ValueError(
                f"`guidance_channels` is {guidance_channels}; it must be None (all) or 1 to {config.in_channels}."
            )
        pair = isinstance(guidance_interval, (tuple, list)) and len(guidance_interval) == 2
        if not pair or not 0.0 <= guidance_interval[0] < guidance_interval[1] <= 1.0:
            raise ValueError(
                f"`guidance_interval` is {guidance_interval}; it must be (start, end) with 0 ≤ start < end ≤ 1."
            )

    def _check_scheduler(self, timesteps, sigmas, eta):
        name = type(self.scheduler).__name__
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if timesteps is not None and sigmas is not None:
            raise ValueError("`timesteps` and `sigmas` were both given; a schedule is one or the other.")
        for argument, schedule in (("timesteps", timesteps), ("sigmas", sigmas)):
            if schedule is None:
                continue
            # EDMEulerScheduler's `sigmas` are positions on its own schedule, not sigmas.
            if argument not in accepted or name == "EDMEulerScheduler":
                raise ValueError(f"`{argument}` was given, but {name} takes no custom {argument}.")
            if len(schedule) == 0:
                raise ValueError(f"`{argument}` is empty.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {eta}; it must be from 0 to 1.")
        if eta != 0 and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"`eta` is {eta}, but {name} has no such parameter; leave it at 0.")
        if self._scheduler_takes_variance and not self.transformer.config.learn_sigma:
            raise ValueError(
                f"{name} has variance_type={self.scheduler.config.variance_type!r}, but the model predicts no "
                "variance (`learn_sigma=False`); use variance_type='fixed_large'."
            )
        if _is_flow_matching(self.scheduler) != self._built_for_flow_matching:
            built, given = (
                ("flow matching", "diffusion") if self._built_for_flow_matching else ("diffusion", "flow matching")
            )
            logger.warning(
                f"This pipeline was built with a scheduler for {built} and {name} samples {given}: unless the model was "
                "trained for it, the images are noise. See `dit_hf.make_scheduler` for schedulers of both kinds."
            )
        if self.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(f"{name} has use_dynamic_shifting=True, which is for text-to-image; set a fixed shift.")

    def _check_size(self, height, width, latents, batch_size):
        """The shape of the latents that the arguments ask for."""
        config = self.transformer.config
        multiple = self.vae_scale_factor * config.patch_size
        for argument, pixels in (("height", height), ("width", width)):
            if pixels is not None and (not isinstance(pixels, int) or pixels < multiple or pixels % multiple):
                raise ValueError(f"`{argument}` is {pixels}; it must be a positive multiple of {multiple} pixels.")
        default = config.sample_size * self.vae_scale_factor
        if latents is not None and height is None and width is None and latents.ndim == 4:
            height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        sides = [(pixels or default) // self.vae_scale_factor for pixels in (height, width)]
        shape = (batch_size, config.in_channels, *sides)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; these arguments need {shape}.")
        if any(side % config.patch_size for side in sides):
            raise ValueError(
                f"`latents` of {sides[0]}×{sides[1]} are not divisible by patches of {config.patch_size}."
            )
        return shape

    def _check_callback(self, callback_on_step_end_tensor_inputs):
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}; allowed are {self._callback_tensor_inputs}."
            )

    @property
    def _scheduler_takes_variance(self):
        # Others may have DDPM's `variance_type` in their config, as `from_config` hands it on.
        is_ddpm = isinstance(self.scheduler, (DDPMScheduler, DDPMParallelScheduler))
        return is_ddpm and self.scheduler.config.variance_type in LEARNED_VARIANCE

    @contextmanager
    def _without_foreign_variance(self):
        """Solvers that got `variance_type` from a DDPM would cut the prediction down to three channels."""
        variance_type = self.scheduler.config.get("variance_type")
        foreign = variance_type in LEARNED_VARIANCE and not self._scheduler_takes_variance
        if foreign:
            self.scheduler.register_to_config(variance_type=None)
        try:
            yield
        finally:
            if foreign:
                self.scheduler.register_to_config(variance_type=variance_type)

    @contextmanager
    def _trajectory(self):
        """Nothing of a trajectory outlives it, not even of one that a callback breaks off: neither timestep nor caches."""
        try:
            yield
        finally:
            self._current_timestep = None
            self.transformer._reset_stateful_cache()

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
            scheduler.set_timesteps(num_inference_steps, device=device)
            scheduler.sigma_min = sigma_min
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # looking the first timestep up fails where it occurs twice
        return scheduler.timesteps

    def _prepare_latents(self, shape, latents, generator, device):
        """Unit noise (drawn or given) at the scheduler's starting scale, float32."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _prepare_modulation(self, schedule, class_ids):
        """A table, or None where the model has to embed time and class by itself."""
        transformer = self.transformer
        if not getattr(transformer, "is_adaptive", False) or not hasattr(transformer, "compute_modulation"):
            return None
        # Offloaded blocks have their weights only while they run; FasterCache cuts the batch but not these rows.
        # So have sharded ones, whose parameters are tensors of another type.
        sharded = any(type(parameter).__name__ == "DTensor" for parameter in transformer.parameters())
        hooked = hasattr(transformer, "_hf_hook") or hasattr(transformer.transformer_blocks[0], "_hf_hook")
        cuts_batch = isinstance(transformer._cache_config, FasterCacheConfig)
        if sharded or hooked or cuts_batch or _is_group_offload_enabled(transformer):
            return None
        return ModulationTable(transformer, schedule, class_ids)

    def _predict(self, model_input, timestep, class_labels, guidance_channels, guided, modulation=None, **position):
        """One model evaluation, `(B, C, H, W)` or with the variance a scheduler takes `(B, 2C, H, W)`, float32."""
        channels = model_input.shape[1]
        model_input = model_input.to(self.transformer.dtype)
        if guided:
            # Unconditional first: the order diffusers' caches expect.
            null_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
            model_input = torch.cat([model_input, model_input])
            class_labels = torch.cat([null_labels, class_labels])
        precomputed = {} if modulation is None else {"modulation": modulation}
        with self.transformer.cache_context("guided" if guided else "conditional", timestep=timestep, **position):
            output = self.transformer(
                hidden_states=model_input,
                timestep=timestep.expand(len(model_input)),
                class_labels=class_labels,
                return_dict=False,
                **precomputed,
            )[0].float()
        if guided:
            unconditional, conditional = output.chunk(2)
            count = guidance_channels or channels
            direction = conditional[:, :count] - unconditional[:, :count]
            mean = unconditional[:, :count] + self._guidance_scale * direction
            output = torch.cat([mean, conditional[:, count:]], dim=1)  # the rest, variance too, is conditional
        return output if self._scheduler_takes_variance else output[:, :channels]

    def _decode(self, latents):
        """Latents -> images in [-1, 1], `(B, 3, height, width)`; pixel-space models are there already."""
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / (config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
            )
            latents = latents * std + mean
        latents = latents + (config.get("shift_factor") or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws images of the given classes.

        Args:
            class_labels (`int`, `str`, `list` of either, or `torch.Tensor`): Class ids or names (see `labels`).
            guidance_scale (`float`, defaults to 4.0): Classifier-free guidance; 1 or less turns it off.
            guidance_channels (`int`, *optional*):
                Guide the first channels only; all if not given. The paper's figures guide 3 of 4.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                Fractions of the trajectory, counted in model evaluations, 0 the first: guidance from `start` to before
                `end`. Outside only the conditional half is computed.
            num_inference_steps (`int`, defaults to 50): Steps; the scheduler's spacing.
            timesteps (`list[int]`, *optional*): Timesteps in place of the scheduler's own, if it takes them.
            sigmas (`list[float]`, *optional*):
                Sigmas in place of the scheduler's own, if it takes them; with a last 0 where it wants one.
            generator (`torch.Generator` or `list`, *optional*):
                One, or one an image: then each image depends on its own generator only.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Unit noise to start from.
            height, width (`int`, *optional*): Pixels; the model's own size if not given.
            num_images_per_label (`int`, defaults to 1): Images of each label, one after the other.
            eta (`float`, defaults to 0.0): DDIM's noise share, for schedulers that have it.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` (values in [0, 1]) or `"latent"`.
            callback_on_step_end (`Callable`, *optional*):
                `f(pipe, step, timestep, tensors) -> tensors`, called after each step; None changes nothing.
            callback_on_step_end_tensor_inputs (`list[str]`): Which of `latents`, `class_labels` it gets.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput`.

        Returns:
            `ImagePipelineOutput` or `tuple`: `images`.

        Raises:
            ValueError: on any argument that is out of range or contradicts another, before any compute.

        Example:

            >>> from dit_hf import DiTClassCondPipeline
            >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
            >>> images = pipe(["food", "flags"], num_inference_steps=4).images
            >>> images[0].size
            (64, 64)
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check everything before any compute
        class_ids = self.resolve_class_labels(class_labels)
        counts = {"num_images_per_label": num_images_per_label, "num_inference_steps": num_inference_steps}
        for argument, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{argument}` is {count!r}; it must be a whole number from 1.")
        class_ids = [label for label in class_ids for _ in range(num_images_per_label)]
        generator = list(generator) if isinstance(generator, tuple) else generator
        if isinstance(generator, list) and len(generator) != len(class_ids):
            raise ValueError(f"{len(generator)} generators were given for {len(class_ids)} images; give one an image.")
        if not isinstance(generator, (torch.Generator, list, type(None))):
            raise ValueError(f"`generator` is a {type(generator).__name__}; it must be a torch.Generator or a list.")
        if not isinstance(latents, (torch.Tensor, type(None))):
            raise ValueError(f"`latents` is a {type(latents).__name__}; it must be a torch.Tensor.")
        if self.transformer.training and self.transformer.config.class_dropout_prob > 0:
            raise ValueError("The transformer is in training mode and drops labels; call `pipe.transformer.eval()`.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; it must be 'pil', 'np', 'pt' or 'latent'.")
        self._check_guidance(guidance_scale, guidance_channels, guidance_interval)
        self._check_scheduler(timesteps, sigmas, eta)
        self._check_callback(callback_on_step_end_tensor_inputs)
        shape = self._check_size(height, width, latents, len(class_ids))
        channels = self.transformer.config.in_channels
        if self.vae is None and output_type != "latent" and channels not in (1, 3):
            raise ValueError(
                f"`output_type` is {output_type!r}, but this pipeline has no VAE and its model draws {channels} channels, "
                "which are no image; pass `output_type='latent'`, or set `vae`."
            )
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # 2. Prepare schedule, labels and noise
        device = self._execution_device
        # The scheduler's part stays on the CPU, where its tables are, and the model's goes to the device at once: looking
        # up a GPU's timestep waits for the GPU, and so does taking one there. Some are float64, which not every device has.
        schedule = self._set_timesteps(num_inference_steps, timesteps, sigmas, "cpu")
        model_schedule = schedule.float().to(device)
        self._num_timesteps = len(schedule)
        class_labels = torch.tensor(class_ids, device=device)
        latents = self._prepare_latents(shape, latents, generator, device)
        step_options = {"eta": eta, "generator": generator}
        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {name: value for name, value in step_options.items() if name in accepted}
        table = self._prepare_modulation(model_schedule, class_ids)

        # 3. Denoise
        steps = self.progress_bar(total=len(schedule))
        with self._trajectory(), self._without_foreign_variance(), steps as progress_bar:
            for index, timestep in enumerate(schedule):
                if self._interrupt:
                    break
                fraction = index / len(schedule)
                guided = self.do_classifier_free_guidance and guidance_interval[0] <= fraction < guidance_interval[1]
                self._current_timestep = timestep
                position: dict[str, float] = {"step_index": index, "num_inference_steps": len(schedule)}
                if hasattr(self.scheduler, "sigmas"):
                    position["sigma"] = float(self.scheduler.sigmas[index])
                modulation = None if table is None else table.rows(index, guided)
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, timestep)
                output = self._predict(
                    model_input, model_schedule[index], class_labels, guidance_channels, guided, modulation, **position
                )
                latents = self.scheduler.step(output, timestep, latents, **step_options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    available = {"latents": latents, "class_labels": class_labels}
                    tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, index, timestep, tensors) or {}
                    latents = changed.get("latents", latents)
                    class_labels = changed.get("class_labels", class_labels)
                    if "class_labels" in (*tensors, *changed):
                        table = None  # they may have been changed, in place too
                progress_bar.update()

        # 4. Decode
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self._decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
