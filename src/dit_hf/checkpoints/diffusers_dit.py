"""The format of diffusers' own DiT, which keeps a copy of the embedders in every block."""

import torch
from accelerate import init_empty_weights

from .family import Family


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
# Embedders, in every block: original -> ours.
EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1.weight": "time_embed.linear_1.weight",
    "norm1.emb.timestep_embedder.linear_1.bias": "time_embed.linear_1.bias",
    "norm1.emb.timestep_embedder.linear_2.weight": "time_embed.linear_2.weight",
    "norm1.emb.timestep_embedder.linear_2.bias": "time_embed.linear_2.bias",
    "norm1.emb.class_embedder.embedding_table.weight": "class_embed.weight",
}
# In a state dict or a configuration, what only the stock format has.
MARK = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"
CONFIG_MARK = "num_embeds_ada_norm"
CORRECTED = (
    "a diffusers DiT was read: its timestep embedding is corrected (frequency shift 0, as the weights were trained, "
    "not 1; norm epsilon 1e-6)"
)

# What a stock configuration leaves out, and what it must not change.
STOCK_DEFAULTS = {
    **{"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 28},
    **{"num_attention_heads": 16, "attention_head_dim": 72, "num_embeds_ada_norm": 1000},
}
STOCK_NEEDED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}

DIFFUSERS = Family("diffusers", KEYS, BLOCK_LAYERS, blocks="transformer_blocks", computed=("pos_embed.pos_embed",))


def take_embedders(
    stock: dict[str, torch.Tensor], num_layers: int, block: int | None = None
) -> dict[str, torch.Tensor]:
    """
    The embedders of a stock state dict, once.

    Args:
        stock (`dict[str, torch.Tensor]`): In the stock model's words.
        num_layers (`int`): Blocks of the model.
        block (`int`, *optional*): Take this block's copy, whatever the others hold.

    Returns:
        `dict[str, torch.Tensor]`: in our words.

    Raises:
        ValueError: if a copy is missing, or the copies differ and no block was named.
    """
    if block is not None and not 0 <= block < num_layers:
        raise ValueError(f"There is no block {block} to take the embedders from; the model has 0 to {num_layers - 1}.")
    embedders = {}
    for name, ours in EMBEDDERS.items():
        keys = [f"transformer_blocks.{index}.{name}" for index in range(num_layers)]
        missing = [key for key in keys if key not in stock]
        if missing:
            raise ValueError(f"the key {missing[0]!r} is missing.")
        apart = [index for index, key in enumerate(keys) if not torch.equal(stock[key], stock[keys[0]])]
        if apart and block is None:
            raise ValueError(
                f"the copies of {name!r} were trained apart: {len(apart)} of {num_layers} blocks differ from block 0 "
                f"(the first is {apart[0]}). Choose one with `convert_original_to_hf.py --embedders_of_block N`."
            )
        embedders[ours] = stock[keys[block or 0]]
    return embedders


def give_embedders(ours: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """
    The reverse of [`take_embedders`]: a copy of the embedders for every block.

    Args:
        ours (`dict[str, torch.Tensor]`): In our words.
        num_layers (`int`): Blocks of the model.

    Returns:
        `dict[str, torch.Tensor]`: in the stock model's words.
    """
    return {
        f"transformer_blocks.{index}.{name}": ours[key].clone()
        for index in range(num_layers)
        for name, key in EMBEDDERS.items()
    }


def our_config(stock: dict) -> dict:
    """
    A stock configuration in the arguments of `DiTTransformer2DModel`.

    Args:
        stock (`dict`): The `config.json` of diffusers' own DiT.

    Returns:
        `dict`

    Raises:
        ValueError: if an option that leaves no trace in the weights is not the one we compute.
    """
    stock = STOCK_DEFAULTS | stock
    for name, needed in STOCK_NEEDED.items():
        if stock.get(name, needed) != needed:
            raise ValueError(f"A diffusers DiT with {name}={stock[name]!r} can't be read; only {needed!r} can.")
    in_channels = stock["in_channels"]
    return {
        "sample_size": stock["sample_size"],
        "patch_size": stock["patch_size"],
        "in_channels": in_channels,
        "num_layers": stock["num_layers"],
        "num_attention_heads": stock["num_attention_heads"],
        "attention_head_dim": stock["attention_head_dim"],
        "num_classes": stock["num_embeds_ada_norm"],
        "learn_sigma": (stock.get("out_channels") or in_channels) == 2 * in_channels,
    }


def stock_config(ours: dict) -> dict:
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
    with init_empty_weights():
        model = model_class.from_config(dict(stock.config))
    model.load_state_dict(to_our_state_dict(stock.state_dict()), strict=True, assign=True)
    model.time_embed.float()  # as `from_pretrained` keeps it
    return model.eval()


def to_our_state_dict(stock: dict[str, torch.Tensor], block: int | None = None) -> dict[str, torch.Tensor]:
    """
    Renames a stock state dict; what it does not know stays under its own name, so that it is noticed.

    Args:
        stock (`dict[str, torch.Tensor]`): In the stock model's words.
        block (`int`, *optional*): Take this block's embedders, whatever the others hold.

    Returns:
        `dict[str, torch.Tensor]`: in our words, sharing the tensors.

    Raises:
        ValueError: if the copies of the embedders differ and no block was named.
    """
    num_layers = 1 + max(int(key.split(".")[1]) for key in stock if key.startswith("transformer_blocks."))
    ours = DIFFUSERS.to_ours(stock, num_layers) | take_embedders(stock, num_layers, block)
    known = set(DIFFUSERS.key_table(num_layers)) | set(DIFFUSERS.computed)
    known |= {f"transformer_blocks.{index}.{name}" for index in range(num_layers) for name in EMBEDDERS}
    return ours | {key: value for key, value in stock.items() if key not in known}
