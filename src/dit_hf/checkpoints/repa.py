"""REPA (https://github.com/sihyun-yu/REPA): SiT with projector heads, time running as diffusers' does."""

from dataclasses import replace

from .sit import SIT


# `--qk-norm`
QK_NORMS = {"attn.q_norm": ("attn.norm_q",), "attn.k_norm": ("attn.norm_k",)}

REPA = replace(
    SIT,
    name="repa",
    block_layers=SIT.block_layers | QK_NORMS,
    options=SIT.options | {"qk_norm": (False, True), "learn_sigma": (False,)},
    marks=("projectors.",),
    argument_marks=(),
    can_lack_marks=False,
    data_at_one=False,
    training_only=("projectors.",),
    wrapper="ema",
    # Guidance for times up to 0.7, of steps that run from 1 to 0.
    recommended_call={"num_inference_steps": 250, "guidance_scale": 1.8, "guidance_interval": (0.3, 1.0)},
)
