"""The models that the package exports: the carried architectures, with what an installed package adds.

Shapes: `B` batch, `C` channels, `H W` latent size.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

import torch
from diffusers import DiTTransformer2DModel as StockDiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging

from . import hub, model_folders, transformer_ddt, transformer_dit, transformer_jit
from .checkpoints import diffusers_dit
from .checkpoints.loading import load_model
from .checkpoints.saving import TRAINING_ONLY_FILE
from .dtypes import DTYPE_ARGUMENT, parse_dtype
from .files import check_path, reading, writing_folder
from .presets import DDT_PRESETS, JIT_PRESETS, PRESETS, DDTPresetName, JiTPresetName, PresetName, preset_config


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where a config lies.
CONFIG_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def _check_memory_option(low_cpu_mem_usage):
    if not low_cpu_mem_usage:
        raise ValueError(
            "`low_cpu_mem_usage=False` is not possible, as the timestep embedding is kept in float32; omit it."
        )


def _check_keys(info):
    """Refuses weights that diffusers would initialise at random, or leave out, with a warning only."""
    unexpected = set(info["unexpected_keys"]) - set(diffusers_dit.DIFFUSERS.tables)  # stored by old versions
    if unfit := sorted({*info["missing_keys"], *unexpected}):
        raise ValueError(f"the key {unfit[0]!r} is missing or unknown ({len(unfit)} such keys).")


class PackagedModel(ModelMixin if TYPE_CHECKING else object):  # type: ignore[misc]
    """What an installed package adds to a carried architecture: presets, checks of what is loaded, model cards."""

    _presets: ClassVar[Mapping[Any, Any]]
    # Classes of diffusers whose folders are read as well.
    _other_class_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_preset(cls, name: Any, **overrides: Any) -> Self:
        """
        Builds a model of a published size with random weights.

        Args:
            name (`str`): `"DiT-S/8"` … `"DiT-XL/2"`, `"JiT-B/16"` … `"JiT-H/32"`, `"DDT-XL/2"`,
                `"RAE-DiT-DH-XL"`, `"RAE-DiT-DH-S"`; see `dit_hf.presets`.
            overrides: Constructor arguments that replace the preset's.

        Returns:
            `DiTTransformer2DModel`, `JiTTransformer2DModel` or `DDTTransformer2DModel`

        Raises:
            ValueError: if there is no such preset.

        Example:

            >>> from dit_hf import DiTTransformer2DModel
            >>> model = DiTTransformer2DModel.from_preset("DiT-S/8", num_classes=10)
            >>> model.config.num_layers, model.config.patch_size, model.config.num_classes
            (12, 8, 10)
        """
        return cls(**(preset_config(name, cls._presets) | overrides))

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        num_attention_heads: int | Sequence[int] | None = None,
        family: str = "auto",
        weights: str = "auto",
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        has_null_class: bool | None = None,
        low_cpu_mem_usage: bool = True,
        in_context_start: int | None = None,
        num_encoder_blocks: int | None = None,
        noise_scale: float | None = None,
        in_channels: int | None = None,
    ) -> Self:
        """
        Loads a checkpoint of an original code base.

        Args:
            pretrained_model_link_or_path (`str` or `Path`):
                A `.pt` or `.safetensors` file, or the link to one on the Hub or another server.
            num_attention_heads (`int` or `Sequence[int]`, *optional*):
                Number of attention heads, which most weights do not tell. Needed for widths that were never published;
                two numbers for a model of two streams.
            family (`str`, defaults to `"auto"`):
                Code base the file comes from, a name of `dit_hf.checkpoints.FAMILIES`; by default its keys decide.
            weights (`str`, defaults to `"auto"`):
                Which of a training checkpoint's weights, `"ema"` or `"model"`; `"auto"` takes the average where there
                is one, and logs which it took.
            dtype (`torch.dtype` or `str`, *optional*):
                Type of the weights, float32 if not given; the timestep embedding stays in float32, as with
                `from_pretrained`. `torch_dtype` is the same.
            has_null_class (`bool`, *optional*):
                Whether the last row of the class table is the null class of classifier-free guidance. If nothing
                tells, tables of 1000 rows or one have none, and any other has one.
            low_cpu_mem_usage (`bool`, defaults to `True`): No other value is possible, as with `from_pretrained`.
            in_context_start (`int`, *optional*): The block before which JiT's context tokens join, if nothing tells.
            num_encoder_blocks (`int`, *optional*): How many of DDT's blocks are the encoder, if nothing tells.
            noise_scale (`float`, *optional*): Of JiT, if nothing tells.
            in_channels (`int`, *optional*): Of DDT's latents, if they are neither 4 nor 3.

        Returns:
            `DiTTransformer2DModel`, `JiTTransformer2DModel` or `DDTTransformer2DModel`: in eval mode.

        Raises:
            ValueError: if the file is not such a checkpoint; the message names the file and the key.
            OSError: if a link can't be downloaded.

        Example:

            >>> import tempfile
            >>> from pathlib import Path
            >>> from dit_hf import DiTTransformer2DModel
            >>> from dit_hf.checkpoints import FAMILIES
            >>> from dit_hf.checkpoints.saving import save_original
            >>> model = DiTTransformer2DModel.from_preset("DiT-S/8", num_layers=2, num_classes=10)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = Path(folder, "tiny.pt")
            ...     save_original(model, FAMILIES["dit"], file)
            ...     loaded = DiTTransformer2DModel.from_single_file(file)
            >>> loaded.config.num_layers
            2
        """
        _check_memory_option(low_cpu_mem_usage)
        dtype = parse_dtype({"dtype": dtype, "torch_dtype": torch_dtype}).get(DTYPE_ARGUMENT)
        hints = {
            "num_attention_heads": num_attention_heads,
            "has_null_class": has_null_class,
            "in_context_start": in_context_start,
            "num_encoder_blocks": num_encoder_blocks,
            "noise_scale": noise_scale,
            "in_channels": in_channels,
        }
        return load_model(cls, pretrained_model_link_or_path, dtype, family=family, weights=weights, **hints)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """
        As every `ModelMixin`'s. `DiTTransformer2DModel` also reads weights of diffusers' own DiT, and corrects their
        timestep embedding.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id.
            kwargs: `subfolder`, `dtype` (a `torch.dtype` or its name), `revision` … as with every diffusers model.

        Returns:
            `DiTTransformer2DModel`, `JiTTransformer2DModel` or `DDTTransformer2DModel`: in eval mode.

        Raises:
            ValueError: if an argument is not possible, or the folder holds something else.
        """
        kwargs = parse_dtype(kwargs)
        model_folders.check_options(**kwargs)
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        _check_memory_option(kwargs.get("low_cpu_mem_usage", True))
        name = "/".join(filter(None, (kwargs.get("subfolder"), cls.config_name)))
        places = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
        if not kwargs.get("local_files_only"):
            hub.check_available(pretrained_model_name_or_path, name, **places)
        places = {name: kwargs[name] for name in CONFIG_ARGUMENTS if kwargs.get(name) is not None}
        with hub.connected():
            config = cls.load_config(pretrained_model_name_or_path, **places)
        file = Path(pretrained_model_name_or_path, name)
        if (found := config.get("_class_name", cls.__name__)) not in (cls.__name__, *cls._other_class_names):
            raise ValueError(f"{pretrained_model_name_or_path} holds a {found}, not a {cls.__name__}.")
        model_folders.check_num_layers(file, config, kwargs.get("variant"))
        try:
            with torch.device("meta"):
                described = cls.from_config(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        is_stock = diffusers_dit.CONFIG_MARK in config
        if is_stock:
            with reading(file, "the config of a diffusers DiT"), torch.device("meta"):
                described = StockDiTTransformer2DModel.from_config(config)
        if "quantization_config" in config:
            model_folders.check_quantization(file, config["quantization_config"])
        quantization = kwargs.get("quantization_config")
        if quantization is not None and not hasattr(quantization, "quant_method"):
            raise ValueError(
                f"`quantization_config` is a {type(quantization).__name__}; it must be one of diffusers'."
            )
        quantized = config.get("quantization_config") or quantization
        as_it_is = quantized or kwargs.get("ignore_mismatched_sizes") or kwargs.get("use_flashpack")
        if not is_stock and as_it_is:  # diffusers tells nothing about these
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not as_it_is:
            model_folders.check_weights(file.parent, described, kwargs.get("variant"), all_known=not is_stock)
        wants_info = kwargs.pop("output_loading_info", False)
        load = StockDiTTransformer2DModel.from_pretrained if is_stock else super().from_pretrained
        with hub.connected():
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        try:
            _check_keys(info)
            if is_stock:
                model = diffusers_dit.correct_stock_model(cls, model)
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from None
        if is_stock:
            logger.warning(f"{pretrained_model_name_or_path}: {diffusers_dit.CORRECTED}.")
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a `config.json`; `ValueError` names what is wrong with it."""
        return model_folders.read_config(json_file)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As every `ConfigMixin`'s."""
        if not isinstance(config, dict) and not Path(str(config)).is_dir():
            raise ValueError(
                f"`config` is {str(config)[:100]!r}; it must be a dictionary, as `load_config` returns it."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        card: hub.CardFacts | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Saves the model, its code and a model card. If that fails, what was in the folder before still loads.

        Args:
            save_directory (`str` or `Path`): Created if it does not exist.
            is_main_process, save_function, safe_serialization, variant, max_shard_size, use_flashpack: As with every
                model.
            push_to_hub (`bool`, defaults to `False`): Whether to publish the folder as well.
            card (`dit_hf.hub.CardFacts`, *optional*): Facts for the card that can't be derived from the model.
            kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for `push_to_hub`.

        Raises:
            ValueError: if the model was changed in place so that the saved weights would not load, or the folder has
                links to files outside of it.
            OSError: if the folder can't be written.
        """
        model_folders.check_options(variant=variant, max_shard_size=max_shard_size)
        hub.check_loads_again({"model": self})
        hub.check_save_directory(save_directory)
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        options |= {"use_flashpack": use_flashpack}
        with writing_folder(save_directory, (TRAINING_ONLY_FILE,)) as partial:
            super().save_pretrained(partial, is_main_process, save_function, **options)
            if is_main_process:
                hub.carry_over(self, partial, TRAINING_ONLY_FILE)
                hub.write_card(self, partial, facts=card, place=save_directory)
        if is_main_process and push_to_hub:
            hub.publish_folder(save_directory, model=self, card=card, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """As every `ModelMixin`'s, with a model card; see `DiTClassCondPipeline.push_to_hub`."""
        return hub.push(self, repo_id, **kwargs)


class DiTTransformer2DModel(PackagedModel, transformer_dit.DiTTransformer2DModel):
    __doc__ = transformer_dit.DiTTransformer2DModel.__doc__
    _presets = PRESETS
    _other_class_names = diffusers_dit.CLASS_NAMES

    if TYPE_CHECKING:

        def __init__(self, **config: Any) -> None: ...

        @classmethod
        def from_preset(cls, name: PresetName, **overrides: Any) -> Self: ...

        @overload
        def __call__(
            self,
            hidden_states: torch.Tensor,
            timestep: torch.Tensor | float,
            class_labels: torch.Tensor,
            force_drop_ids: torch.Tensor | None = None,
            modulation: torch.Tensor | None = None,
            attention_kwargs: dict[str, Any] | None = None,
            return_dict: Literal[True] = True,
        ) -> Transformer2DModelOutput: ...

        @overload
        def __call__(
            self,
            hidden_states: torch.Tensor,
            timestep: torch.Tensor | float,
            class_labels: torch.Tensor,
            force_drop_ids: torch.Tensor | None = None,
            modulation: torch.Tensor | None = None,
            attention_kwargs: dict[str, Any] | None = None,
            *,
            return_dict: Literal[False],
        ) -> tuple[torch.Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        forward = __call__

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As every `ConfigMixin`'s; the configuration of diffusers' own DiT is read as well."""
        if isinstance(config, dict) and diffusers_dit.CONFIG_MARK in config:
            config = diffusers_dit.our_config(config)
        return super().from_config(config, return_unused_kwargs, **kwargs)


class JiTTransformer2DModel(PackagedModel, transformer_jit.JiTTransformer2DModel):
    __doc__ = transformer_jit.JiTTransformer2DModel.__doc__
    _presets = JIT_PRESETS

    if TYPE_CHECKING:

        def __init__(self, **config: Any) -> None: ...

        @classmethod
        def from_preset(cls, name: JiTPresetName, **overrides: Any) -> Self: ...


class DDTTransformer2DModel(PackagedModel, transformer_ddt.DDTTransformer2DModel):
    __doc__ = transformer_ddt.DDTTransformer2DModel.__doc__
    _presets = DDT_PRESETS

    if TYPE_CHECKING:

        def __init__(self, **config: Any) -> None: ...

        @classmethod
        def from_preset(cls, name: DDTPresetName, **overrides: Any) -> Self: ...


# By their names, as configurations and rows of families have them.
MODELS: dict[str, type[PackagedModel]] = {
    model.__name__: model for model in (DiTTransformer2DModel, JiTTransformer2DModel, DDTTransformer2DModel)
}


def find_model_class(config: Mapping[str, Any]) -> type[PackagedModel]:
    """The class of a model by its configuration; DiT's also for the stock diffusers classes that it reads."""
    return MODELS.get(str(config.get("_class_name")), DiTTransformer2DModel)
