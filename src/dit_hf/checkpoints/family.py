"""What sets one code base's checkpoints apart from another's, as data, and the two ways through it."""

from dataclasses import dataclass, field

import torch

from ..transformer_dit import FREQUENCY_DIM


# The longest period of the sinusoidal timestep embedding, over 2π.
MAX_PERIOD = 10000.0


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
        blocks (`str`): The original's name of the list of blocks.
        computed (`tuple[str, ...]`): Tables computed from the configuration: checked or left out on reading, written.
        flow_matching (`bool`): Whether the models are trained with time in [0, 1] to predict a velocity.
        data_at_one (`bool`):
            Whether time 1 is the data and the velocity data − noise, the reverse of diffusers; both are then baked
            into the weights.
        aside (`str`, *optional*): Prefix of keys that only training needs; they are kept in a file of their own.
    """

    name: str
    keys: dict[str, str]
    block_layers: dict[str, tuple[str, ...]]
    blocks: str = "blocks"
    computed: tuple[str, ...] = field(default=("pos_embed",))
    flow_matching: bool = False
    data_at_one: bool = False
    aside: str | None = None

    def key_table(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """
        Every trained key that a checkpoint can have.

        Args:
            num_layers (`int`): Blocks of the model.

        Returns:
            `dict`: original key -> our keys, several where the original stacks them.
        """
        table: dict[str, tuple[str, ...]] = {original: (ours,) for original, ours in self.keys.items()}
        for index in range(num_layers):
            for original, names in self.block_layers.items():
                for kind in ("weight", "bias"):
                    table[f"{self.blocks}.{index}.{original}.{kind}"] = tuple(
                        f"transformer_blocks.{index}.{name}.{kind}" for name in names
                    )
        return table

    def to_ours(self, original: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
        """
        Renames, splits and bakes; keys that the table does not know are left out.

        Args:
            original (`dict[str, torch.Tensor]`): In the original's words.
            num_layers (`int`): Blocks of the model.

        Returns:
            `dict[str, torch.Tensor]`: in ours; views of the given tensors but for the baked ones.
        """
        converted: dict[str, torch.Tensor] = {}
        for key, names in self.key_table(num_layers).items():
            if key in original:
                weight = original[key]
                parts = weight.tensor_split(len(names)) if weight.ndim and len(names) > 1 else (weight,)
                converted.update(zip(names, parts, strict=False))
        return bake_conventions(converted) if self.data_at_one else converted

    def to_original(self, ours: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
        """
        The reverse of [`to_ours`].

        Args:
            ours (`dict[str, torch.Tensor]`): A `DiTTransformer2DModel`'s state dict.
            num_layers (`int`): Blocks of the model.

        Returns:
            `dict[str, torch.Tensor]`: in the original's words, without computed tables.

        Raises:
            ValueError: naming a weight that this family has no place for.
        """
        table = self.key_table(num_layers)
        stray = sorted(set(ours) - {name for names in table.values() for name in names})
        if stray:
            raise ValueError(f"A {self.name} checkpoint has no place for {stray[0]!r} ({len(stray)} such weights).")
        ours = bake_conventions(ours) if self.data_at_one else ours
        return {
            key: torch.cat([ours[name] for name in names]) if len(names) > 1 else ours[names[0]]
            for key, names in table.items()
            if all(name in ours for name in names)
        }


def bake_conventions(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Turns weights that run from noise at 0 to data at 1 into weights that run the other way, or back.

    The sign of the velocity goes into the head. Time goes into the first layer after the sinusoidal embedding:
    cos(f(1−s)) and sin(f(1−s)) are linear in cos(fs) and sin(fs). Done twice it changes nothing.

    Args:
        weights (`dict[str, torch.Tensor]`): In our words.

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
        frequencies = MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)
        cosine, sine = weights[key].double().chunk(2, dim=1)
        columns = (
            cosine * frequencies.cos() + sine * frequencies.sin(),
            cosine * frequencies.sin() - sine * frequencies.cos(),
        )
        # Half precision would not come back; the model keeps this layer in float32 anyway.
        weights[key] = torch.cat(columns, dim=1).to(torch.promote_types(weights[key].dtype, torch.float32))
    return weights
