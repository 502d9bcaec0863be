"""Every family of checkpoints: the same numbers as the original code computes, and back to a file it loads."""

import argparse
import json
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, load_golden, tiny_inputs, tiny_transformer
from safetensors.torch import load_file, save_file
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.checkpoints import DIT, FAMILIES
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.checkpoints.reference import reference_forward
from dit_hf.checkpoints.saving import original_state_dict, save_original


# Fixture -> family, its model's time for the original's, and the sign of its velocity.
FLOW = {
    "sit_p2": ("sit", lambda time: 1 - time, -1),
    "repa_sit_p2": ("repa", lambda time: time, 1),
    "lightningdit_0": ("lightningdit", lambda time: 1 - time, -1),
    "lightningdit_1": ("lightningdit", lambda time: 1 - time, -1),
}
ALL = {name: family for name, (family, *_) in FLOW.items()} | {
    "dit_p2": "dit",
    "dit_p4_fixed_sigma": "dit",
    "dit_p8_in3": "dit",
    "rae_lightningdit": "rae_lightningdit",
}


def load(name, **options):
    return DiTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", num_attention_heads=4, **options)


def run_script(name, **flags):
    arguments = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value) if part is not True]
    command = [sys.executable, ROOT / "conversion" / f"{name}.py", *arguments]
    return run_forked(command, ROOT)


def forward(model):
    """With a gradient, so that the same kernels run as in other code bases: without one, CPU inference fuses some."""
    channels, size = model.config.in_channels, model.config.sample_size
    return model(**tiny_inputs(channels=channels, height=size, width=size)).sample.detach()


@pytest.mark.parametrize("name", FLOW)
def test_forward_equals_the_original(name):
    family, our_time, sign = FLOW[name]
    golden = load_golden(f"{name}.io")
    model = load(name, family=family)
    with torch.no_grad():
        output = model(golden["x"], our_time(golden["t"]) * 1000, golden["y"]).sample[:, : golden["x"].shape[1]]
    torch.testing.assert_close(output, sign * golden["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FLOW)
def test_euler_sampling_equals_the_original(name):
    golden = load_golden(f"{name}.io")
    pipe = DiTClassCondPipeline(load(name, family=FLOW[name][0]), make_scheduler("flow_euler"))
    sample = pipe(
        golden["ode_y"],
        latents=golden["ode_z"],
        guidance_scale=float(golden["ode_cfg"]),
        num_inference_steps=int(golden["ode_steps"]),
        output_type="latent",
    ).images
    error = (sample - golden["ode_sample"]).norm() / golden["ode_sample"].norm()
    assert error < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_the_oracle_equals_the_original(name):
    """The forward pass that conversions are verified with is itself held against the recorded outputs."""
    golden = load_golden(f"{name}.io")
    weights = parse_checkpoint(FIXTURES / f"{name}.pt", 4, ALL[name]).original
    output = reference_forward(weights, {"num_attention_heads": 4}, golden["x"], golden["t"], golden["y"])[
        :, : golden["out"].shape[1]
    ]
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_round_trip(name, ending, tmp_path):
    checkpoint = parse_checkpoint(FIXTURES / f"{name}.pt", 4, ALL[name])
    save_file(checkpoint.training_only or {"none": torch.zeros(1)}, tmp_path / "projectors.safetensors")
    save_original(
        load(name, family=ALL[name]),
        FAMILIES[ALL[name]],
        tmp_path / f"back.{ending}",
        tmp_path / "projectors.safetensors",
    )
    file = tmp_path / f"back.{ending}"
    back = torch.load(file, weights_only=True) if ending == "pt" else load_file(file)
    back = back.get("ema", back)
    given = checkpoint.original | checkpoint.training_only
    assert back.keys() == given.keys()
    inexact = {key for key in given if not torch.equal(given[key], back[key])}
    baked = {"t_embedder.mlp.0.weight"} if ALL[name] in ("sit", "lightningdit") else set()
    assert inexact <= baked | set(FAMILIES[ALL[name]].tables)
    assert max((given[key] - back[key]).abs().max() for key in given) <= 1e-6
    if ALL[name] == "repa":  # its code takes `["ema"]` without asking
        assert ending == "safetensors" or torch.load(file, weights_only=True).keys() == {"ema"}


def test_families_are_told_by_their_keys(tmp_path, caplog):
    expected = {name: "dit" if family == "sit" else family for name, family in ALL.items()}
    for name, family in expected.items():
        caplog.clear()
        assert parse_checkpoint(FIXTURES / f"{name}.pt", 4).family.name == family
        assert ("--family sit" in caplog.text) == (family == "dit")
    weights = torch.load(FIXTURES / "sit_p2.pt", weights_only=True)
    arguments = argparse.Namespace(path_type="Linear", prediction="velocity", num_classes=10)
    torch.save({"ema": weights, "args": arguments}, tmp_path / "sit.pt")
    assert parse_checkpoint(tmp_path / "sit.pt", 4).family.name == "sit"
    arguments.prediction = "noise"
    torch.save({"ema": weights, "args": arguments}, tmp_path / "sit.pt")
    with pytest.raises(ValueError, match="prediction='noise'"):
        parse_checkpoint(tmp_path / "sit.pt", 4)


def save_with_rows(rows, path, arguments=None):
    """The fixture with a class table of this many rows."""
    weights = torch.load(FIXTURES / "dit_p2.pt", weights_only=True)
    weights["y_embedder.embedding_table.weight"] = 0.1 * torch.randn(rows, 48)
    torch.save({"ema": weights} | ({"args": argparse.Namespace(**arguments)} if arguments else {}), path)


@pytest.mark.parametrize(
    ("rows", "arguments", "given", "classes", "is_guess"),
    [
        (11, {"num_classes": 11}, None, 11, False),
        (11, {"num_classes": 10}, None, 10, False),
        (11, {"num_classes": 11}, True, 10, False),
        (11, None, None, 10, True),
        (11, None, False, 11, False),
        (1001, None, None, 1000, False),  # ImageNet's
        (1000, None, None, 1000, True),
        (1000, None, True, 999, False),
        (1, None, None, 1, False),
        (2, None, None, 1, True),
    ],
)
def test_the_null_class(rows, arguments, given, classes, is_guess, tmp_path, caplog):
    """Neither keys nor shapes tell whether the last row is the null class: a guess is logged."""
    save_with_rows(rows, tmp_path / "a.pt", arguments)
    config = parse_checkpoint(tmp_path / "a.pt", 4, "dit", has_null_class=given).config
    assert config["num_classes"] == classes
    assert (config.get("class_dropout_prob") == 0) == (rows == classes)
    assert (f"class table of {rows} rows is read as" in caplog.text) == is_guess


def test_a_null_class_that_can_not_be_is_refused(tmp_path):
    save_with_rows(1, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: its class table has one row"):
        parse_checkpoint(tmp_path / "a.pt", 4, "dit", has_null_class=True)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_class_converts_samples_and_goes_back(rows, tmp_path):
    save_with_rows(rows, tmp_path / "one.pt")
    flags = {"checkpoint_path": tmp_path / "one.pt", "family": "dit", "num_attention_heads": 4}
    result = run_script("convert_original_to_hf", **flags, output_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert " 1 class," in result.stdout
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe.resolve_call()["guidance_scale"] == (1.5 if rows == 2 else 1)
    assert pipe(0, num_inference_steps=1, output_type="latent").images.isfinite().all()
    save_original(pipe.transformer, DIT, tmp_path / "back.pt")
    table = "y_embedder.embedding_table.weight"
    back, given = (torch.load(tmp_path / name, weights_only=True) for name in ("back.pt", "one.pt"))
    assert torch.equal(back[table], given["ema"][table])


def test_no_row_is_lost_by_the_flag(tmp_path):
    save_with_rows(10, tmp_path / "ten.pt")
    flags = {"checkpoint_path": tmp_path / "ten.pt", "family": "dit", "num_attention_heads": 4}
    result = run_script("convert_original_to_hf", **flags, output_dir=tmp_path / "out", no_null_class=True)
    assert result.returncode == 0, result.stderr
    assert "10 classes" in result.stdout and "no null class" in result.stdout
    verified = run_script("verify_parity", **flags, model_path=tmp_path / "out", no_null_class=True)
    assert verified.returncode == 0, verified.stderr
    options = {"num_attention_heads": 4, "family": "dit", "has_null_class": False}
    assert DiTTransformer2DModel.from_single_file(tmp_path / "ten.pt", **options).config.num_classes == 10
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe.resolve_call()["guidance_scale"] == 1
    assert pipe(9, num_inference_steps=1, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize(
    ("name", "asked", "looks"),
    [
        ("dit_p2", "repa", "dit"),
        ("repa_sit_p2", "sit", "repa"),
        ("dit_p2", "diffusers", "dit"),
        ("lightningdit_0", "dit", "lightningdit"),
    ],
)
def test_another_family_than_the_keys_say_is_refused(name, asked, looks):
    with pytest.raises(ValueError, match=f"is not a {asked} model; its keys look like {looks}"):
        parse_checkpoint(FIXTURES / f"{name}.pt", 4, asked)


def test_any_feed_forward_width_is_read(tmp_path):
    """An odd SwiGLU width: `mlp_ratio` goes through two truncations."""
    for ratio in (2.3, 2.66, 3.1, 4.0):
        model = tiny_transformer(ff="swiglu", mlp_ratio=ratio, timestep_scale=0.001)
        save_original(model, FAMILIES["lightningdit"], tmp_path / f"{ratio}.pt")
        again = DiTTransformer2DModel.from_single_file(tmp_path / f"{ratio}.pt", num_attention_heads=4)
        torch.testing.assert_close(forward(again), forward(model))


def test_a_block_is_chosen_only_where_there_is_a_choice():
    with pytest.raises(ValueError, match="dit_p2.pt: dit has one copy of its embedders"):
        parse_checkpoint(FIXTURES / "dit_p2.pt", 4, embedders_of_block=1)


@pytest.mark.parametrize("heads", [0, -4])
def test_impossible_heads_are_refused(heads):
    with pytest.raises(ValueError, match=f"`num_attention_heads` is {heads}; it must be a whole number from 1"):
        parse_checkpoint(FIXTURES / "dit_p2.pt", heads)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights},
        lambda weights: {"module": weights},
        lambda weights: {"model_ema": weights, "model": {}, "epoch": 3},
        lambda weights: {"ema_model": weights, "optimizer": {"state": {}}},
        lambda weights: {"model": weights, "ema": weights},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {f"_orig_mod.module.{key}": value for key, value in weights.items()},
    ],
)
def test_wrappers_are_taken_off(wrap, tmp_path):
    weights = torch.load(FIXTURES / "dit_p2.pt", weights_only=True)
    torch.save(wrap(weights), tmp_path / "wrapped.pt")
    model = DiTTransformer2DModel.from_single_file(tmp_path / "wrapped.pt", num_attention_heads=4)
    assert torch.equal(forward(model), forward(load("dit_p2")))


def test_the_weights_that_a_file_has_are_named(tmp_path):
    weights = torch.load(FIXTURES / "dit_p2.pt", weights_only=True)
    torch.save({"model": weights}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no 'ema' weights; it holds model.*`--weights model`"):
        parse_checkpoint(tmp_path / "model.pt", 4, weights="ema")
    torch.save({"model_ema": weights}, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match="no 'model' weights; it holds model_ema.*`--weights ema`"):
        parse_checkpoint(tmp_path / "ema.pt", 4, weights="model")


def test_the_average_is_taken_where_there_is_one(tmp_path):
    weights = torch.load(FIXTURES / "dit_p2.pt", weights_only=True)
    average = weights | {"x_embedder.proj.bias": torch.ones(48)}
    for entry, content in (
        ("ema", {"model": weights, "ema": average}),
        ("model", {"model": average, "ema": {}}),
        ("model_ema", {"model_ema": average}),
    ):
        torch.save(content, tmp_path / "file.pt")
        checkpoint = parse_checkpoint(tmp_path / "file.pt", 4)
        assert checkpoint.entry == entry and f"the weights of {entry!r}" in checkpoint.describe()
        assert torch.equal(checkpoint.weights["pos_embed.proj.bias"], torch.ones(48))


def test_unused_variance_of_sit_is_kept():
    model = load("sit_p2", family="sit")
    assert model.config.learn_sigma
    weights = original_state_dict(model, FAMILIES["sit"])
    assert torch.equal(
        weights["final_layer.linear.weight"],
        parse_checkpoint(FIXTURES / "sit_p2.pt", 4).original["final_layer.linear.weight"],
    )


@pytest.mark.parametrize(
    ("overrides", "family", "message"),
    [
        ({"conditioning": "adaln"}, "dit", "conditioning='adaln'"),
        ({"timestep_scale": 0.001}, "dit", "timestep_scale=0.001"),
        ({}, "sit", "timestep_scale=1.0"),
        ({"norm": "rms_norm"}, "dit", "norm='rms_norm'"),
        ({"ff": "swiglu", "timestep_scale": 0.001}, "sit", "ff='swiglu'"),
        ({"timestep_scale": 0.001}, "repa", "learn_sigma"),
        ({"timestep_scale": 0.001, "learn_sigma": False}, "repa", "projectors"),
        ({"norm": "rms_norm", "timestep_scale": 0.001}, "sit", "families that fit: lightningdit"),
        ({"class_dropout_prob": 0.0}, "diffusers", "has_null_class=False"),
        ({"mlp_ratio": 2.0}, "diffusers", "mlp_ratio=2.0"),
    ],
)
def test_what_a_family_has_no_place_for_is_refused(overrides, family, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_original(tiny_transformer(**overrides), FAMILIES[family], tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == []


def test_scripts_convert_there_and_back(tmp_path):
    out = {"checkpoint_path": FIXTURES / "repa_sit_p2.pt", "output_dir": tmp_path / "out", "num_attention_heads": 4}
    there = run_script("convert_original_to_hf", **out)
    assert there.returncode == 0, there.stderr
    assert "38 of 38 weights come back to the bit" in there.stdout
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    published = {"num_inference_steps": 250, "guidance_scale": 1.8, "guidance_interval": (0.3, 1.0)}
    assert pipe.resolve_call() == published | {"guidance_channels": None}
    pipe.save_pretrained(tmp_path / "again")  # the projectors are not lost
    back = run_script(
        "convert_hf_to_original", model_path=tmp_path / "again", family="repa", checkpoint_path=tmp_path / "back.pt"
    )
    assert back.returncode == 0, back.stderr
    verified = run_script(
        "verify_parity",
        checkpoint_path=tmp_path / "back.pt",
        model_path=tmp_path / "out",
        num_attention_heads=4,
    )
    assert verified.returncode == 0, verified.stderr
    other = tiny_transformer(seed=3, learn_sigma=False, timestep_scale=0.001)
    weights = {name: weight.contiguous() for name, weight in other.state_dict().items()}
    save_file(weights, tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    verified = run_script(
        "verify_parity", checkpoint_path=tmp_path / "back.pt", model_path=tmp_path / "out", num_attention_heads=4
    )
    assert verified.returncode == 2
    assert "does not compute" in verified.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_convert(dtype, tmp_path):
    weights = torch.load(FIXTURES / "sit_p2.pt", weights_only=True)
    torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "half.pt")
    flags = {"checkpoint_path": tmp_path / "half.pt", "family": "sit", "num_attention_heads": 4}
    result = run_script("convert_original_to_hf", **flags, output_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr


def test_what_is_not_of_one_model_is_told(tmp_path):
    load("dit_p2").save_pretrained(tmp_path / "out" / "transformer")
    checkpoint_path, heads = FIXTURES / "dit_p4_fixed_sigma.pt", {"num_attention_heads": 4}
    result = run_script("verify_parity", checkpoint_path=checkpoint_path, model_path=tmp_path / "out", **heads)
    assert result.returncode == 2
    assert "patch_size=4 and the model 2" in result.stderr
    file = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="already in the format of this package"):
        parse_checkpoint(file)


@pytest.mark.parametrize(
    ("scale", "sampler", "family", "message"),
    [
        (1.0, make_scheduler("flow_euler"), "dit", "no original code base computes those"),
        (1.0, make_scheduler("flow_dpm++"), "sit", "no original code base computes those"),
        (0.001, make_scheduler("flow_euler"), "dit", "predicts velocity, and dit's code would take it for epsilon"),
        (1.0, make_scheduler("ddim", prediction_type="v_prediction"), "dit", "predicts v_prediction"),
    ],
)
def test_what_a_family_does_not_predict_is_not_exported_to_it(tmp_path, scale, sampler, family, message):
    pipe = DiTClassCondPipeline(tiny_transformer(timestep_scale=scale), sampler)
    pipe.save_pretrained(tmp_path / "out")
    flags = {"model_path": tmp_path / "out", "family": family, "checkpoint_path": tmp_path / "out.pt"}
    result = run_script("convert_hf_to_original", **flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out.pt").exists()


def test_a_bundled_pipeline_is_exported(tmp_path):
    flags = {"pretrained_model_name_or_path": "emoji64", "family": "dit", "checkpoint_path": tmp_path / "a.pt"}
    result = run_script("convert_hf_to_original", **flags)
    assert result.returncode == 2  # found, and of no original code base
    assert "emoji64 is a flow-matching model with timestep_scale=1" in result.stderr


@pytest.mark.parametrize("name", ["nowhere", "tests/nowhere"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name, tmp_path):
    result = run_script("convert_hf_to_original", model_path=name, family="dit", checkpoint_path=tmp_path / "a.pt")
    assert result.returncode == 2
    assert f"{name} must be the folder" in result.stderr


def test_dry_run_half_precision_and_no_verification(tmp_path):
    flags = {
        "checkpoint_path": FIXTURES / "sit_p2.pt",
        "family": "sit",
        "num_attention_heads": 4,
        "output_dir": tmp_path / "out",
    }
    result = run_script("convert_original_to_hf", **flags, dry_run=True)
    assert result.returncode == 0, result.stderr
    assert "sit: 2 blocks of width 48" in result.stdout
    assert list(tmp_path.iterdir()) == []
    result = run_script("convert_original_to_hf", **flags, dtype="bfloat16", license="mit")
    assert result.returncode == 0, result.stderr
    assert "Parity" in result.stdout
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["proj_out.weight"].dtype == torch.bfloat16
    assert weights["time_embed.linear_1.weight"].dtype == torch.float32
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "# out" in card


def test_memory_of_a_conversion():
    command = [sys.executable, ROOT / "benchmarks" / "conversion_memory.py", "--preset", "DiT-S/8"]
    assert json.loads(run_forked(command, check=True).stdout)["ratio"] < 1.3


def test_dit_weights_are_complete():
    """No weight of a model is lost in the original's checkpoint."""
    model = tiny_transformer()
    weights = original_state_dict(model, DIT)
    assert sum(weight.numel() for weight in weights.values()) == model.num_parameters() + weights["pos_embed"].numel()
