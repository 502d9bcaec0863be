"""JiT, DDT and RAE in the pipeline: their own code's trajectories, a guide, the encoder shared by steps."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, load_golden, predict, tiny_design, tiny_transformer
from diffusers import AutoencoderRAE
from diffusers.hooks import FirstBlockCacheConfig
from safetensors import safe_open
from safetensors.torch import save_file
from testing_utils.scripts import run_forked

from dit_hf import DDTTransformer2DModel, DiTClassCondPipeline, make_scheduler
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.conversion import build_pipeline
from dit_hf.data.autoencoders import encode_posterior, load_autoencoder, vae_statistics
from dit_hf.presets import DDT_PRESETS, JIT_PRESETS, preset_config


# Fixture -> what its weights don't tell.
HINTS = {
    "jit_b16_train": {},
    "jit_p4": {"in_context_start": 1, "noise_scale": 1.0},
    "ddt_lightning": {"num_encoder_blocks": 2},
    "ddt_ema_only": {"num_encoder_blocks": 1},
    "rae_dh": {},
    "rae_dh_qknorm": {"num_encoder_blocks": 1},
    "rae_lightningdit": {},
}
JIT = [
    *(("jit_b16_train", f"sample_{name}") for name in ("heun10", "heun4_ns2")),
    *(("jit_p4", f"sample_{name}") for name in ("heun1", "heun4", "heun10", "heun50", "heun4_ns2")),
    *(("jit_p4", f"sample_{name}") for name in ("euler4", "euler10", "euler32_ns2")),
]
DDT = [
    *(("ddt_lightning", f"sample_{name}") for name in ("plain4", "pub4", "pub10", "pub250", "shift6")),
    *(("ddt_ema_only", f"sample_{name}") for name in ("pub4", "pub10", "shift6")),
]
# Fixture, recorded sample, points of time, whether the published shift is used.
RAE = [
    *(("rae_dh", f"ode_{points}_sample", points, True) for points in (5, 11)),
    *(("rae_dh", f"ode_mild_{points}_sample", points, False) for points in (5, 11)),
    *(("rae_dh", f"ode_{name}_11_sample", 11, True) for name in ("cfg", "cfg_interval")),
    *(("rae_dh_qknorm", f"ode_{name}5_sample", 5, name != "mild_") for name in ("", "mild_", "cfg_", "cfg_interval_")),
    *(("rae_lightningdit", f"ode_{points}_sample", points, True) for points in (5, 11)),
    ("rae_lightningdit", "ode_cfg_11_sample", 11, True),
]


def build(name, shift=None, **hints):
    """The pipeline that `dit-hf convert` makes of a fixture."""
    path = FIXTURES / f"{name}.pt"
    return build_pipeline(parse_checkpoint(path, **(HINTS[name] | hints)), path, shift=shift)


def recorded_settings(name, sample):
    with safe_open(FIXTURES / f"{name}.io.safetensors", "pt") as file:
        return next(each for each in json.loads(file.metadata()["sample"]) if each["out"] == sample)


def guided_part(times, low, high, strict=True):
    """Fractions of a trajectory, by the time of each evaluation of the model in the original's direction."""
    inside = [low < time < high if strict else low <= time <= high for time in times]
    first = inside.index(True)
    return first / len(times), (first + sum(inside)) / len(times)


def relative_error(output, expected):
    return ((output - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "sample"), JIT)
def test_jit_samples_as_the_original(name, sample):
    golden, settings = load_golden(f"{name}.io"), recorded_settings(name, sample)
    pipe = build(name, noise_scale=settings["noise_scale"])
    steps, (low, high) = settings["steps"], settings["interval"]
    pipe.scheduler = make_scheduler(f"flow_{settings['method']}")
    per_step = 2 if settings["method"] == "heun" else 1
    # The first evaluation is at time 0, and a `low` of 0 guides it too. Times are float32, as the original's.
    grid = torch.linspace(0, 1, steps + 1)
    times = [grid[(index + per_step - 1) // per_step].item() for index in range(per_step * (steps - 1) + 1)]
    low, high = -1 if low == 0 else torch.tensor(low).item(), torch.tensor(high).item()
    output = pipe(
        golden["sample_y"],
        latents=golden["sample_noise"],
        num_inference_steps=steps,
        guidance_scale=settings["cfg"],
        guidance_interval=guided_part(times, low, high),
        output_type="latent",
    ).images
    assert relative_error(output, golden[sample]) < 1e-4


def test_jit_samples_as_published():
    """What the converted pipeline does by itself is the recorded run, at another scale."""
    golden, pipe = load_golden("jit_p4.io"), build("jit_p4")
    call = {"latents": golden["sample_noise"], "guidance_scale": 2.9, "output_type": "latent"}
    assert relative_error(pipe(golden["sample_y"], **call).images, golden["sample_heun50"]) < 1e-4


@pytest.mark.parametrize(("name", "sample"), DDT)
def test_ddt_samples_as_the_original(name, sample):
    golden, settings = load_golden(f"{name}.io"), recorded_settings(name, sample)
    pipe = build(name, settings.get("timeshift"))
    if "last_step" not in settings:
        pipe.scheduler = make_scheduler("flow_euler", shift=settings.get("timeshift", 1.0))
    times = golden[f"timesteps_{sample.removeprefix('sample_')}"][:-1].tolist()
    low = settings.get("guidance_interval_min", 0.0)
    call = {"guidance_interval": guided_part(times, low, settings.get("guidance_interval_max", 1.0))} if low else {}
    output = pipe(
        golden["sample_y"],
        latents=golden["sample_noise"],
        num_inference_steps=settings["num_steps"],
        guidance_scale=settings["guidance"],
        output_type="latent",
        **({"guidance_interval": (1e-9, 1.0)} | call),  # the original guides times above 0 at the least
    ).images
    assert relative_error(output, golden[sample]) < 1e-4


def test_ddt_samples_as_published():
    golden, pipe = load_golden("ddt_lightning.io"), build("ddt_lightning")
    output = pipe(golden["sample_y"], latents=golden["sample_noise"], output_type="latent").images
    assert relative_error(output, golden["sample_pub250"]) < 1e-4


@pytest.mark.parametrize(("name", "sample", "points", "published"), RAE)
def test_rae_samples_as_the_original(name, sample, points, published):
    golden = load_golden(f"{name}.io")
    shift = golden["ode_shift" if published else "ode_shift_mild"].item()
    pipe, call = build(name, shift), {}
    if "cfg" in sample:
        call = {"guidance_scale": golden["cfg_scale"].item()}
    if "interval" in sample:
        times = golden[f"ode_{points}_t"][:-1].tolist()
        call["guidance_interval"] = guided_part(times, *golden["cfg_interval"].tolist(), strict=False)
    output = pipe(
        golden["ode_y"],
        latents=golden["ode_z"],
        num_inference_steps=points - 1,
        output_type="latent",
        **call,
    ).images
    assert relative_error(output, golden[sample]) < 1e-4
    times = golden[f"ode_{'' if published else 'mild_'}{points}_t"]
    torch.testing.assert_close(pipe.scheduler.sigmas, times, rtol=0, atol=1e-6)


def test_the_shift_of_rae_follows_from_its_latents(caplog):
    assert build("rae_dh").scheduler.config.shift == 0.5
    assert "takes none below 1. Pass shift (`--shift`)" in caplog.text
    assert build("jit_p4", 3.0).scheduler.config.shift == 3
    path = FIXTURES / "dit_p2.pt"
    with pytest.raises(ValueError, match="--shift is for models of flow matching"):
        build_pipeline(parse_checkpoint(path, 4), path, shift=2.0)


# Fixture, recorded sample, points of time.
AUTOGUIDED = [("rae_dh", "ode_ag_11_sample", 11), ("rae_dh_qknorm", "ode_ag_5_sample", 5)]
FRESH = """
import json, sys, torch
from diffusers import DiffusionPipeline
images = []
for folder in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    images.append(pipe([1, 2], output_type="latent", **call).images)
assert "dit_hf" not in sys.modules
torch.save(images, sys.argv[2])
"""


def build_guide(name):
    return DDTTransformer2DModel.from_single_file(FIXTURES / f"{name}_guide.pt")


def convert(output_dir, **flags):
    command = [sys.executable, ROOT / "conversion" / "convert_original_to_hf.py", "--output_dir", output_dir]
    return run_forked([*command, *(word for flag, value in flags.items() for word in (f"--{flag}", value))], ROOT)


@pytest.mark.parametrize(("name", "sample", "points"), AUTOGUIDED)
def test_a_guide_as_the_original(name, sample, points):
    golden = load_golden(f"{name}.io")
    pipe = build(name, golden["ode_shift"].item())
    pipe.guide = build_guide(name)
    call = {"num_inference_steps": points - 1, "guidance_scale": golden["ag_scale"].item(), "output_type": "latent"}
    output = pipe(golden["ode_y"], latents=golden["ode_z"], **call).images
    assert relative_error(output, golden[sample]) < 1e-4
    with pytest.raises(ValueError, match="The guide has in_channels=4, and the transformer"):
        pipe.guide = tiny_transformer(learn_sigma=False)
        pipe(golden["ode_y"], **call)


@pytest.mark.parametrize("name", ["rae_dh", "rae_dh_qknorm"])
def test_one_step_with_a_guide_as_the_original(name):
    """The original's guided forward passes: the whole batch, of which half is guided, and in an interval of time."""
    golden = load_golden(f"{name}.io")
    pipe = build(name)
    pipe.guide = build_guide(name)
    low, high = golden["cfg_interval"].tolist()
    for row, time in enumerate(golden["cfg_t"]):
        inputs = golden["cfg_x"][row : row + 1], 1000 * time, golden["cfg_y"][row : row + 1]
        scales = {True: golden["ag_scale"].item(), False: 1.0}
        outputs = {guided: predict(pipe, *inputs, scale=scale) for guided, scale in scales.items()}
        inside = low <= time <= high
        assert relative_error(outputs[True], golden["ag_out"][row : row + 1]) < 1e-4
        assert relative_error(outputs[bool(inside)], golden["ag_interval_out"][row : row + 1]) < 1e-4


def test_a_guide_is_converted_saved_and_loaded(tmp_path):
    flags = {"checkpoint_path": FIXTURES / "rae_dh.pt", "shift": 6.9282}
    result = convert(tmp_path / "guided", **flags, guide=FIXTURES / "rae_dh_guide.pt")
    assert result.returncode == 0 and result.stdout.count("Parity:") == 2, result.stderr
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "guided")
    assert pipe.resolve_call()["guidance_scale"] == 1.42
    pipe.save_pretrained(tmp_path / "again")
    # A converted guide is taken as well, here the one of the pipeline.
    result = convert(tmp_path / "other", **flags, guide=tmp_path / "again" / "guide")
    assert result.returncode == 0, result.stderr
    folders = [tmp_path / name for name in ("guided", "again", "other")]
    names = json.dumps(list(map(str, folders)))
    subprocess.run([sys.executable, "-c", FRESH, names, tmp_path / "images.pt"], check=True)
    for folder, fresh in zip(folders, torch.load(tmp_path / "images.pt"), strict=True):
        pipe = DiTClassCondPipeline.from_pretrained(folder)
        call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        assert torch.equal(pipe([1, 2], **call).images, fresh)
    alone = DiTClassCondPipeline.from_pretrained(tmp_path / "guided", guide=None)
    assert alone.guide is None
    alone.save_pretrained(tmp_path / "alone")
    assert "guide" not in json.loads((tmp_path / "alone" / "model_index.json").read_text())
    given = DiTClassCondPipeline.from_pretrained(tmp_path / "alone", guide=pipe.guide)
    call["generator"].manual_seed(0)
    assert torch.equal(given([1, 2], guidance_scale=1.42, **call).images, fresh)


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (FIXTURES / "rae_dh_qknorm_guide.pt", "The guide has in_channels=8, and the transformer in_channels=64"),
        (FIXTURES / "nothing.pt", "nothing.pt"),
        (FIXTURES, "neither a pipeline nor a transformer"),
    ],
)
def test_a_guide_of_other_latents_is_refused(guide, words, tmp_path):
    result = convert(tmp_path / "pipe", checkpoint_path=FIXTURES / "rae_dh.pt", guide=guide)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: --guide"), result.stderr
    assert words in result.stderr and not (tmp_path / "pipe").exists()


def test_a_guide_takes_the_place_of_the_null_class():
    torch.manual_seed(0)
    pipe = DiTClassCondPipeline(
        tiny_transformer(class_dropout_prob=0.0), make_scheduler("ddim"), guide=tiny_transformer(1, patch_size=4)
    )
    assert pipe.resolve_call()["guidance_scale"] == 1.5
    noise = torch.randn(1, 4, 8, 8)
    images = {
        scale: pipe(1, guidance_scale=scale, num_inference_steps=1, latents=noise, output_type="latent").images
        for scale in (0.0, 1.0, 3.0)
    }
    expected = images[0.0] + 3 * (images[1.0] - images[0.0])  # one step of DDIM is linear in the prediction
    torch.testing.assert_close(images[3.0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="not divisible by patches of 4"):
        pipe(1, latents=torch.randn(1, 4, 10, 10), output_type="latent")
    pipe.guide.train()
    with pytest.raises(ValueError, match="The guide is in training mode"):
        pipe(1, output_type="latent")
    pipe.guide = tiny_transformer(num_classes=3)
    with pytest.raises(ValueError, match="The guide has num_classes=3"):
        pipe(1, output_type="latent")
    with pytest.raises(ValueError, match="`guide` is a int"):
        pipe.guide = 5


SHARED = [
    *(("ddt_lightning", f"sample_{name}") for name in ("refresh2_10", "refresh4_10", "sharing8_2")),
    ("ddt_ema_only", "sample_refresh2_10"),
]


@pytest.mark.parametrize(("name", "sample"), SHARED)
def test_steps_share_an_encoder_state_as_the_original(name, sample):
    golden, settings = load_golden(f"{name}.io"), recorded_settings(name, sample)
    times = torch.linspace(0, 1 - settings["last_step"], settings["num_steps"]).tolist()
    pipe, encoded = build(name), []
    pipe.transformer.patch_embed.register_forward_hook(lambda *args: encoded.append(1))
    rate, steps = settings["state_refresh_rate"], settings["num_steps"]
    output = pipe(
        golden["sample_y"],
        latents=golden["sample_noise"],
        num_inference_steps=steps,
        guidance_scale=settings["guidance"],
        guidance_interval=guided_part(times, settings.get("guidance_interval_min", 0.0), 1.0),
        encoder_refresh_steps=rate,
        output_type="latent",
    ).images
    assert relative_error(output, golden[sample]) < 1e-4
    assert len(encoded) == -(-steps // rate)


def test_an_encoder_state_is_not_shared_across_other_labels():
    """A callback that changes the labels, or drops an image, gets a state of its own."""
    pipe = DiTClassCondPipeline(tiny_design("ddt"), make_scheduler("flow_euler"))

    def drop(pipe, step, timestep, tensors):
        return {name: tensor[:1] for name, tensor in tensors.items()} if step == 0 else None

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    names = ["latents", "class_labels"]
    dropped = pipe(
        [1, 2],
        latents=noise,
        encoder_refresh_steps=2,
        callback_on_step_end=drop,
        callback_on_step_end_tensor_inputs=names,
        **call,
    ).images
    torch.testing.assert_close(dropped, pipe(1, latents=noise[:1], **call).images, rtol=0, atol=1e-5)


def test_encoder_states_are_shared_where_there_are_some():
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"))
    with pytest.raises(ValueError, match="is 2, but DiTTransformer2DModel has no encoder; leave it at 1"):
        pipe(1, encoder_refresh_steps=2, output_type="latent")
    pipe = DiTClassCondPipeline(tiny_design("ddt"), make_scheduler("flow_euler"))
    with pytest.raises(ValueError, match="`encoder_refresh_steps` is 0"):
        pipe(1, encoder_refresh_steps=0, output_type="latent")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="a cache of blocks is enabled"):
        pipe(1, encoder_refresh_steps=2, output_type="latent")
    pipe.transformer.disable_cache()
    pipe.guide = tiny_design("ddt")
    with pytest.raises(ValueError, match="has a guide"):
        pipe(1, encoder_refresh_steps=2, output_type="latent")


def test_published_scales_follow_the_size():
    """As the authors give them: JiT's by size, DDT's and RAE's at 256 and 512 pixels."""
    jit = {name: FAMILIES["jit"].published_call(preset_config(name, JIT_PRESETS)) for name in JIT_PRESETS}
    assert [call["guidance_scale"] for call in jit.values()] == [3.0, 2.4, 2.2, 3.0, 2.5, 2.3]
    assert all(call["guidance_interval"] == (11 / 99, 1.0) for call in jit.values())
    ddt, rae = (preset_config(name, DDT_PRESETS) for name in ("DDT-XL/2", "RAE-DiT-DH-XL"))
    for size, scale, guided in ((1, 2.0, 1.42), (2, 3.0, 1.5)):
        sizes = [config | {"sample_size": size * config["sample_size"]} for config in (ddt, rae)]
        assert FAMILIES["ddt"].published_call(sizes[0])["guidance_scale"] == scale
        assert FAMILIES["rae"].published_call(sizes[1])["guidance_scale"] == 1.0
        assert FAMILIES["rae"].published_call(sizes[1], has_guide=True)["guidance_scale"] == guided
    without = FAMILIES["ddt"].published_call(ddt | {"class_dropout_prob": 0.0})
    assert without == {"num_inference_steps": 250}


def rae_autoencoder(**overrides):
    """RAE's recorded decoder and statistics, with a random encoder."""
    weights = load_golden("rae_autoencoder")
    with safe_open(FIXTURES / "rae_autoencoder.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    torch.manual_seed(0)
    statistics = {name: weights[f"_{name}"] for name in ("latents_mean", "latents_std")}
    vae = AutoencoderRAE(**(config | statistics | overrides))
    vae.load_state_dict(weights, strict=False)
    return vae.eval()


@pytest.fixture(scope="module")
def rae_pipeline():
    pipe = build("rae_dh", 6.9282)
    pipe.vae = rae_autoencoder()
    return pipe


@pytest.mark.parametrize("name", ["ode_11", "ode_ag_11", "ode_cfg_interval_11"])
def test_rae_decodes_as_the_original(name, rae_pipeline):
    images = rae_pipeline.decode_latents(load_golden("rae_dh.io")[f"{name}_sample"], "pt")
    expected = load_golden("rae_autoencoder")[f"original_dh_{name}_pixels"].clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_rae_decodes_in_the_pipeline(rae_pipeline, tmp_path, caplog):
    assert rae_pipeline.vae_scale_factor == 2
    call = {"num_inference_steps": 2, "output_type": "pt"}
    images = rae_pipeline([1, 2], generator=torch.Generator().manual_seed(0), **call).images
    assert images.shape == (2, 3, 8, 8) and images.std() > 0.1
    rae_pipeline.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderRAE"]
    caplog.clear()
    again = DiTClassCondPipeline.from_pretrained(tmp_path / "pipe")
    assert "corrected to 4×4" in caplog.text
    assert torch.equal(again([1, 2], generator=torch.Generator().manual_seed(0), **call).images, images)
    for refused in (
        lambda: rae_pipeline(1, height=16, width=16, num_inference_steps=1),
        lambda: rae_pipeline.decode_latents(torch.zeros(1, 64, 4, 8)),
    ):
        with pytest.raises(ValueError, match="AutoencoderRAE's 4×4; it has no other size"):
            refused()
    with pytest.raises(ValueError, match="The VAE has 64 latent channels and the transformer 8"):
        DiTClassCondPipeline(build("rae_dh_qknorm").transformer, make_scheduler("flow_rae"), rae_pipeline.vae)


def test_rae_encodes_as_the_original():
    """Pixels from 0 to 1, one epsilon: `(tokens − mean) / sqrt(variance + 1e-5)`, which is the recorded deviation."""
    vae, pixels = rae_autoencoder(), torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    latents, deviation = encode_posterior(vae, 2 * pixels - 1)
    with torch.no_grad():
        tokens = vae.encoder((pixels - vae.encoder_mean) / vae.encoder_std).last_hidden_state[:, 5:]
    expected = (tokens.transpose(1, 2).unflatten(2, (4, 4)) - vae._latents_mean) / vae._latents_std
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert not deviation.any() and vae_statistics(vae) == ([0.0], [1.0])


# The names of an encoder's weights in transformers 5 -> before.
ATTENTION = {f"attention.{name[0]}_proj": f"attention.attention.{name}" for name in ("query", "key", "value")}
OLD_NAMES = {
    "dinov2": ATTENTION | {"attention.o_proj": "attention.output.dense"},
    "mae": ATTENTION
    | {"attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    | {"encoder.layers.": "encoder.encoder.layer."},
}


@pytest.mark.parametrize("encoder", OLD_NAMES)
def test_encoders_of_earlier_transformers_are_read(encoder, rae_pipeline, tmp_path):
    rae_pipeline.save_pretrained(tmp_path)
    vae = rae_autoencoder(encoder_type=encoder)
    vae.save_pretrained(tmp_path / "vae")
    file, weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {}
    for key, weight in vae.state_dict().items():
        for new, old in OLD_NAMES[encoder].items() if key.startswith("encoder.") else ():
            key = key.replace(new, old)
        weights[key] = weight
    assert weights.keys() != vae.state_dict().keys()
    save_file(weights, file)
    for read in (load_autoencoder(tmp_path / "vae"), DiTClassCondPipeline.from_pretrained(tmp_path).vae):
        state = read.state_dict()
        assert all(torch.equal(state[key], weight) for key, weight in vae.state_dict().items())
    del weights["encoder.embeddings.cls_token"]
    save_file(weights, file)
    for load in (lambda: load_autoencoder(tmp_path / "vae"), lambda: DiTClassCondPipeline.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="'encoder.embeddings.cls_token'"):
            load()


def test_an_encoder_that_cant_be_built_is_named(tmp_path):
    vae = rae_autoencoder()
    vae.register_to_config(encoder_type="nothing")
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} can't be loaded as AutoencoderRAE: Unknown encoder_type"):
        load_autoencoder(tmp_path)


def test_a_guide_that_is_set_later_is_saved(tmp_path):
    pipe = DiTClassCondPipeline(tiny_transformer(num_layers=1), make_scheduler("ddim"))
    pipe.guide = tiny_transformer(1, num_layers=1)
    pipe.save_pretrained(tmp_path / "with")
    again = DiTClassCondPipeline.from_pretrained(tmp_path / "with")
    assert again.guide.config.num_layers == 1
    again.guide = None
    again.save_pretrained(tmp_path / "without")
    assert DiTClassCondPipeline.from_pretrained(tmp_path / "without").guide is None


def test_samplers_that_add_noise_know_one_scale_of_it():
    pipe = DiTClassCondPipeline(tiny_design("jit", noise_scale=2.0), make_scheduler("flow_sde"))
    for name in ("flow_sde", "flow_lcm"):
        pipe.scheduler = make_scheduler(name)
        with pytest.raises(ValueError, match="was trained with 2.0; use a sampler without noise"):
            pipe(0, output_type="latent")
    pipe.scheduler = make_scheduler("flow_heun")
    assert pipe(0, output_type="latent", num_inference_steps=2).images.isfinite().all()


def test_the_null_class_needs_one_in_the_guide():
    parts = [tiny_design("ddt", class_dropout_prob=dropout) for dropout in (0.1, 0.0)]
    pipe = DiTClassCondPipeline(parts[0], make_scheduler("flow_euler"), guide=parts[1])
    with pytest.raises(ValueError, match="null class"):
        pipe(None, output_type="latent", num_inference_steps=1)
