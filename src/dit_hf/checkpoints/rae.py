"""RAE (https://github.com/bytetriper/RAE): DiT-DH and a LightningDiT, both with Fourier time running as diffusers'."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .lightningdit import LIGHTNINGDIT
from .reference_two_streams import rae_reference_forward
from .two_streams import (
    BLOCK_LAYERS,
    KEYS,
    TwoStreamFamily,
    check_axes,
    count_blocks,
    infer_streams,
    two_stream_tables,
)


LAYERS = {
    "mlp.w12": ("ff.gate_proj", "ff.up_proj"),
    "mlp.w3": ("ff.down_proj",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("modulation",),
}
OWN_KEYS = {
    "t_embedder.W": "time_proj.weight",
    "s_projector.weight": "state_proj.weight",
    "s_projector.bias": "state_proj.bias",
    "final_layer.norm_final.weight": "norm_out.norm.weight",
    "final_layer.adaLN_modulation.1.weight": "norm_out.linear.weight",
    "final_layer.adaLN_modulation.1.bias": "norm_out.linear.bias",
}
TABLES = {
    "pos_embed": "positions",
    "enc_feat_rope.freqs_cos": "rotary_cosines",
    "enc_feat_rope.freqs_sin": "rotary_sines",
    "dec_feat_rope.freqs_cos": "decoder_rotary_cosines",
    "dec_feat_rope.freqs_sin": "decoder_rotary_sines",
}
OPTIONS: dict[str, tuple] = {
    "patch_size": (1,),
    "time_embedding": ("fourier",),
    "position_table": (True, False),
    "rotary_span": (None,),
    "norm": ("rms_norm", "layer_norm"),
    "head_norm": ("rms_norm", "layer_norm"),
    "qk_norm": (False, True),
    "ff": ("swiglu", "gelu"),
    "bias": (True,),
    "modulation_activation": (True,),
    "has_null_class": (True,),
}
# Values of latents that need no shift.
SHIFT_BASE = 4096
AXES = {
    "s_embedder.proj.weight": 4,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "enc_feat_rope.freqs_cos": 2,
    "dec_feat_rope.freqs_cos": 2,
}


def infer_config(
    original: Mapping[str, torch.Tensor],
    num_attention_heads: Sequence[int] | None = None,
    num_encoder_blocks: int | None = None,
) -> dict:
    """
    Reads a model's sizes and options off its weights.

    Args:
        original (`dict[str, torch.Tensor]`): With the original's keys.
        num_attention_heads (`Sequence[int]`, *optional*): Of the two streams; the rotary tables tell as well.
        num_encoder_blocks (`int`, *optional*): Needed if both streams have one width.

    Returns:
        `dict`: arguments of `DDTTransformer2DModel`.

    Raises:
        ValueError: if something can't be known, or the weights contradict each other.
    """
    check_axes(original, AXES)
    if num_encoder_blocks is None:
        num_encoder_blocks = _count_encoder_blocks(original)
    tables = [original[f"{stream}_feat_rope.freqs_cos"] for stream in ("enc", "dec")]
    head_dims = [table.shape[1] for table in tables]
    tokens = len(tables[0])
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(
            f"its table of rotary positions has {tokens} tokens, which is not a square number; only square images can "
            "be converted."
        )
    rms_norm = "blocks.0.norm1.weight" in original
    swiglu = "blocks.0.mlp.w12.weight" in original
    down_layer = "mlp.w3" if swiglu else "mlp.fc2"
    streams = infer_streams(original, head_dims, num_attention_heads, num_encoder_blocks, down_layer)
    norm = "rms_norm" if rms_norm else "layer_norm"
    return streams | {
        "sample_size": math.isqrt(tokens),
        "patch_size": 1,
        "in_channels": original["s_embedder.proj.weight"].shape[1],
        "time_embedding": "fourier",
        "position_table": "pos_embed" in original,
        "rotary_span": None,
        "norm": norm,
        "head_norm": norm,
        "qk_norm": "blocks.0.attn.q_norm.weight" in original,
        "ff": "swiglu" if swiglu else "gelu",
        "bias": True,
        "modulation_activation": True,
    }


def infer(family, original, hints, path):
    """As [`dit_hf.checkpoints.sizes.infer`]."""
    config = infer_config(original, hints.heads(2), hints.num_encoder_blocks)
    return config, original, family.to_ours(original, config)


def latents_shift(config: Mapping) -> float:
    """The shift of training and sampling, by the size of a model's latents; its code has none below 1."""
    return math.sqrt(config["in_channels"] * config["sample_size"] ** 2 / SHIFT_BASE)


def _count_encoder_blocks(original):
    """The blocks of the first width, which only tells where the decoder has another."""
    num_layers = count_blocks(original)
    keys = [f"blocks.{index}.attn.proj.weight" for index in range(num_layers)]
    check_axes(original, dict.fromkeys(keys, 2))
    widths = [len(original[key]) for key in keys]
    if len(set(widths)) == 1:
        raise ValueError(
            f"its {num_layers} blocks have one width, and nothing tells how many are the encoder; pass "
            "num_encoder_blocks (`--num_encoder_blocks`)."
        )
    return sum(width == widths[0] for width in widths)


RAE = TwoStreamFamily(
    "rae",
    KEYS | OWN_KEYS,
    BLOCK_LAYERS | LAYERS,
    OPTIONS,
    tables=TABLES,
    predictions=("velocity",),
    model="DDTTransformer2DModel",
    infer=infer,
    computed_tables=two_stream_tables,
    marks=("enc_feat_rope.",),
    wrapper="ema",
    scheduler="flow_rae",
    shift=latents_shift,
    recommended_call={"num_inference_steps": 49, "guidance_scale": 1.0},
    autoguidance_scale=lambda config: 1.5 if config["sample_size"] >= 32 else 1.42,  # 512 pixels, 256
    reference_forward=rae_reference_forward,
)

# The second class of its code, of one stream.
RAE_LIGHTNINGDIT = replace(
    LIGHTNINGDIT,
    name="rae_lightningdit",
    code_base="rae",
    keys=LIGHTNINGDIT.keys | {"t_embedder.W": "time_proj.weight"},
    options=LIGHTNINGDIT.options | {"time_embedding": ("fourier",), "modulation_shift": (True,)},
    marks=("t_embedder.W",),
    can_lack_marks=False,
    data_at_one=False,
    wrapper="ema",
    scheduler=RAE.scheduler,
    shift=RAE.shift,
    recommended_call=RAE.recommended_call,
)
