"""The model sizes that the papers name, with what is reported of them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


# What a row says beside the constructor's arguments.
REPORTED = ("parameters_m", "gflops", "fid_400k", "fid_600_epochs", "fid", "guidance_scale")


class Preset(NamedTuple):
    """
    One of DiT's twelve sizes (tables 1 and 4). Parameters include the original's frozen position table; Gflops are
    multiply-adds of one 32×32×4 latent; FID-50K is after 400 K steps at 256×256 without guidance.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    patch_size: int
    parameters_m: float
    gflops: float
    fid_400k: float


# fmt: off
PresetName = Literal[
    "DiT-S/8", "DiT-S/4", "DiT-S/2", "DiT-B/8", "DiT-B/4", "DiT-B/2",
    "DiT-L/8", "DiT-L/4", "DiT-L/2", "DiT-XL/8", "DiT-XL/4", "DiT-XL/2",
]
# fmt: on

# fmt: off
PRESETS: dict[PresetName, Preset] = {
    #                    layers heads head_dim patch  params  Gflops     FID
    "DiT-S/8":  Preset(      12,    6,      64,    8,   33.0,   0.36, 153.60),
    "DiT-S/4":  Preset(      12,    6,      64,    4,   33.0,   1.41, 100.41),
    "DiT-S/2":  Preset(      12,    6,      64,    2,   33.0,   6.06,  68.40),
    "DiT-B/8":  Preset(      12,   12,      64,    8,  131.0,   1.42, 122.74),
    "DiT-B/4":  Preset(      12,   12,      64,    4,  130.0,   5.56,  68.38),
    "DiT-B/2":  Preset(      12,   12,      64,    2,  130.0,  23.01,  43.47),
    "DiT-L/8":  Preset(      24,   16,      64,    8,  459.0,   5.01, 118.87),
    "DiT-L/4":  Preset(      24,   16,      64,    4,  458.0,  19.70,  45.64),
    "DiT-L/2":  Preset(      24,   16,      64,    2,  458.0,  80.71,  23.33),
    "DiT-XL/8": Preset(      28,   16,      72,    8,  676.0,   7.39, 106.41),
    "DiT-XL/4": Preset(      28,   16,      72,    4,  675.0,  29.05,  43.01),
    "DiT-XL/2": Preset(      28,   16,      72,    2,  675.0, 118.64,  19.47),
}
# fmt: on


class JiTPreset(NamedTuple):
    """
    One of JiT's sizes, for 256×256 or 512×512 (JiT table 6). Parameters include the frozen position table; FID-50K is
    after 600 epochs, with guidance of this scale, against the authors' own reference statistics.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    patch_size: int
    sample_size: int
    bottleneck_dim: int
    in_context_start: int
    dropout: float
    noise_scale: float
    parameters_m: float
    fid_600_epochs: float
    guidance_scale: float


JiTPresetName = Literal["JiT-B/16", "JiT-L/16", "JiT-H/16", "JiT-B/32", "JiT-L/32", "JiT-H/32"]

# fmt: off
JIT_PRESETS: dict[JiTPresetName, JiTPreset] = {
    #                       layers heads head_dim patch sample bottleneck context dropout noise params   FID scale
    "JiT-B/16": JiTPreset(      12,   12,      64,   16,   256,       128,      4,    0.0,  1.0, 131.3, 3.66,  3.0),
    "JiT-L/16": JiTPreset(      24,   16,      64,   16,   256,       128,      8,    0.0,  1.0, 459.1, 2.36,  2.4),
    "JiT-H/16": JiTPreset(      32,   16,      80,   16,   256,       256,     10,    0.2,  1.0, 952.8, 1.86,  2.2),
    "JiT-B/32": JiTPreset(      12,   12,      64,   32,   512,       128,      4,    0.0,  2.0, 133.4, 4.02,  3.0),
    "JiT-L/32": JiTPreset(      24,   16,      64,   32,   512,       128,      8,    0.0,  2.0, 461.8, 2.53,  2.5),
    "JiT-H/32": JiTPreset(      32,   16,      80,   32,   512,       256,     10,    0.2,  2.0, 956.4, 1.94,  2.3),
}
# fmt: on


# The options of RAE's DiT-DH, where the defaults of `DDTTransformer2DModel` are DDT's.
RAE_DIT_DH: dict[str, Any] = {
    "time_embedding": "fourier",
    "position_table": True,
    "rotary_span": None,
    "head_norm": "rms_norm",
    "qk_norm": False,
    "bias": True,
    "modulation_activation": True,
}


class DDTPreset(NamedTuple):
    """
    A published size of DDT, or of RAE's DiT-DH on latents of DINOv2-B. Parameters are the trained ones; FID-50K is
    that of the published weights at 256×256: DDT's with classifier-free guidance, DiT-DH's with autoguidance.
    """

    num_layers: int
    num_encoder_layers: int
    num_attention_heads: int
    attention_head_dim: int
    decoder_num_attention_heads: int | None
    decoder_attention_head_dim: int | None
    patch_size: int
    in_channels: int
    sample_size: int
    parameters_m: float
    fid: float | None
    time_embedding: str = "sinusoidal"
    position_table: bool = False
    rotary_span: float | None = 16.0
    head_norm: str = "layer_norm"
    qk_norm: bool = True
    bias: bool = False
    modulation_activation: bool = False


DDTPresetName = Literal["DDT-XL/2", "RAE-DiT-DH-XL", "RAE-DiT-DH-S"]

# fmt: off
DDT_PRESETS: dict[DDTPresetName, DDTPreset] = {
    #                      layers encoder heads dim  decoder's   patch channels size params   FID
    "DDT-XL/2":      DDTPreset(28,    22,   16,  72, None, None,     2,       4,  32, 674.6, 1.26),
    "RAE-DiT-DH-XL": DDTPreset(30,    28,   16,  72,   16,  128,     1,     768,  16, 838.4, 1.13, **RAE_DIT_DH),
    "RAE-DiT-DH-S":  DDTPreset(14,    12,    6,  64,   16,  128,     1,     768,  16, 196.4, None, **RAE_DIT_DH),
}
# fmt: on


def preset_config(name: str, presets: Mapping[Any, NamedTuple] = PRESETS) -> dict[str, Any]:
    """
    Constructor arguments of a preset.

    Args:
        name (`str`): `"DiT-S/8"` … `"DiT-XL/2"`, or a name of `presets`.
        presets (`Mapping`, defaults to `PRESETS`): The table of the model's architecture.

    Returns:
        `dict`: the row without the reported values (parameters, Gflops, FID).

    Raises:
        ValueError: if there is no such preset.

    Example:

        >>> from dit_hf.presets import preset_config
        >>> config = preset_config("DiT-XL/2")
        >>> config["num_layers"], config["num_attention_heads"], config["attention_head_dim"], config["patch_size"]
        (28, 16, 72, 2)
    """
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(presets)}.")
    return {option: value for option, value in presets[name]._asdict().items() if option not in REPORTED}
