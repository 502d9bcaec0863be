"""REPA-E: SiT on latents that a batch norm normalises, whose statistics the autoencoder gets."""

import json

import pytest
import torch
from conftest import FIXTURES, load_golden
from safetensors import safe_open

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, scheduling_flow_match_sde
from dit_hf.checkpoints.parsing import parse_checkpoint


HEADS = {"repae": 4, "repae_ldm": 2}
# Fixture, recorded sample, steps, recipe, which of the recorded settings of guidance.
RECORDED = [
    ("repae", "ode_4_sample", 4, "flow_euler", None),
    ("repae", "ode_10_sample", 10, "flow_euler", None),
    ("repae", "ode_4_guided0_sample", 4, "flow_euler", 0),
    ("repae", "ode_4_guided1_sample", 4, "flow_euler", 1),
    ("repae", "ode_10_guided0_sample", 10, "flow_euler", 0),
    ("repae", "ode_10_guided1_sample", 10, "flow_euler", 1),
    ("repae", "heun_10_guided_sample", 10, "flow_heun", 1),
    ("repae_ldm", "ode_5_sample", 5, "flow_euler", None),
    ("repae_ldm", "ode_5_guided0_sample", 5, "flow_euler", 0),
    ("repae_ldm", "heun_5_guided_sample", 5, "flow_heun", 0),
    ("repae", "sde_10_sample", 10, "flow_sde", None),
    ("repae", "sde_10_guided_sample", 10, "flow_sde", 1),
    ("repae_ldm", "sde_5_guided_sample", 5, "flow_sde", 0),
    ("repae_ldm", "sde_5_sample", 5, "flow_sde", None),
]


def load(name):
    return DiTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", HEADS[name])


def recorded_guidance(name, index, steps, recipe):
    """
    Scale and interval of a recorded sample. The original guides steps that begin at a time within closed bounds; the
    interval is counted in evaluations of the model, of which Heun's method has two per step and one in the last.
    """
    if index is None:
        return {"guidance_scale": 1}
    with safe_open(FIXTURES / f"{name}.io.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["guidance"])[index]
    per_step = 2 if recipe == "flow_heun" else 1
    evaluations = per_step * (steps - 1) + 1
    times = [1 - (index // per_step) / steps for index in range(evaluations)]
    if recipe == "flow_sde":
        evaluations = steps
        times = torch.linspace(1, 0.04, steps).tolist()
    low, high = (settings[f"guidance_{end}"] - 1e-6 * sign for end, sign in (("low", 1), ("high", -1)))
    guided = [index for index, time in enumerate(times) if low <= time <= high]
    interval = (guided[0] / evaluations, (guided[-1] + 1) / evaluations)
    return {"guidance_scale": settings["cfg_scale"], "guidance_interval": interval}


@pytest.mark.parametrize("name", HEADS)
def test_forward_equals_the_original(name):
    golden = load_golden(f"{name}.io")
    with torch.no_grad():
        output = load(name)(golden["x"], 1000 * golden["t"], golden["y"]).sample
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "sample", "steps", "recipe", "guidance"), RECORDED)
def test_sampling_equals_the_original(name, sample, steps, recipe, guidance, monkeypatch):
    golden = load_golden(f"{name}.io")
    noises = iter(golden[f"sde_{steps}_noise"].float() if recipe == "flow_sde" else ())
    monkeypatch.setattr(scheduling_flow_match_sde, "randn_tensor", lambda *args, **options: next(noises))
    pipe = DiTClassCondPipeline(load(name), make_scheduler(recipe))
    output = pipe(
        golden["ode_y"],
        latents=golden["ode_z"],
        num_inference_steps=steps,
        output_type="latent",
        **recorded_guidance(name, guidance, steps, recipe),
    ).images
    assert (output - golden[sample]).norm() / golden[sample].norm() < 1e-5
    assert next(noises, None) is None


@pytest.mark.parametrize("name", HEADS)
def test_the_file_is_recognised_and_its_statistics_are_kept(name):
    checkpoint = parse_checkpoint(FIXTURES / f"{name}.pt", HEADS[name])
    assert checkpoint.family.name == "repae" and checkpoint.entry == "ema"
    assert checkpoint.config["qk_norm"] == (name == "repae_ldm")
    assert "bn.num_batches_tracked" in checkpoint.training_only and "projectors.0.0.weight" in checkpoint.training_only


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn.running_var": None}, "'bn.running_var' is missing"),
        ({"bn.running_var": -torch.ones(4)}, "'bn.running_var' holds -1; a variance is above 0"),
        ({"bn.running_mean": torch.zeros(7)}, r"'bn.running_mean' has shape \(7,\), where \(4,\) is needed"),
        ({"bn.weight": torch.ones(4)}, "'bn.weight' is unknown"),
    ],
)
def test_statistics_that_can_not_be_are_named(change, message, tmp_path):
    content = torch.load(FIXTURES / "repae_ldm.pt", weights_only=False)
    weights = content["ema"] | change
    torch.save({"ema": {key: value for key, value in weights.items() if value is not None}}, tmp_path / "changed.pt")
    with pytest.raises(ValueError, match=f"changed.pt: .*{message}"):
        parse_checkpoint(tmp_path / "changed.pt", 2)
