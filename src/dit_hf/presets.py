"""The twelve model sizes of the paper, with what it reports of them (DiT tables 1 and 4)."""

from typing import Literal, NamedTuple


class Preset(NamedTuple):
    """
    One size. Parameters include the original's frozen position table; Gflops are multiply-adds of one 32×32×4
    latent; FID-50K is after 400 K steps at 256×256 without guidance.
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


def preset_config(name: PresetName) -> dict[str, int]:
    """
    Constructor arguments of a preset.

    Args:
        name (`str`): `"DiT-S/8"` … `"DiT-XL/2"`.

    Returns:
        `dict`: `num_layers`, `num_attention_heads`, `attention_head_dim`, `patch_size`.

    Raises:
        ValueError: if there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    return {
        "num_layers": preset.num_layers,
        "num_attention_heads": preset.num_attention_heads,
        "attention_head_dim": preset.attention_head_dim,
        "patch_size": preset.patch_size,
    }
