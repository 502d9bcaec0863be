"""REPA (https://github.com/sihyun-yu/REPA): SiT with projector heads, time running as diffusers' does."""

from dataclasses import replace

from .dit import BLOCK_LAYERS, DIT


# `--qk-norm`
QK_NORMS = {"attn.q_norm": ("attn.norm_q",), "attn.k_norm": ("attn.norm_k",)}

REPA = replace(DIT, name="repa", block_layers=BLOCK_LAYERS | QK_NORMS, flow_matching=True, aside="projectors.")
