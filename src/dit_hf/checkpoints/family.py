"""What sets one code base's checkpoints apart from another's, as a row of data that is used in both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..schedulers import SchedulerRecipe
from ..transformer_dit import FREQUENCY_DIM, sincos_positions
from .reference import reference_forward
from .sizes import infer


# The longest period of the sinusoidal timestep embedding, over 2π.
MAX_PERIOD = 10000.0


def computed_tables(model) -> dict[str, torch.Tensor]:
    """
    What a model computes from its configuration and some code bases store.

    Args:
        model (`DiTTransformer2DModel`): The model.

    Returns:
        `dict[str, torch.Tensor]`: by the names that [`Family`]'s `tables` use; rotary ones only if the model has them.
    """
    tables = {"positions": model.pos_embed.positions}
    if model.rotary_embed is not None:
        cosines, sines = model.rotary_embed(*model.pos_embed.base_size, torch.device("cpu"))
        tables |= {"rotary_cosines": cosines, "rotary_sines": sines}
    return tables


@dataclass(frozen=True)
class Family:
    """
    A code base whose checkpoints can be read and written.

    Args:
        name (`str`): As `--family` takes it.
        keys (`dict[str, str]`): Keys outside of the blocks, original -> ours.
        block_layers (`dict[str, tuple[str, ...]]`):
            Layers of a block, original -> ours, weight and bias alike; several of ours where one matrix of the
            original holds them, stacked in this order. Layers that only some configurations have are in it too.
        options (`dict[str, tuple]`):
            The values that this code base can build of the model's options; `has_null_class` stands for
            `class_dropout_prob > 0`. A single value is set when a checkpoint is read.
        tables (`dict[str, str]`):
            Computed tensors that its checkpoints hold, original key -> name of the table in [`computed_tables`]. They
            are compared with the computed ones on reading, and written.
        predictions (`tuple[str, ...]`):
            What its code takes the model's output for, as [`dit_hf.schedulers.trained_prediction`] names it; the first
            is what its checkpoints are trained for.
        blocks (`str`): The original's name of the list of blocks.
        block_copies (`dict[str, str]`): Keys that the original repeats in every block and we have once.
        marks (`tuple[str, ...]`): Beginnings of keys; any of them identifies the family.
        argument_marks (`tuple[str, ...]`): Training arguments; any of them identifies the family.
        can_lack_marks (`bool`): Whether it also writes checkpoints without any mark, whose keys are DiT's.
        trained_with (`dict[str, tuple]`): Training arguments that must have one of these values where they are known.
        data_at_one (`bool`):
            Whether time 1 is the data and the velocity data − noise, the reverse of diffusers.
        bakes (`bool`): Whether that is baked into the weights, or the model itself computes the reverse.
        max_period (`float`): The longest period of its timestep embedding, over 2π, for the time that is baked.
        model (`str`): The class of the model.
        code_base (`str`, *optional*): The name of another family of the same code base, which stands for this one too.
        infer (`Callable`): Config, original weights and ours of a checkpoint, see [`dit_hf.checkpoints.sizes.infer`].
        computed_tables (`Callable`): The tables of a model, see [`computed_tables`].
        training_only (`tuple[str, ...]`):
            Prefixes of keys that the model does not compute with; they are kept in a separate file.
        needs_training_only (`bool`): Whether its code loads no checkpoint without them.
        wrapper (`str`, *optional*): Entry of a `.pt` file that its code takes the weights from.
        other_wrappers (`tuple[str, ...]`): Entries that its code reads as well; they get the same weights.
        writes_tables (`bool`): Whether its checkpoints hold `tables`, or only older ones did.
        read_config (`Callable`, *optional*): The model's options in a file beside a checkpoint, by the latter's path.
        read_arguments (`Callable`, *optional*): Training arguments in such a file, where the checkpoint has none.
        trained_options (`Callable`, *optional*):
            The model's options that the training arguments tell and the weights don't.
        save_folder (`Callable`, *optional*): Writes a folder from the model's config, the original weights and a path.
        reference_forward (`Callable`): The forward pass of the original weights, see [`reference_forward`].
        scheduler (`str`): The recipe of its sampler.
        shift (`Callable`, *optional*): The shift of its sampler, by the model's config; 1 if not given.
        scaling_factor (`float`, *optional*): Of the latents, where its code does not take the autoencoder's own.
        latents_statistics (`Callable`, *optional*):
            Mean and standard deviation of the latents, per channel, from the `training_only` weights of a checkpoint
            and the number of channels.
        recommended_call (`dict`): Sampling settings of the published results, as the pipeline's `recommended_call`.
        guidance_scale (`Callable`, *optional*): That of the published results, by the model's config.
        autoguidance_scale (`Callable`, *optional*): The same with a guide.
        published_license (`str`, *optional*): Licence of the code base's own 1000-class weights.
        reading_note (`str`, *optional*): What a user should know about a model that was read.
        writing_note (`str`, *optional*): What a user should know about a checkpoint that was written.
    """

    name: str
    keys: dict[str, str]
    block_layers: dict[str, tuple[str, ...]]
    options: dict[str, tuple]
    tables: dict[str, str]
    predictions: tuple[str, ...]
    blocks: str = "blocks"
    block_copies: dict[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    argument_marks: tuple[str, ...] = ()
    can_lack_marks: bool = False
    trained_with: dict[str, tuple] = field(default_factory=dict)
    data_at_one: bool = False
    bakes: bool = True
    max_period: float = MAX_PERIOD
    model: str = "DiTTransformer2DModel"
    code_base: str | None = None
    infer: Callable[..., tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = infer
    computed_tables: Callable[..., dict[str, torch.Tensor]] = computed_tables
    training_only: tuple[str, ...] = ()
    needs_training_only: bool = True
    wrapper: str | None = None
    other_wrappers: tuple[str, ...] = ()
    writes_tables: bool = True
    read_config: Callable[[Path], dict] | None = None
    read_arguments: Callable[[Path], dict] | None = None
    trained_options: Callable[[dict], dict] | None = None
    save_folder: Callable[[Mapping, dict[str, torch.Tensor], Path], None] | None = None
    reference_forward: Callable[..., torch.Tensor] = reference_forward
    scheduler: SchedulerRecipe = "ddpm"
    shift: Callable[[Mapping], float] | None = None
    scaling_factor: float | None = None
    latents_statistics: Callable[[dict[str, torch.Tensor], int], tuple[list[float], list[float]]] | None = None
    recommended_call: dict = field(default_factory=dict)
    guidance_scale: Callable[[Mapping], float] | None = None
    autoguidance_scale: Callable[[Mapping], float] | None = None
    published_license: str | None = None
    reading_note: str | None = None
    writing_note: str | None = None

    @property
    def flow_matching(self) -> bool:
        """Whether the models are trained with time in [0, 1] to predict a velocity."""
        return self.predictions == ("velocity",)

    def published_call(self, config: Mapping, has_guide: bool = False) -> dict:
        """
        Sampling settings of the published results.

        Args:
            config (`Mapping`): Of the model.
            has_guide (`bool`, defaults to `False`): Whether a weaker model guides it.

        Returns:
            `dict`: as the pipeline's `recommended_call`.
        """
        call, scale = dict(self.recommended_call), self.autoguidance_scale if has_guide else self.guidance_scale
        if config.get("class_dropout_prob") == 0 or has_guide:  # no guidance away from the null class
            call = {name: value for name, value in call.items() if not name.startswith("guidance")}
        if scale and (has_guide or "guidance_scale" in call):
            call["guidance_scale"] = scale(config)
        if "guidance_channels" in call and call["guidance_channels"] > config["in_channels"]:
            del call["guidance_channels"]
        return call

    def key_table(self, config: Mapping) -> dict[str, tuple[str, ...]]:
        """
        Every trained key that a checkpoint can have.

        Args:
            config (`Mapping`): Of the model; its `num_layers` counts.

        Returns:
            `dict`: original key -> our keys, several where the original stacks them.
        """
        table: dict[str, tuple[str, ...]] = {original: (ours,) for original, ours in self.keys.items()}
        for index in range(config["num_layers"]):
            for original, names in self.block_layers.items():
                for kind in ("weight", "bias"):
                    table[f"{self.blocks}.{index}.{original}.{kind}"] = tuple(
                        f"transformer_blocks.{index}.{name}.{kind}" for name in names
                    )
            for original, ours in self.block_copies.items():
                table[f"{self.blocks}.{index}.{original}"] = (ours,)
        return table

    def select_copies(
        self, original: dict[str, torch.Tensor], num_layers: int, block: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        The weights that the original repeats in every block, once.

        Args:
            original (`dict[str, torch.Tensor]`): With the original's keys.
            num_layers (`int`): Blocks of the model.
            block (`int`, *optional*): Take this block's copy, whatever the others hold.

        Returns:
            `dict[str, torch.Tensor]`: with our keys; empty for a family that repeats nothing.

        Raises:
            ValueError: if a copy is missing, or the copies differ and no block was named.
        """
        if block is not None and not self.block_copies:
            raise ValueError(f"{self.name} has one copy of its embedders; omit `--embedders_of_block`.")
        if block is not None and not 0 <= block < num_layers:
            raise ValueError(f"there is no block {block} to take the embedders from; it has 0 to {num_layers - 1}.")
        selected = {}
        for name, ours in self.block_copies.items():
            keys = [f"{self.blocks}.{index}.{name}" for index in range(num_layers)]
            missing = [key for key in keys if key not in original]
            if missing:
                raise ValueError(f"the key {missing[0]!r} is missing.")
            apart = [index for index, key in enumerate(keys) if not torch.equal(original[key], original[keys[0]])]
            if apart and block is None:
                raise ValueError(
                    f"the copies of {name!r} were trained apart: {len(apart)} of {num_layers} blocks differ from "
                    f"block 0 (the first is {apart[0]}). Choose one with `dit-hf convert --embedders_of_block N`."
                )
            selected[ours] = original[keys[block or 0]]
        return selected

    def to_ours(
        self, original: dict[str, torch.Tensor], config: Mapping, block: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Renames, splits and bakes; keys that the table does not know are dropped.

        Args:
            original (`dict[str, torch.Tensor]`): With the original's keys.
            config (`Mapping`): Of the model; what [`key_table`] takes.
            block (`int`, *optional*): As [`select_copies`] takes it.

        Returns:
            `dict[str, torch.Tensor]`: with our keys; views of the given tensors except for the baked ones.

        Raises:
            ValueError: as [`select_copies`].
        """
        converted: dict[str, torch.Tensor] = {}
        for key, names in self.key_table(config).items():
            if key in original:
                weight = original[key]
                parts = weight.tensor_split(len(names)) if weight.ndim and len(names) > 1 else (weight,)
                converted.update(zip(names, parts, strict=False))
        converted |= self.select_copies(original, config["num_layers"], block)
        return bake_conventions(converted, self.max_period) if self.data_at_one and self.bakes else converted

    def to_original(self, ours: dict[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
        """
        The reverse of [`to_ours`].

        Args:
            ours (`dict[str, torch.Tensor]`): The model's state dict.
            config (`Mapping`): Of the model; what [`key_table`] takes.

        Returns:
            `dict[str, torch.Tensor]`: with the original's keys, without computed tables.

        Raises:
            ValueError: naming a weight that this family has no key for.
        """
        table = self.key_table(config)
        stray = sorted(set(ours) - {name for names in table.values() for name in names})
        if stray:
            raise ValueError(f"A {self.name} checkpoint has no key for {stray[0]!r} ({len(stray)} such weights).")
        ours = bake_conventions(ours, self.max_period) if self.data_at_one and self.bakes else ours
        original = {
            key: torch.cat([ours[name] for name in names]) if len(names) > 1 else ours[names[0]]
            for key, names in table.items()
            if all(name in ours for name in names)
        }
        repeated = set(self.block_copies.values())  # files hold no tensor under two keys
        return {key: value.clone() if table[key][0] in repeated else value for key, value in original.items()}

    @property
    def fixed_options(self) -> dict:
        """The model's options that are the same for every checkpoint of this family."""
        fixed = {name: values[0] for name, values in self.options.items() if len(values) == 1}
        fixed.pop("has_null_class", None)
        return fixed

    def select(self, state_dict: dict[str, torch.Tensor], weights: str) -> tuple[dict[str, torch.Tensor], str | None]:
        """
        One of the models in a state dict that holds several.

        Args:
            state_dict (`dict[str, torch.Tensor]`): With the original's keys.
            weights (`str`): As [`dit_hf.checkpoints.reading.find_entry`] takes it.

        Returns:
            `tuple`: its weights, and how their keys began; None if there is only one model.
        """
        return state_dict, None

    def file_keys(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's weights with the keys that a file of this code base has, the reverse of [`select`]."""
        return weights

    def find_mismatch(self, config: Mapping) -> str | None:
        """
        The first option of a model that this code base can't build.

        Args:
            config (`Mapping`): Of a `DiTTransformer2DModel`.

        Returns:
            `str`: the option, its value and the values that are needed; None if it can build the model.
        """
        known = {**config, "has_null_class": config.get("class_dropout_prob", 1) > 0}
        for name, allowed in self.options.items():
            if name in known and known[name] not in allowed:
                return f"{name}={known[name]!r}, where {' or '.join(map(repr, allowed))} is needed"
        return None


def without_weights(build: Callable[[], Any]) -> Any:
    """
    A model whose parameters have a shape and no memory. accelerate's `init_empty_weights` would do the same to models
    that other threads build meanwhile.

    Args:
        build (`Callable`): Makes a `DiTTransformer2DModel`.

    Returns:
        `DiTTransformer2DModel`
    """
    with torch.device("meta"):
        model = build()
    embed = getattr(model, "pos_embed", None)
    if embed is not None and "positions" not in embed.state_dict():  # computed, and so in no checkpoint
        height, width = embed.base_size
        embed.positions = sincos_positions(height, width, embed.dim)
    return model


def bake_conventions(weights: dict[str, torch.Tensor], max_period: float = MAX_PERIOD) -> dict[str, torch.Tensor]:
    """
    Turns weights that run from noise at 0 to data at 1 into weights that run the other way, or back.

    The sign of the velocity goes into the head. Time goes into the first layer after the sinusoidal embedding:
    cos(f(1−s)) and sin(f(1−s)) are linear in cos(fs) and sin(fs). Done twice it changes nothing.

    Args:
        weights (`dict[str, torch.Tensor]`): With our keys.
        max_period (`float`, defaults to 10000): The longest period of the sinusoidal embedding, over 2π.

    Returns:
        `dict[str, torch.Tensor]`: a copy of the dictionary with three weights replaced; those absent stay so.
    """
    weights = dict(weights)
    for key in ("proj_out.weight", "proj_out.bias"):
        if key in weights:
            weights[key] = -weights[key]
    key = "time_embed.linear_1.weight"
    if key in weights and weights[key].ndim == 2 and weights[key].shape[1] == FREQUENCY_DIM:
        half = FREQUENCY_DIM // 2
        frequencies = max_period ** -(torch.arange(half, dtype=torch.float64, device=weights[key].device) / half)
        cosine, sine = weights[key].double().chunk(2, dim=1)
        columns = (
            cosine * frequencies.cos() + sine * frequencies.sin(),
            cosine * frequencies.sin() - sine * frequencies.cos(),
        )
        # Half precision would not come back; the model keeps this layer in float32 anyway.
        weights[key] = torch.cat(columns, dim=1).to(torch.promote_types(weights[key].dtype, torch.float32))
    return weights
