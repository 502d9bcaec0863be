"""LightningDiT (https://github.com/hustvl/LightningDiT): SwiGLU, rotary positions, RMS and QK norms, without shift."""

from dataclasses import replace

from .repa import QK_NORMS
from .sit import SIT


LAYERS = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "mlp.w12": ("ff.gate_proj", "ff.up_proj"),
    "mlp.w3": ("ff.down_proj",),
}
OPTIONS = {
    "position_embedding": ("sincos", "sincos+rope"),
    "norm": ("layer_norm", "rms_norm"),
    "qk_norm": (False, True),
    "ff": ("gelu", "swiglu"),
    "modulation_shift": (True, False),
}

LIGHTNINGDIT = replace(
    SIT,
    name="lightningdit",
    keys=SIT.keys | {"final_layer.norm_final.weight": "norm_out.norm.weight"},
    block_layers=SIT.block_layers | LAYERS | QK_NORMS,
    options=SIT.options | OPTIONS,
    tables=SIT.tables | {"feat_rope.freqs_cos": "rotary_cosines", "feat_rope.freqs_sin": "rotary_sines"},
    marks=("feat_rope.", "blocks.0.mlp.w12.", "blocks.0.norm1.", "blocks.0.attn.q_norm."),
    argument_marks=(),
    # Its guidance belongs to its shift of time, and differs from checkpoint to checkpoint.
    recommended_call={"num_inference_steps": 250},
)
