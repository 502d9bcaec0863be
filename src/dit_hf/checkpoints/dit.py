"""The original DiT: released files, `train.py`, fast-DiT (https://github.com/facebookresearch/DiT)."""

from .family import Family


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
BLOCK_LAYERS: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("modulation",),
}
OPTIONS: dict[str, tuple] = {
    "conditioning": ("adaln_zero",),
    "position_embedding": ("sincos",),
    "norm": ("layer_norm",),
    "qk_norm": (False,),
    "ff": ("gelu",),
    "modulation_shift": (True,),
    "learn_sigma": (True, False),
    "timestep_scale": (1.0,),  # time in [0, 1000)
    "interval_embedding": (False,),
    "guidance_in_weights": (False,),
    "time_embedding": ("sinusoidal",),
}

DIT = Family(
    "dit",
    KEYS,
    BLOCK_LAYERS,
    OPTIONS,
    tables={"pos_embed": "positions"},
    predictions=("epsilon",),
    can_lack_marks=True,
    recommended_call={"num_inference_steps": 250, "guidance_scale": 1.5, "guidance_channels": 3},  # DiT §4
    published_license="cc-by-nc-4.0",
)
