"""Original checkpoints in: every dimension is read off the weights, and what does not fit is named."""

import argparse
import json
import pickle
import re
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, load_golden, tiny_inputs
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
from dit_hf.transformer_dit import sincos_positions


SCRIPT = ROOT / "conversion" / "convert_original_to_hf.py"
EXPECTED = {
    "dit_p2": {"sample_size": 8, "patch_size": 2, "in_channels": 4, "learn_sigma": True},
    "dit_p4_fixed_sigma": {"sample_size": 8, "patch_size": 4, "in_channels": 4, "learn_sigma": False},
    "dit_p8_in3": {"sample_size": 16, "patch_size": 8, "in_channels": 3, "learn_sigma": True},
}
COMMON = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12, "num_classes": 10, "mlp_ratio": 4.0}


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def convert(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return run_forked(command)


def original_weights(name="dit_p2"):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", EXPECTED)
def test_dimensions_are_read_off_the_weights(name):
    model = DiTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", num_attention_heads=4)
    expected = COMMON | EXPECTED[name]
    assert {key: model.config[key] for key in expected} == expected
    assert not model.training


def test_known_widths_need_no_heads(tmp_path):
    """A file of width 384 has 6 heads, as DiT-S has."""
    weights = original_weights("dit_p4_fixed_sigma")
    torch.save({key: widened(key, value) for key, value in weights.items()}, tmp_path / "wide.pt")
    assert DiTTransformer2DModel.from_single_file(tmp_path / "wide.pt").config.num_attention_heads == 6


def widened(key, value):
    """A weight of the fixture with every multiple of its width 48 eight times as large."""
    kept = {"t_embedder.mlp.0.weight": 1, "x_embedder.proj.weight": 1}.get(key, 2)
    shape = [side * 8 if side % 48 == 0 and axis < kept else side for axis, side in enumerate(value.shape)]
    return sincos_positions(2, 2, 384) if key == "pos_embed" else torch.zeros(shape)


def test_safetensors_and_training_weights(tmp_path):
    save_file(original_weights(), tmp_path / "dit.safetensors")
    inputs = tiny_inputs()
    with torch.no_grad():
        outputs = [
            DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, weights=weights)(**inputs).sample
            for file, weights in (
                (FIXTURES / "dit_p2.pt", "ema"),
                (tmp_path / "dit.safetensors", "ema"),
                (FIXTURES / "dit_p2_train.pt", "ema"),
                (FIXTURES / "dit_p2_train.pt", "model"),
            )
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[2], outputs[3])


def test_half_precision():
    model = DiTTransformer2DModel.from_single_file(
        FIXTURES / "dit_p2.pt", num_attention_heads=4, torch_dtype=torch.bfloat16
    )
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.time_embed.linear_1.weight.dtype == torch.float32
    with torch.no_grad():
        output = model(**tiny_inputs() | {"hidden_states": tiny_inputs()["hidden_states"].bfloat16()}).sample
    assert output.dtype == torch.bfloat16


def test_script_writes_a_pipeline(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "names.json").write_text(json.dumps([f"class {index}" for index in range(10)]))
    result = convert(
        *("--checkpoint_path", FIXTURES / "dit_p2_train.pt", "--output_dir", tmp_path / "out"),
        *("--num_attention_heads", 4, "--vae", tmp_path / "vae", "--id2label", tmp_path / "names.json"),
    )
    assert result.returncode == 0, result.stderr
    assert "10 classes" in result.stdout
    folders = {path.relative_to(tmp_path / "out").parts[0] for path in (tmp_path / "out").rglob("*")}
    code_and_card = {"pipeline_dit_class_cond.py", "README.md"}
    assert folders == {"model_index.json", "transformer", "scheduler", "vae"} | code_and_card
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe.labels["class 7"] == 7
    golden = load_golden("dit_p2_train.ema.io")
    with torch.no_grad():
        output = pipe.transformer(golden["x"], golden["t"], golden["y"]).sample
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)
    assert pipe("class 3", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
    again = convert("--checkpoint_path", FIXTURES / "dit_p2.pt", "--output_dir", tmp_path / "out")
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_fixed_variance_gets_a_scheduler_without_learned_variance(tmp_path):
    file = FIXTURES / "dit_p4_fixed_sigma.pt"
    result = convert("--checkpoint_path", file, "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.returncode == 0, result.stderr
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe(3, num_inference_steps=2, output_type="latent").images.isfinite().all()


class Stranger:
    """Nothing that a checkpoint may hold."""


def write_damaged(kind, path):
    weights = original_weights()
    if kind == "missing key":
        del weights["blocks.1.attn.proj.bias"]
    elif kind == "extra key":
        weights["blocks.1.attn.q_norm.weight"] = torch.ones(12)
    elif kind == "no DiT":
        weights = {"conv.weight": torch.ones(3)}
    elif kind == "stray value":
        weights["note"] = "hello"
    elif kind == "wrong shape":
        weights["blocks.1.attn.proj.bias"] = torch.ones(47)
    elif kind == "wrong rank":
        weights["x_embedder.proj.weight"] = torch.ones(48, 16)
    elif kind == "other positions":
        weights["pos_embed"] = torch.randn(1, 16, 48)
    elif kind == "tensor for weights":
        weights = {"ema": torch.ones(3)}
    elif kind == "pickle":
        weights = {"ema": weights, "args": argparse.Namespace(model="DiT"), "extra": Stranger()}
    torch.save(weights, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:200_000])
    if kind == "text":
        path.write_text("not a checkpoint")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing key", "blocks.1.attn.proj.bias"),
        ("extra key", "blocks.1.attn.q_norm.weight"),
        ("no DiT", "x_embedder.proj.weight"),
        ("stray value", "note"),
        ("wrong shape", "blocks.1.attn.proj.bias"),
        ("wrong rank", "x_embedder.proj.weight"),
        ("other positions", "pos_embed"),
        ("tensor for weights", "Tensor"),
        ("pickle", "Stranger"),
        ("truncated", "Can't read"),
        ("text", "Can't read"),
    ],
)
def test_bad_files_are_refused(tmp_path, kind, message):
    write_damaged(kind, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=rf"bad\.pt.*{re.escape(message)}|{message}.*bad\.pt"):
        DiTTransformer2DModel.from_single_file(tmp_path / "bad.pt", num_attention_heads=4)


@pytest.mark.parametrize("kind", ["missing key", "truncated"])
def test_script_exits_with_2_and_leaves_nothing(tmp_path, kind):
    write_damaged(kind, tmp_path / "bad.pt")
    result = convert(
        *("--checkpoint_path", tmp_path / "bad.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    )
    assert result.returncode == 2, result.stderr
    assert "bad.pt" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_pickles_are_not_executed(tmp_path):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (tmp_path / "attack.pt").write_bytes(pickle.dumps({"ema": Attack()}))
    torch.save({"ema": Attack()}, tmp_path / "attack2.pt")
    for name in ("attack.pt", "attack2.pt"):
        with pytest.raises(ValueError, match=name):
            DiTTransformer2DModel.from_single_file(tmp_path / name)
    assert not marker.exists()


def test_other_mistakes_are_named(tmp_path):
    file = FIXTURES / "dit_p2.pt"
    with pytest.raises(ValueError, match="width 48 .*num_attention_heads"):
        DiTTransformer2DModel.from_single_file(file)
    with pytest.raises(ValueError, match="48 is not divisible by 5"):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=5)
    with pytest.raises(ValueError, match="no checkpoint file"):
        DiTTransformer2DModel.from_single_file(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="'average'"):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, weights="average")
    with pytest.raises(ValueError, match="'unet'"):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, family="unet")
    (tmp_path / "names.json").write_text('["one", "two"]')
    result = convert(
        *("--checkpoint_path", file, "--output_dir", tmp_path / "out", "--num_attention_heads", 4),
        *("--id2label", tmp_path / "names.json"),
    )
    assert result.returncode == 2
    assert "names 2 classes" in result.stderr
