"""The pipeline that the package exports: the carried one, with what an installed package adds.

Shapes: `B` images, `C` channels, `H W` latent size.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from diffusers import DiTTransformer2DModel as StockDiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from . import hub, model_folders, pipeline_dit_class_cond
from .bundled import FOLDER, bundled_names, resolve_pipeline
from .checkpoints import diffusers_dit
from .checkpoints.saving import TRAINING_ONLY_FILE
from .dtypes import DTYPE_ARGUMENT, parse_dtype
from .files import writing_folder
from .models import MODELS, DiTTransformer2DModel


logger = logging.get_logger(__name__)

# Then saved folders name the library `dit_hf`, and a repository that does so is not taken for a mistake.
LOADABLE_CLASSES.setdefault("dit_hf", LOADABLE_CLASSES["diffusers"])

COMPONENTS = ("transformer", "scheduler", *pipeline_dit_class_cond.OPTIONAL_COMPONENTS)
# Bases of the classes that diffusers accepts as a component; a model if it is not named.
BASES = {"scheduler": "SchedulerMixin", "guider": "BaseGuidance"}
# Components given to the `from_pretrained` under way, for which diffusers would look up the class in the index.
_GIVEN: ContextVar[tuple[str, ...]] = ContextVar("given components", default=())


if TYPE_CHECKING:

    class TensorPipelineOutput(ImagePipelineOutput):
        """What a call with `output_type="pt"` or `"latent"` returns."""

        images: torch.Tensor  # type: ignore[assignment]


class DiTClassCondPipeline(pipeline_dit_class_cond.DiTClassCondPipeline):
    __doc__ = pipeline_dit_class_cond.DiTClassCondPipeline.__doc__

    transformer: DiTTransformer2DModel
    scheduler: SchedulerMixin

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        recommended_call: dict[str, Any] | None = None,
        guide: ModelMixin | None = None,
        guider: Any = None,
    ):
        if isinstance(transformer, StockDiTTransformer2DModel):
            transformer = diffusers_dit.correct_stock_model(DiTTransformer2DModel, transformer)
            logger.warning(f"{diffusers_dit.CORRECTED[0].upper()}{diffusers_dit.CORRECTED[1:]}.")
        super().__init__(transformer, scheduler, vae, id2label, recommended_call, guide, guider)

    if TYPE_CHECKING:

        @overload  # type: ignore[override]
        def __call__(self, class_labels: Any, *, return_dict: Literal[False], **kwargs: Any) -> tuple[Any]: ...

        @overload
        def __call__(
            self, class_labels: Any, *, output_type: Literal["pt", "latent"], **kwargs: Any
        ) -> TensorPipelineOutput: ...

        @overload
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
            callback_on_step_end: Callable[..., Any] | None = None,
            callback_on_step_end_tensor_inputs: list[str] = ["latents"],
            return_dict: Literal[True] = True,
            encoder_refresh_steps: int = 1,
            guider: Any = None,
            image: Any = None,
            strength: float | None = None,
        ) -> ImagePipelineOutput: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @classmethod
    def from_bundled(cls, name: str = "emoji64", **kwargs: Any) -> Self:
        """
        Loads a small trained pipeline that comes with the package.

        Args:
            name (`str`, defaults to `"emoji64"`): Folder under `dit_hf/bundled`.
            kwargs: Passed on to `from_pretrained`.

        Returns:
            `DiTClassCondPipeline`: in float32 unless `dtype` says otherwise.

        Raises:
            ValueError: if there is no such pipeline.

        Example:

            >>> from dit_hf import DiTClassCondPipeline
            >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
            >>> pipe("red apple", num_inference_steps=4).images[0].size
            (64, 64)
        """
        if name not in bundled_names():
            have = ", ".join(bundled_names()) or "none"
            raise ValueError(f"There is no bundled pipeline {name!r}; this installation has {have}.")
        return cls.from_pretrained(FOLDER / name, **({DTYPE_ARGUMENT: torch.float32} | parse_dtype(kwargs)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """
        Loads a pipeline; no remote code runs.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                A folder, a Hub id or the name of a bundled pipeline; diffusers' own DiT is read and corrected.
            kwargs: `dtype` (a `torch.dtype` or its name), `revision` … as with every diffusers pipeline.

        Returns:
            `DiTClassCondPipeline`: bundled ones in float32 unless `dtype` says otherwise.

        Raises:
            ValueError: if an argument is not possible, or the folder holds another kind of pipeline.
            OSError: if the folder or repository does not exist, or the Hub can't be reached.

        Example:

            >>> import tempfile
            >>> from dit_hf import DiTClassCondPipeline
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     DiTClassCondPipeline.from_bundled("emoji64").save_pretrained(folder)
            ...     pipe = DiTClassCondPipeline.from_pretrained(folder)
            >>> pipe.get_label_ids("flag: Japan") == [pipe.labels["flag: Japan"]]
            True
        """
        kwargs = parse_dtype(kwargs)
        model_folders.check_options(**kwargs)
        pipeline_dit_class_cond.check_id2label(kwargs.get("id2label"))
        for name in COMPONENTS:
            if kwargs.get(name) is not None:
                pipeline_dit_class_cond.check_component(name, kwargs[name])
        folder = resolve_pipeline(pretrained_model_name_or_path)
        if folder != str(pretrained_model_name_or_path):
            kwargs.setdefault(DTYPE_ARGUMENT, torch.float32)  # the files are float16
        places = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
        if not kwargs.get("local_files_only"):
            hub.check_available(folder, cls.config_name, **places)
        # The folder's own scheduler tells what the model was trained for; a call compares the given one with it.
        scheduler = kwargs.pop("scheduler", None)
        if scheduler is not None:
            places["local_files_only"] = bool(kwargs.get("local_files_only"))
            if model_folders.find_class(cls.load_config(folder, **places), "scheduler") is None:
                kwargs["scheduler"] = scheduler
        if Path(folder).is_dir():
            cls._check_folder(folder, kwargs)
        token = _GIVEN.set(tuple(name for name in COMPONENTS[1:] if kwargs.get(name) is not None))
        try:
            with hub.connected():
                pipe = super().from_pretrained(folder, **kwargs)
        except ValueError as error:
            if str(folder) in str(error):
                raise
            raise ValueError(f"{folder}: {error}") from error
        finally:
            _GIVEN.reset(token)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs):
        """
        Reads a `model_index.json`; whatever it names as code is this package's.

        Then no remote code is needed, and a folder of diffusers' own DiT is read by our transformer, which corrects
        it.
        """
        config = model_folders.read_index(json_file)
        config["_class_name"] = cls.__name__
        for part in ("transformer", "guide"):
            if (name := config.get(part, [None, None])[1]) is not None:
                config[part] = ["dit_hf", name if name in MODELS else DiTTransformer2DModel.__name__]
        for part in _GIVEN.get():
            config[part] = ["diffusers", BASES.get(part, "ModelMixin")]
        config.pop("auto_map", None)
        return config

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """As every pipeline's; what was downloaded is checked before it is loaded."""
        folder = super().download(pretrained_model_name, **kwargs)
        cls._check_folder(folder, kwargs)
        return folder

    @classmethod
    def _check_folder(cls, folder, options):
        """Checks the components that are loaded from a folder, with the options of `from_pretrained`."""
        known = {"transformer": (*diffusers_dit.CLASS_NAMES, *MODELS), "guide": tuple(MODELS)}
        transformers = {name: classes for name, classes in known.items() if name not in options}
        index = model_folders.read_index(Path(folder, cls.config_name), transformers)
        trusts = bool(options.get("trust_remote_code"))
        model_folders.check_pipeline_folder(folder, index, options, options.get("variant"), trusts)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As every pipeline's; one that is optimized can't be cast, as `restore` could not undo that."""
        casts = kwargs.get("dtype") or kwargs.get("torch_dtype") or any(isinstance(each, torch.dtype) for each in args)
        if casts and "_before_optimization" in vars(self):
            raise ValueError("The pipeline is optimized for speed; call `dit_hf.restore(pipe)` before casting it.")
        return super().to(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        card: hub.CardFacts | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Saves the pipeline, its code and a model card, so that the folder and its copy on the Hub load anywhere. If
        that fails, what was in the folder before still loads.

        Args:
            save_directory (`str` or `Path`): Created if it does not exist.
            safe_serialization, variant, max_shard_size, use_flashpack: As with every pipeline.
            push_to_hub (`bool`, defaults to `False`): Whether to publish the folder as well.
            card (`dit_hf.hub.CardFacts`, *optional*): Facts for the card that can't be derived from the model.
            kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for `push_to_hub`.

        Raises:
            ValueError: if a component was changed in place so that its saved weights would not load, or the folder
                has links to files outside of it.
            OSError: if the folder can't be written.
        """
        if "_before_optimization" in vars(self):
            raise ValueError("The pipeline is optimized for speed; call `dit_hf.restore(pipe)` before saving it.")
        model_folders.check_options(variant=variant, max_shard_size=max_shard_size)
        hub.check_loads_again(self.components)
        folder = Path(save_directory)
        hub.check_save_directory(folder)
        with writing_folder(folder, (f"transformer/{TRAINING_ONLY_FILE}", "scheduler/scheduling_*.py")) as partial:
            super().save_pretrained(partial, safe_serialization, variant, max_shard_size, use_flashpack=use_flashpack)
            for name in ("transformer",) if self.guide is None else ("transformer", "guide"):
                (partial / name / "README.md").unlink(missing_ok=True)  # a component needs no separate card
                hub.carry_over(self, partial, f"{name}/{TRAINING_ONLY_FILE}")
            hub.write_card(self, partial, facts=card, place=folder)
        if push_to_hub:
            hub.publish_folder(folder, model=self, card=card, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """
        Publishes the pipeline: weights, code, and a model card; a card on the Hub is updated, not overwritten.

        Args:
            repo_id (`str`): `"name"` or `"user/name"`; created if it does not exist.
            kwargs: `commit_message`, `private`, `token`, `create_pr`, `variant`, `max_shard_size` as with every
                pipeline, and `card` ([`dit_hf.hub.CardFacts`]), facts for the card.

        Returns:
            `str`: address of the commit.

        Raises:
            OSError: if the upload fails; the message says how to continue.
        """
        return hub.push(self, repo_id, **kwargs)
