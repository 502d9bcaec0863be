"""Hostile adapters: refused before anything is allocated or changed."""

import json
import os
import pickle

import pytest
import torch
from conftest import tiny_transformer
from safetensors.torch import save_file

from dit_hf import DiTClassCondPipeline, make_scheduler


LAYER = "transformer.transformer_blocks.0.attn.to_q."
DOWN, UP = torch.ones(4, 48), torch.ones(48, 4)


def pair(down=DOWN, up=UP, layer=LAYER):
    return {f"{layer}lora_A.weight": down, f"{layer}lora_B.weight": up}


def metadata(**changes):
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]} | changes
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}


# name -> (tensors, metadata, words of the message)
REFUSED = {
    "ranks differ": (pair(up=torch.ones(48, 5)), None, ["to_q", "(4, 48)", "(48, 5)"]),
    "width": (pair(down=torch.ones(4, 47)), None, ["to_q", "(4, 47)"]),
    "axes": (pair(down=torch.ones(4)), None, ["to_q", "(4,)"]),
    "rank 0": (pair(torch.ones(0, 48), torch.ones(48, 0)), None, ["to_q", "(0, 48)"]),
    "one alone": ({f"{LAYER}lora_A.weight": DOWN}, None, ["to_q", "both"]),
    "nan": (pair(down=DOWN * float("nan")), None, ["lora_A", "finite"]),
    "integers": (pair(down=DOWN.int()), None, ["lora_A", "int32"]),
    "no linear layer": (pair(layer="transformer.transformer_blocks.0.norm1."), None, ["LayerNorm"]),
    "no such layer": (pair(layer="transformer.blocks.0."), None, ["blocks.0"]),
    "metadata rank": (pair(), metadata(r=10**9), ["transformer.r", "1000000000", "at most 4"]),
    "metadata rank text": (pair(), metadata(r="x"), ["transformer.r", "'x'"]),
    "metadata ranks": (pair(), metadata(rank_pattern={"to_q": 10**9}), ["rank_pattern", "1000000000"]),
    "metadata alpha": (pair(), metadata(lora_alpha=float("nan")), ["lora_alpha", "nan"]),
    "metadata alpha 0": (pair(), metadata(lora_alpha=0), ["lora_alpha: 0", "no effect"]),
    "metadata alpha 1e300": (pair(), metadata(lora_alpha=1e300), ["lora_alpha: 1e+300", "1048576"]),
    "metadata alphas": (pair(), metadata(alpha_pattern={"to_q": float("nan")}), ["alpha_pattern", "nan"]),
    "metadata targets": (pair(), metadata(target_modules=5), ["adapters of", "int"]),
    "metadata unknown": (pair(), metadata(what=5), ["adapters of"]),
    "metadata bias": (pair(), metadata(bias="x"), ["adapters of", "bias"]),
    "metadata list": (pair(), {"lora_adapter_metadata": "[1]"}, ["list"]),
    "metadata no JSON": (pair(), {"lora_adapter_metadata": "{x"}, ["adapters of"]),
}


@pytest.fixture
def pipe():
    return DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"))


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_adapters_change_nothing(name, pipe, tmp_path):
    tensors, metadata, words = REFUSED[name]
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata=metadata)
    before = set(pipe.transformer.state_dict())
    with pytest.raises(ValueError) as error:
        pipe.load_lora_weights(tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert set(pipe.transformer.state_dict()) == before


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_damaged_files_are_named(content, pipe, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        pipe.load_lora_weights(tmp_path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_adapters_run_no_code(pipe, tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for options in ({}, {"use_safetensors": False}, {"weight_name": "pytorch_lora_weights.bin"}):
        with pytest.raises((ValueError, OSError)):
            pipe.load_lora_weights(tmp_path, **options)
    assert not (tmp_path / "ran").exists()


def test_values_that_are_no_adapters(pipe):
    for source in ({f"{LAYER}lora_A.weight": 5}, {5: DOWN}, 5, {}):
        with pytest.raises(ValueError):
            pipe.load_lora_weights(source)
    for name in (5, "", "a.b"):
        with pytest.raises(ValueError, match="adapter_name"):
            pipe.load_lora_weights(pair(), adapter_name=name)
    pipe.load_lora_weights(pair(), adapter_name="a")
    with pytest.raises(ValueError, match="already"):
        pipe.load_lora_weights(pair(), adapter_name="a")
    pipe.set_adapters(["a"])  # the first is still there
