"""LightningDiT (https://github.com/hustvl/LightningDiT): SwiGLU, rotary positions, RMS and QK norms, without shift."""

from dataclasses import replace

from .repa import QK_NORMS
from .sit import SIT


ROTARY = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
LAYERS = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "mlp.w12": ("ff.gate_proj", "ff.up_proj"),
    "mlp.w3": ("ff.down_proj",),
}

LIGHTNINGDIT = replace(
    SIT,
    name="lightningdit",
    keys=SIT.keys | {"final_layer.norm_final.weight": "norm_out.norm.weight"},
    block_layers=SIT.block_layers | LAYERS | QK_NORMS,
    computed=(*SIT.computed, *ROTARY),
)
