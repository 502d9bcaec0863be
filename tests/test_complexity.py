"""Multiply-adds and parameters against the paper's table and torch's own counter."""

import pytest
import torch
from conftest import ARCHITECTURES, DESIGNS, tiny_design, tiny_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_hf import DiTTransformer2DModel, JiTTransformer2DModel
from dit_hf.checkpoints.sizes import KNOWN_HEADS
from dit_hf.complexity import count_macs
from dit_hf.presets import JIT_PRESETS, PRESETS


def preset_on_meta(name, **overrides):
    model_class = JiTTransformer2DModel if name in JIT_PRESETS else DiTTransformer2DModel
    with torch.device("meta"):
        return model_class.from_preset(name, **overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_match_the_paper(name):
    model = preset_on_meta(name)
    assert count_macs(model.config) / 1e9 == pytest.approx(PRESETS[name].gflops, rel=0.01)
    positions = model.pos_embed.positions.numel()  # the original keeps them among its parameters
    assert (model.num_parameters() + positions) / 1e6 == pytest.approx(PRESETS[name].parameters_m, rel=0.01)


@pytest.mark.parametrize("name", JIT_PRESETS)
def test_jit_presets_have_the_counted_parameters(name):
    model = preset_on_meta(name)
    positions = model.pos_embed.positions  # the original keeps them among its parameters
    assert positions.shape[1] == 256
    assert round((model.num_parameters() + positions.numel()) / 1e6, 1) == JIT_PRESETS[name].parameters_m
    assert model.config.noise_scale == model.config.sample_size / 256


def test_jit_gflops_are_the_papers():
    assert {name: round(count_macs(preset_on_meta(name).config) / 1e9) for name in ("JiT-B/16", "JiT-B/32")} == {
        "JiT-B/16": 25,
        "JiT-B/32": 26,
    }


def test_heads_are_the_papers():
    """They change neither parameters nor operations, and conversion reads them off the width."""
    heads = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
    for name, preset in PRESETS.items():
        size, patch = name.removeprefix("DiT-").split("/")
        shape = (preset.num_layers, preset.num_attention_heads, preset.attention_head_dim)
        assert (*shape, preset.patch_size) == (*heads[size], int(patch))
    assert KNOWN_HEADS == {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


def test_measured_parameters():
    """Counted with the original code."""
    for name, millions in {"DiT-S/2": 32.96, "DiT-B/2": 130.51, "DiT-L/2": 458.10, "DiT-XL/2": 675.13}.items():
        model = preset_on_meta(name)
        assert round((model.num_parameters() + model.pos_embed.positions.numel()) / 1e6, 2) == millions


def test_larger_latents():
    assert count_macs(preset_on_meta("DiT-XL/2").config, 64, 64) / 1e9 == pytest.approx(524.60, rel=0.01)


def test_conditionings_match_the_paper():
    paper = {"adaln": 118.56, "adaln_zero": 118.64, "in_context": 119.37, "cross_attention": 137.62}
    counts = {kind: count_macs(preset_on_meta("DiT-XL/2", conditioning=kind).config) / 1e9 for kind in paper}
    assert counts == pytest.approx(paper, rel=0.01)
    assert counts["adaln"] < counts["adaln_zero"] < counts["in_context"] < counts["cross_attention"]


@pytest.mark.parametrize("conditioning", (*DESIGNS, *ARCHITECTURES))
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_counts_equal_torchs_counter(conditioning, size):
    model = tiny_design(conditioning, mlp_ratio=3.0, patch_size=4)
    counter = FlopCounterMode(display=False)
    # The counter does not see the CPU's fused attention.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randn(1, 4, *size), torch.tensor([3.5]), torch.tensor([1]))
    assert counter.get_total_flops() == 2 * count_macs(model.config, *size)


def test_indivisible_sizes_and_unknown_presets_are_refused():
    config = tiny_transformer().config
    with pytest.raises(ValueError, match="7×8"):
        count_macs(config, 7, 8)
    with pytest.raises(ValueError, match="DiT-H/2.*DiT-XL/2"):
        DiTTransformer2DModel.from_preset("DiT-H/2")
    with pytest.raises(ValueError, match="DiT-B/2.*JiT-B/16"):
        JiTTransformer2DModel.from_preset("DiT-B/2")
