"""The format of diffusers' own DiT, which keeps a copy of the embedders in every block."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel as StockDiTTransformer2DModel

from ..files import read_json
from ..transformer_dit import sincos_positions
from .dit import DIT
from .family import Family, without_weights
from .reference import reference_forward


KEYS = {
    "pos_embed.proj.weight": "pos_embed.proj.weight",
    "pos_embed.proj.bias": "pos_embed.proj.bias",
    "proj_out_1.weight": "norm_out.linear.weight",
    "proj_out_1.bias": "norm_out.linear.bias",
    "proj_out_2.weight": "proj_out.weight",
    "proj_out_2.bias": "proj_out.bias",
}
BLOCK_LAYERS: dict[str, tuple[str, ...]] = {
    "attn1.to_q": ("attn.to_q",),
    "attn1.to_k": ("attn.to_k",),
    "attn1.to_v": ("attn.to_v",),
    "attn1.to_out.0": ("attn.to_out.0",),
    "ff.net.0.proj": ("ff.net.0.proj",),
    "ff.net.2": ("ff.net.2",),
    "norm1.linear": ("modulation",),
}
EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1.weight": "time_embed.linear_1.weight",
    "norm1.emb.timestep_embedder.linear_1.bias": "time_embed.linear_1.bias",
    "norm1.emb.timestep_embedder.linear_2.weight": "time_embed.linear_2.weight",
    "norm1.emb.timestep_embedder.linear_2.bias": "time_embed.linear_2.bias",
    "norm1.emb.class_embedder.embedding_table.weight": "class_embed.weight",
}
# In a configuration, what only the stock format has.
CONFIG_MARK = "num_embeds_ada_norm"
# Classes of the transformer in diffusers; folders of 2022, such as facebook/DiT-XL-2-256, have the second.
CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")
CORRECTED = (
    "a diffusers DiT was read: its timestep embedding is corrected (frequency shift 0, as the weights were trained, "
    "not 1; norm epsilon 1e-6)"
)
STOCK_DIFFERS = (
    "diffusers' own DiT computes these weights differently: its timestep embedding has a frequency shift of 1, and "
    "the weights were trained with 0. Load it with dit_hf for the right images"
)

# The defaults of a stock configuration, and the options that must not be changed.
STOCK_DEFAULTS = {
    **{"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 28},
    **{"num_attention_heads": 16, "attention_head_dim": 72, "num_embeds_ada_norm": 1000},
}
STOCK_NEEDED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}


def our_config(stock: Mapping) -> dict:
    """
    A stock configuration in the arguments of `DiTTransformer2DModel`.

    Args:
        stock (`dict`): The `config.json` of diffusers' own DiT.

    Returns:
        `dict`

    Raises:
        ValueError: if an option that the weights do not tell is not the one we compute.
    """
    stock = STOCK_DEFAULTS | dict(stock)
    for name, needed in STOCK_NEEDED.items():
        if stock.get(name, needed) != needed:
            raise ValueError(f"A diffusers DiT with {name}={stock[name]!r} can't be read; only {needed!r} can.")
    in_channels, out_channels = stock["in_channels"], stock.get("out_channels")
    learn_sigma = isinstance(in_channels, int) and out_channels == 2 * in_channels
    if not learn_sigma and out_channels not in (None, in_channels):
        raise ValueError(
            f"A diffusers DiT with out_channels={out_channels!r} can't be read; it must be in_channels or twice that."
        )
    return {
        "sample_size": stock["sample_size"],
        "patch_size": stock["patch_size"],
        "in_channels": in_channels,
        "num_layers": stock["num_layers"],
        "num_attention_heads": stock["num_attention_heads"],
        "attention_head_dim": stock["attention_head_dim"],
        "num_classes": stock["num_embeds_ada_norm"],
        "learn_sigma": learn_sigma,
    }


def stock_config(ours: Mapping) -> dict:
    """
    The reverse of [`our_config`].

    Args:
        ours (`dict`): A `DiTTransformer2DModel`'s config.

    Returns:
        `dict`: arguments of diffusers' own `DiTTransformer2DModel`.
    """
    same = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    config = {name: ours[name] for name in same}
    config["out_channels"] = ours["in_channels"] * (2 if ours["learn_sigma"] else 1)
    config |= {"num_embeds_ada_norm": ours["num_classes"], "norm_eps": 1e-6}
    return config


def correct_stock_model(model_class, stock):
    """
    Diffusers' own DiT as ours, sharing its weights.

    Args:
        model_class (`type`): `DiTTransformer2DModel` of this package.
        stock (`diffusers.DiTTransformer2DModel`): The model.

    Returns:
        `DiTTransformer2DModel`: in eval mode.
    """
    model = without_weights(lambda: model_class.from_config(dict(stock.config)))
    model.load_state_dict(to_our_state_dict(stock.state_dict()), strict=True, assign=True)
    model.time_embed.float()  # as `from_pretrained` keeps it
    return model.eval()


def to_our_state_dict(stock: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames a stock state dict; what it does not know stays under its own name, so that it is noticed.

    Args:
        stock (`dict[str, torch.Tensor]`): With the stock model's keys.

    Returns:
        `dict[str, torch.Tensor]`: with our keys, sharing the tensors.

    Raises:
        ValueError: if a copy of the embedders is missing, or the copies differ.
    """
    layers = {"num_layers": count_layers(stock)}
    known = set(DIFFUSERS.key_table(layers)) | set(DIFFUSERS.tables)
    return DIFFUSERS.to_ours(stock, layers) | {key: value for key, value in stock.items() if key not in known}


def count_layers(stock: dict[str, torch.Tensor]) -> int:
    """Number of blocks of a stock state dict."""
    return 1 + max(int(key.split(".")[1]) for key in stock if key.startswith("transformer_blocks."))


def stock_reference_forward(
    weights: dict[str, torch.Tensor], config: Mapping, latents: torch.Tensor, time: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The stock format's weights as the DiT that they were trained as; see [`reference_forward`]."""
    ours = to_our_state_dict({key: value for key, value in weights.items() if key not in DIFFUSERS.tables})
    width, _, patch_size, _ = ours["pos_embed.proj.weight"].shape
    rows, columns = (size // patch_size for size in latents.shape[-2:])
    positions = sincos_positions(rows, columns, width)
    original = DIT.to_original(ours, {"num_layers": count_layers(weights)}) | {"pos_embed": positions}
    return reference_forward(original, config, latents, time, labels)


def read_config_beside(checkpoint: Path) -> dict:
    """
    The stock `config.json` beside a checkpoint.

    Args:
        checkpoint (`Path`): A file of weights.

    Returns:
        `dict`: arguments of `DiTTransformer2DModel`; empty if there is no such file.

    Raises:
        ValueError: if its options can't be read; the message names the file.
    """
    file = checkpoint.with_name("config.json")
    config = read_json(file) if file.exists() else {}
    try:
        return our_config(config) if CONFIG_MARK in config else {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def save_stock_folder(config: Mapping, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """
    Writes a folder that `diffusers.DiTTransformer2DModel.from_pretrained` loads.

    Args:
        config (`Mapping`): Of a `DiTTransformer2DModel` of this package.
        weights (`dict[str, torch.Tensor]`): With the stock model's keys.
        folder (`Path`): Created.
    """
    stock = StockDiTTransformer2DModel(**stock_config(config))
    stock.load_state_dict(weights, strict=True, assign=True)
    stock.save_pretrained(folder)


DIFFUSERS = Family(
    "diffusers",
    KEYS,
    BLOCK_LAYERS,
    options=DIT.options | {"mlp_ratio": (4.0,), "has_null_class": (True,)},
    tables={"pos_embed.pos_embed": "positions"},
    predictions=("epsilon", "v_prediction", "sample"),  # its scheduler says which
    blocks="transformer_blocks",
    block_copies=EMBEDDERS,
    marks=("transformer_blocks.0.norm1.emb.",),
    writes_tables=False,
    read_config=read_config_beside,
    save_folder=save_stock_folder,
    reference_forward=stock_reference_forward,
    recommended_call=DIT.recommended_call,
    published_license=DIT.published_license,
    reading_note=CORRECTED,
    writing_note=STOCK_DIFFERS,
)
