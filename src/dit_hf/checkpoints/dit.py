"""The key table of the original DiT: released files, `train.py`, fast-DiT."""

# Keys outside of the blocks: original -> ours.
KEYS = {
    "x_embedder.proj.weight": "pos_embed.proj.weight",
    "x_embedder.proj.bias": "pos_embed.proj.bias",
    "t_embedder.mlp.0.weight": "time_embed.linear_1.weight",
    "t_embedder.mlp.0.bias": "time_embed.linear_1.bias",
    "t_embedder.mlp.2.weight": "time_embed.linear_2.weight",
    "t_embedder.mlp.2.bias": "time_embed.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embed.weight",
    "final_layer.adaLN_modulation.1.weight": "norm_out.linear.weight",
    "final_layer.adaLN_modulation.1.bias": "norm_out.linear.bias",
    "final_layer.linear.weight": "proj_out.weight",
    "final_layer.linear.bias": "proj_out.bias",
}
# Layers of a block: `blocks.N.` + original -> `transformer_blocks.N.` + ours, weight and bias alike. A tuple stands
# for a layer that is one matrix in the original and several, stacked in this order, in ours.
BLOCK_LAYERS = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}
# Computed from the configuration: checked, then dropped.
POSITIONS = "pos_embed"


def key_table(num_layers: int) -> dict[str, str | tuple[str, ...]]:
    """
    Every trained key of a checkpoint.

    Args:
        num_layers (`int`): Blocks of the model.

    Returns:
        `dict`: original key -> our key, or the keys its rows are split into.
    """
    table: dict[str, str | tuple[str, ...]] = dict(KEYS)
    for index in range(num_layers):
        for original, ours in BLOCK_LAYERS.items():
            for kind in ("weight", "bias"):
                names = (ours,) if isinstance(ours, str) else ours
                names = tuple(f"transformer_blocks.{index}.{name}.{kind}" for name in names)
                table[f"blocks.{index}.{original}.{kind}"] = names[0] if len(names) == 1 else names
    return table
