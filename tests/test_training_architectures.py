"""Training the other architectures: JiT from pixels without an autoencoder, DDT and DiT-DH from latents."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, load_golden, tiny_design, tiny_transformer
from safetensors.torch import load_file
from test_pipeline_architectures import rae_autoencoder
from testing_utils.training_runs import read_log, refused, run, train_command

from dit_hf import DDTTransformer2DModel, DiTClassCondPipeline, JiTTransformer2DModel, make_scheduler
from dit_hf.presets import DDT_PRESETS, JIT_PRESETS, PRESETS
from dit_hf.training.finetuning import parameter_groups
from dit_hf.training.model import PRESET_CLASSES, new_transformer, preset_resolution
from dit_hf.training.objectives import (
    OBJECTIVES,
    ClampedVelocityObjective,
    LogitNormal,
    Shifted,
    Uniform,
    VelocityObjective,
)


SIZE = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
JIT = SIZE | {"_class_name": "JiTTransformer2DModel", "patch_size": 8, "bottleneck_dim": 8, "in_context_len": 2}
JIT |= {"in_context_start": 1, "dropout": 0.2, "noise_scale": 2.0}
DDT = SIZE | {"_class_name": "DDTTransformer2DModel", "patch_size": 2, "num_encoder_layers": 2}
RAE_BATCH = tuple(f"train_logitnormal_{name}" for name in ("x1", "x0", "y", "loss"))
FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
images = pipe("light", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
assert "dit_hf" not in sys.modules and images.shape == (1, 3, 32, 32)
torch.save(images, sys.argv[2])
"""


@pytest.fixture
def configs(tmp_path):
    for name, config in (("jit", JIT), ("ddt", DDT), ("other", {"_class_name": "FluxTransformer2DModel"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return tmp_path


def pixels_command(workspace, configs, folder, **flags):
    return train_command(workspace, folder, **({"vae": None, "transformer_config": configs / "jit.json"} | flags))


def test_a_jit_trains_from_pixels_resumes_to_the_bit_and_loads_anywhere(workspace, configs, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = {"lr_scheduler": "constant", "lr_warmup_steps": None, "ema_decay": 0.5}
    run(pixels_command(workspace, configs, straight, **flags))
    run(pixels_command(workspace, configs, resumed, **flags, max_train_steps=2))
    run(pixels_command(workspace, configs, resumed, **flags))
    files = [folder / "pipeline/transformer/diffusion_pytorch_model.safetensors" for folder in (straight, resumed)]
    weights, again = map(load_file, files)
    assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)
    assert [line["loss"] for line in read_log(straight)] == [line["loss"] for line in read_log(resumed)]
    assert (straight / "samples/step-000006.png").exists() and not (straight / "latents").exists()

    subprocess.run([sys.executable, "-c", FRESH, straight / "pipeline", tmp_path / "images.pt"], check=True)
    pipe = DiTClassCondPipeline.from_pretrained(straight / "pipeline")
    assert type(pipe.transformer) is JiTTransformer2DModel and pipe.vae is None
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    assert torch.equal(pipe("light", **call).images, torch.load(tmp_path / "images.pt"))
    settings = json.loads((straight / "training_config.json").read_text())
    assert (settings["objective"], settings["noise_scale"], settings["t_eps"]) == ("clamped_velocity", 2.0, 0.05)

    start = {"transformer_config": None, "pretrained_model_name_or_path": straight / "pipeline"}
    run(pixels_command(workspace, configs, tmp_path / "tuned", **start, max_train_steps=1, learning_rate=0))
    tuned = load_file(tmp_path / "tuned/pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[key], tuned[key]) for key in weights)


def test_a_ddt_trains_from_latents_with_shifted_times(workspace, configs, tmp_path):
    flags = {"transformer_config": configs / "ddt.json", "max_train_steps": 2, "time_shift": 3.0, "proj_coeff": 0.5}
    flags |= {"alignment_depth": 2, "layer_decay": 0.5}
    run(train_command(workspace, tmp_path / "run", **flags))
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert type(pipe.transformer) is DDTTransformer2DModel and pipe.scheduler.config.shift == 3.0
    assert "| time_sampling | logit_normal, shifted by 3.0 |" in (tmp_path / "run/pipeline/README.md").read_text()
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "run/pipeline"}
    run(train_command(workspace, tmp_path / "adapters", **start, max_train_steps=1, lora_rank=2))
    pipe.load_lora_weights(tmp_path / "adapters")
    assert pipe("light", num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"transformer_config": "jit.json", "vae": None, "objective": "velocity"},
         "A JiTTransformer2DModel is not trained with --objective velocity; pass --objective clamped_velocity."),
        ({"transformer_config": "jit.json", "vae": None, "recipe": "dit"}, "pass --objective clamped_velocity"),
        ({"transformer_config": "ddt.json", "objective": "epsilon"}, "pass --objective velocity."),
        ({"objective": "clamped_velocity"}, "pass --objective velocity, epsilon, meanflow, soflow or distillation."),
        ({"transformer_config": "ddt.json", "vae": None}, "--vae is missing"),
        ({"transformer_config": "other.json"}, "its _class_name is 'FluxTransformer2DModel', not DiT"),
        ({"transformer_config": "jit.json", "vae": None, "streaming": ""}, "trained on pixels; omit it"),
        ({"transformer_config": "jit.json", "vae": None, "resolution": 36}, "36 is not divisible by `patch_size` 8"),
        ({"transformer_config": "jit.json", "vae": None, "proj_coeff": 1, "alignment_depth": 4}, "blocks 1 to 3"),
        ({"transformer_config": "ddt.json", "proj_coeff": 1, "alignment_depth": 3}, "has blocks 1 to 2"),
        ({"time_sampling": "uniform", "time_mean": 1}, "are of --time_sampling logit_normal; omit them"),
        ({"time_shift": 0}, "--time_shift"),
        ({"objective": "epsilon", "time_shift": 2}, "--time_shift has no effect on epsilon"),
        ({"transformer_config": None, "vae": None, "pretrained_model_name_or_path": "latents"},
         "has no VAE for its latents of 4 channels; pass --vae"),
    ],
)  # fmt: skip
def test_what_can_not_be_trained_is_one_line(workspace, configs, tmp_path, flags, message, monkeypatch, capsys):
    names = {0: "dark", 1: "light"}
    transformer = tiny_transformer(num_classes=2, learn_sigma=False)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), None, names).save_pretrained(tmp_path / "latents")
    for flag in ("transformer_config", "pretrained_model_name_or_path"):
        if flags.get(flag):
            flags = flags | {flag: tmp_path / flags[flag]}
    error = refused(train_command(workspace, tmp_path / "run", **flags), monkeypatch, capsys)
    assert message in error.splitlines()[-1] and not (tmp_path / "run").exists()


# Fixture -> how its model is read, and what its recorded batch is called.
RECORDED = {
    "ddt_lightning": ({"num_encoder_blocks": 2}, ("fm_x", "fm_noise", "fm_y_dropped", "fm_loss_per_sample")),
    "rae_dh": ({}, RAE_BATCH),
    "rae_dh_qknorm": ({"num_encoder_blocks": 1}, RAE_BATCH),
}


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_losses_equal_the_original(name):
    """From the recorded draws: DDT's logit is normal; so is RAE's, cut at 0.999 and shifted by √(768·16·16/4096)."""
    golden, (told, batch) = load_golden(f"{name}.io"), RECORDED[name]
    data, noise, labels, expected = (golden[key] for key in batch)
    if name == "ddt_lightning":
        time = (-golden["fm_t_draw"]).sigmoid()  # its time is 1 for data
    else:
        normal, end = torch.distributions.Normal(0.0, 1.0), torch.tensor(0.999, dtype=torch.float64).logit()
        logit = normal.icdf(golden["train_logitnormal_u"].double() * normal.cdf(end)).float()
        time = Shifted(LogitNormal(), 48**0.5).move(logit.sigmoid())
        torch.testing.assert_close(time, golden["train_logitnormal_t"], rtol=1e-5, atol=0)
    model = DDTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", **told)
    losses = VelocityObjective().loss(model, {"x_start": data, "noise": noise, "time": time, "label": labels})
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_times_are_drawn_as_the_flags_say():
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = Shifted(Uniform(), 2.5)(1000, generators[0])
    uniform = Uniform()(1000, generators[1])
    torch.testing.assert_close(drawn, 2.5 * uniform / (1 + 1.5 * uniform))
    flags = {
        "time_sampling": "logit_normal",
        "time_mean": None,
        "time_std": 0.5,
        "time_shift": 2.0,
        "cosine_loss": False,
    }
    jit = OBJECTIVES["clamped_velocity"].build(
        None, SimpleNamespace(config={"t_eps": 0.1, "noise_scale": 2.0}), **flags
    )
    assert jit == ClampedVelocityObjective(Shifted(LogitNormal(0.8, 0.5), 2.0), t_eps=0.1, noise_scale=2.0)
    velocity = OBJECTIVES["velocity"].build(None, None, **flags | {"time_shift": 1.0})
    assert velocity == VelocityObjective(LogitNormal(0.0, 0.5))


def test_every_preset_is_one_of_the_command():
    assert PRESET_CLASSES.keys() == PRESETS.keys() | JIT_PRESETS.keys() | DDT_PRESETS.keys()
    assert [preset_resolution(name) for name in ("JiT-B/16", "JiT-H/32", "DiT-S/8", None)] == [256, 512, 64, 64]
    with torch.device("meta"):
        model = new_transformer("JiT-B/32", sample_size=512, in_channels=3, num_classes=5)
    assert type(model) is JiTTransformer2DModel and model.config.noise_scale == 2.0


def test_layer_decay_reaches_both_streams():
    model = tiny_design("ddt")
    rates = {id(weight): group["lr"] for group in parameter_groups(model, 1.0, 0.5) for weight in group["params"]}
    blocks = [*model.transformer_blocks, *model.decoder_blocks]
    assert [rates[id(block.modulation.weight)] for block in blocks] == [0.0625, 0.125, 0.25, 0.5]
    assert rates[id(model.proj_out.weight)] == 1.0 and rates[id(model.class_embed.weight)] == 0.03125


def test_an_autoencoder_that_normalises_itself_keeps_its_statistics(workspace, configs, tmp_path, monkeypatch, capsys):
    """Cached latents of an `AutoencoderRAE` are trained on and decoded as they are."""
    rae_autoencoder().save_pretrained(tmp_path / "rae")
    (configs / "ddt.json").write_text(json.dumps(DDT | {"patch_size": 1}))
    flags = {"vae": tmp_path / "rae", "transformer_config": configs / "ddt.json", "max_train_steps": 2}
    error = refused(train_command(workspace, tmp_path / "run", **flags), monkeypatch, capsys)
    assert "has latents of one size, pass 8" in error
    run(train_command(workspace, tmp_path / "run", **flags, resolution=8))
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert torch.equal(pipe.vae._latents_mean, load_golden("rae_autoencoder")["_latents_mean"])
    assert pipe("light", num_inference_steps=1).images[0].size == (8, 8)
