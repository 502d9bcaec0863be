"""What the code bases of two-stream models share: one list of blocks, of which the first ones are the encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..transformer_ddt import stream_sizes, swiglu_width
from .family import Family
from .sizes import infer_mlp_ratio


# What `torch.compile` puts before the keys of a model.
COMPILED = "_orig_mod."
# The decoder's layers, and those of time and class; the encoder's patches are `s_embedder`.
KEYS = {
    "t_embedder.mlp.0.weight": "time_embed.linear_1.weight",
    "t_embedder.mlp.0.bias": "time_embed.linear_1.bias",
    "t_embedder.mlp.2.weight": "time_embed.linear_2.weight",
    "t_embedder.mlp.2.bias": "time_embed.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embed.weight",
    "s_embedder.proj.weight": "patch_embed.proj.weight",
    "s_embedder.proj.bias": "patch_embed.proj.bias",
    "x_embedder.proj.weight": "decoder_patch_embed.proj.weight",
    "x_embedder.proj.bias": "decoder_patch_embed.proj.bias",
    "final_layer.linear.weight": "proj_out.weight",
    "final_layer.linear.bias": "proj_out.bias",
}
BLOCK_LAYERS: dict[str, tuple[str, ...]] = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.q_norm": ("attn.norm_q",),
    "attn.k_norm": ("attn.norm_k",),
    "attn.proj": ("attn.to_out.0",),
}


# How a weight is laid out in ours, and back.
Layout = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class TwoStreamFamily(Family):
    """
    A code base of two-stream models.

    Args:
        prefixes (`dict[str, str]`):
            Which weights -> how their keys begin, where one state dict holds them all; the average first.
        layouts (`Callable`, *optional*):
            From a model's config to what the original lays out in another way, by the ends of our keys.
    """

    prefixes: dict[str, str] = field(default_factory=dict)
    layouts: Callable[[Mapping], dict[str, Layout]] = field(default=lambda config: {})

    def select(self, state_dict: dict[str, torch.Tensor], weights: str) -> tuple[dict[str, torch.Tensor], str | None]:
        """As [`Family.select`], without the prefix of `torch.compile`; training-only weights stay."""
        present = [name for name, prefix in self.prefixes.items() if any(key.startswith(prefix) for key in state_dict)]
        if not present:
            return state_dict, None
        name = present[0] if weights == "auto" else weights
        if name not in present:
            raise ValueError(f"it has no {name!r} weights; pass weights={present[0]!r} (`--weights {present[0]}`).")
        prefix = self.prefixes[name]
        selected = {
            key.removeprefix(prefix).removeprefix(COMPILED): weight
            for key, weight in state_dict.items()
            if key.startswith((prefix, *self.training_only))
        }
        return selected, prefix.removesuffix(".")

    def file_keys(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As [`Family.file_keys`]: the weights are the average's."""
        prefix = next(iter(self.prefixes.values()), "")
        return {key if key.startswith(self.training_only) else prefix + key: value for key, value in weights.items()}

    def key_table(self, config: Mapping) -> dict[str, tuple[str, ...]]:
        """As [`Family.key_table`]; the blocks from `num_encoder_layers` on are the decoder's."""
        first = config["num_encoder_layers"]

        def place(name):
            blocks, index, layer = name.split(".", 2)
            return f"decoder_blocks.{int(index) - first}.{layer}" if int(index) >= first else name

        return {
            original: tuple(map(place, names)) if original.startswith(f"{self.blocks}.") else names
            for original, names in super().key_table(config).items()
        }

    def to_ours(
        self, original: dict[str, torch.Tensor], config: Mapping, block: int | None = None
    ) -> dict[str, torch.Tensor]:
        """As [`Family.to_ours`], laid out as ours."""
        return self._lay_out(super().to_ours(original, config, block), config, 0)

    def to_original(self, ours: dict[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
        """The reverse of [`to_ours`]."""
        return super().to_original(self._lay_out(ours, config, 1), config)

    def _lay_out(self, weights, config, direction):
        changed = {}
        for ending, layout in self.layouts(config).items():
            for name in (name for name in weights if name.endswith(ending)):
                try:
                    changed[name] = layout[direction](weights[name])
                except (IndexError, RuntimeError):
                    key = next(key for key, names in self.key_table(config).items() if name in names)
                    raise ValueError(
                        f"{key!r} has shape {tuple(weights[name].shape)}, which fits no such model."
                    ) from None
        return weights | changed


def reorder(order: torch.Tensor) -> Layout:
    """A layout whose rows are the original's in another order."""
    inverse = order.argsort()

    def take(index: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: weight[index.to(weight.device)]

    return take(order), take(inverse)


def infer_streams(
    original: Mapping[str, torch.Tensor],
    head_dims: Sequence[int] | None,
    num_attention_heads: Sequence[int] | None,
    num_encoder_blocks: int,
    down_layer: str,
) -> dict:
    """
    Reads the sizes of the two streams off the weights.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys.
        head_dims (`Sequence[int]`, *optional*): Channels per head of the two streams, if the weights tell.
        num_attention_heads (`Sequence[int]`, *optional*):
            One number, or that of each stream; needed if the weights don't tell.
        num_encoder_blocks (`int`): How many blocks, the first ones, are the encoder.
        down_layer (`str`): The original's name of a block's last feed-forward layer.

    Returns:
        `dict`: arguments of `DDTTransformer2DModel`.

    Raises:
        ValueError: if the weights contradict each other, or the heads can't be known.
    """
    num_layers = count_blocks(original)
    if not 0 < num_encoder_blocks < num_layers:
        raise ValueError(
            f"of its {num_layers} blocks {num_encoder_blocks} can't be the encoder; pass num_encoder_blocks "
            f"(`--num_encoder_blocks`) from 1 to {num_layers - 1}."
        )
    widths = [len(original[f"{name}_embedder.proj.weight"]) for name in "sx"]
    if num_attention_heads is not None:
        heads = list(num_attention_heads) * (2 if len(num_attention_heads) == 1 else 1)
        if len(heads) != 2:
            raise ValueError(f"num_attention_heads has {len(heads)} numbers; a model of two streams has one or two.")
    elif head_dims is not None:
        heads = [width // head_dim for width, head_dim in zip(widths, head_dims, strict=True)]
    else:
        raise ValueError(
            f"the heads of streams of width {widths[0]} and {widths[1]} are unknown; pass num_attention_heads "
            "(`--num_attention_heads ENCODER DECODER`)."
        )
    for width, count in zip(widths, heads, strict=True):
        if count < 1 or width % count:
            raise ValueError(f"the width {width} is not divisible by {count} attention heads.")
    same = widths[0] == widths[1] and heads[0] == heads[1]
    return {
        "num_layers": num_layers,
        "num_encoder_layers": num_encoder_blocks,
        "num_attention_heads": heads[0],
        "attention_head_dim": widths[0] // heads[0],
        "decoder_num_attention_heads": None if same else heads[1],
        "decoder_attention_head_dim": None if same else widths[1] // heads[1],
        "mlp_ratio": _mlp_ratio(original, widths, num_encoder_blocks, down_layer),
        "num_classes": len(original["y_embedder.embedding_table.weight"]) - 1,
    }


def count_blocks(original: Mapping[str, torch.Tensor]) -> int:
    """
    The number of blocks.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys.

    Returns:
        `int`

    Raises:
        ValueError: naming a block that is missing.
    """
    indices = {key.split(".")[1] for key in original if key.startswith("blocks.")}
    for index in range(len(indices)):
        if str(index) not in indices:
            raise ValueError(f"the keys of 'blocks.{index}.' are missing.")
    return len(indices)


def check_axes(original: Mapping[str, torch.Tensor], axes: Mapping[str, int]) -> None:
    """
    That the weights whose shapes tell the sizes are there.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys.
        axes (`dict[str, int]`): Key -> number of axes.

    Raises:
        ValueError: naming the key.
    """
    for key, rank in axes.items():
        if key not in original:
            raise ValueError(f"the key {key!r} is missing.")
        shape = tuple(original[key].shape)
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"{key!r} has shape {shape}, where {rank} axes are needed.")


def _mlp_ratio(original, widths, num_encoder_blocks, down_layer):
    """A ratio that gives both streams' hidden widths again, through the truncations of the model's arithmetic."""
    layers = [f"blocks.{index}.{down_layer}.weight" for index in (0, num_encoder_blocks)]
    check_axes(original, dict.fromkeys(layers, 2))
    hidden = [original[layer].shape[1] for layer in layers]
    gated = "blocks.0.mlp.fc1.weight" not in original
    for inner, width in zip(hidden, widths, strict=True):
        ratio = infer_mlp_ratio(inner, width, gated)
        if hidden == [swiglu_width(width, ratio) if gated else int(width * ratio) for width in widths]:
            return ratio
    raise ValueError(f"feed-forward widths of {hidden} at widths of {widths} can't be expressed as one ratio.")


def two_stream_tables(model) -> dict[str, torch.Tensor]:
    """
    What a two-stream model computes from its configuration and RAE stores.

    Args:
        model (`DDTTransformer2DModel`): The model.

    Returns:
        `dict[str, torch.Tensor]`: by the names that [`Family`]'s `tables` use.
    """
    side = model.config.sample_size // model.config.patch_size
    tables = {} if model.pos_embed is None else {"positions": model.pos_embed.positions}
    for prefix, (_, _, head_dim) in zip(("", "decoder_"), stream_sizes(model.config), strict=True):
        cosines, sines = model.rotary_embed(side, side, head_dim, torch.device("cpu"))
        tables |= {f"{prefix}rotary_cosines": cosines, f"{prefix}rotary_sines": sines}
    return tables
