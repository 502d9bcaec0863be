"""DDT and RAE's DiT-DH: the numbers that their code computes, from their weights, and back to these weights."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import FIXTURES, load_golden
from safetensors import safe_open

from dit_hf import DDTTransformer2DModel, DiTTransformer2DModel
from dit_hf.checkpoints import ddt, rae
from dit_hf.checkpoints.loading import build_model
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.checkpoints.reference_two_streams import ddt_reference_forward, ddt_reference_state, rae_reference_forward
from dit_hf.checkpoints.two_streams import two_stream_tables
from dit_hf.complexity import count_macs
from dit_hf.presets import DDT_PRESETS


# Fixture -> how many blocks are the encoder, where the weights don't tell.
DDT_FILES = {"ddt_lightning": 2, "ddt_ema_only": 1}
RAE_FILES = {"rae_dh": None, "rae_dh_qknorm": 1}
GUIDES = {"rae_dh_guide": None, "rae_dh_qknorm_guide": None}
ALL = DDT_FILES | RAE_FILES | GUIDES


def read(name, weights="auto"):
    """Family, original weights, and the config read off them."""
    checkpoint = parse_checkpoint(FIXTURES / f"{name}.pt", weights=weights, num_encoder_blocks=ALL[name])
    return checkpoint.family, checkpoint.original, checkpoint.config


def load(name, weights="auto"):
    family, original, config = read(name, weights)
    model = DDTTransformer2DModel(**config)
    model.load_state_dict(family.to_ours(original, config))
    return model.eval()


def arguments_of(name):
    """What the original was built and sampled with."""
    with safe_open(FIXTURES / f"{name}.io.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if key != "source"}


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# Forward passes


@pytest.mark.parametrize("name", DDT_FILES)
@torch.no_grad()
def test_ddt_equals_the_original(name):
    golden, model = load_golden(f"{name}.io"), load(name)
    output = model(golden["x"], 1000 * (1 - golden["t"]), golden["y"])
    assert_close(output.sample, -golden["out"])
    assert_close(output.encoder_state, golden["state"])


@torch.no_grad()
def test_ddt_has_two_sets_of_weights_and_takes_rectangles():
    golden = load_golden("ddt_lightning.io")
    timestep = 1000 * (1 - golden["t"])
    output = load("ddt_lightning", "model")(golden["x"], timestep, golden["y"]).sample
    assert_close(output, -golden["out_denoiser"])
    rectangle = load("ddt_lightning")(golden["rect_x"], timestep[:2], golden["y"][:2]).sample
    assert_close(rectangle, -golden["rect_out"])


@pytest.mark.parametrize("name", DDT_FILES)
@torch.no_grad()
def test_an_encoder_state_takes_the_place_of_time_and_class(name):
    golden, model = load_golden(f"{name}.io"), load(name)
    calls = []
    model.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for labels in (golden["y"], torch.zeros_like(golden["y"])):
        for timestep in (1000 * (1 - golden["reuse_t"]), 7):
            output = model(golden["reuse_x"], timestep, labels, encoder_state=golden["state"])
            assert_close(output.sample, -golden["reuse_out"])
            assert output.encoder_state is golden["state"]
    assert not calls


@pytest.mark.parametrize("name", RAE_FILES)
@torch.no_grad()
def test_rae_equals_the_original(name):
    golden = load_golden(f"{name}.io")
    assert_close(load(name)(golden["x"], 1000 * golden["t"], golden["y"]).sample, golden["out"])


@pytest.mark.parametrize("name", DDT_FILES | RAE_FILES)
def test_the_oracle_equals_the_original(name):
    """The forward pass that conversions are verified with is itself held against the recorded outputs."""
    golden, (family, original, config) = load_golden(f"{name}.io"), read(name)
    inputs = golden["x"], golden["t"], golden["y"]
    if family is rae.RAE:
        assert_close(rae_reference_forward(original, config, *inputs), golden["out"])
        return
    assert_close(ddt_reference_forward(original, config, *inputs), golden["out"])
    assert_close(ddt_reference_state(original, config, *inputs), golden["state"])
    reused = ddt_reference_forward(original, config, golden["reuse_x"], *inputs[1:], state=golden["state"])
    assert_close(reused, golden["reuse_out"])


# Guidance and sampling


def guide(conditional, other, scale):
    return other + scale * (conditional - other)


@pytest.mark.parametrize("name", DDT_FILES)
@torch.no_grad()
def test_ddt_guided_forward_equals_the_original(name):
    golden, model = load_golden(f"{name}.io"), load(name)
    timestep, null = 1000 * (1 - golden["t"]), torch.full_like(golden["y"], model.config.num_classes)
    conditional, unconditional = (model(golden["x"], timestep, labels).sample for labels in (golden["y"], null))
    assert relative_error(guide(conditional, unconditional, 2.0), -golden["cfg_simple"]) < 1e-4


def sample_ddt(model, golden, run):
    """The published sampler: Euler steps, guided inside an interval, with a state that lasts for some steps."""
    latents, labels = golden["sample_noise"], golden["sample_y"]
    labels = torch.cat([torch.full_like(labels, model.config.num_classes), labels])
    last, low, high = run.get("last_step"), run.get("guidance_interval_min", 0), run.get("guidance_interval_max", 1)
    steps, shift = run["num_steps"], run.get("timeshift", 1.0)
    grid = torch.cat([torch.linspace(0, 1 - (last or 1 / steps), steps), torch.ones(1)])
    sigmas = shift * (1 - grid) / (grid + (1 - grid) * shift)
    if f"timesteps_{run['out'].removeprefix('sample_')}" in golden:
        assert_close(1 - sigmas, golden[f"timesteps_{run['out'].removeprefix('sample_')}"], 1e-6)
    refresh = set(run.get("recompute_timesteps", range(0, steps, run.get("state_refresh_rate", 1))))
    state = None
    for step, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        known = None if step in refresh else state
        output = model(latents.repeat(2, 1, 1, 1), 1000 * sigma, labels, encoder_state=known)
        unconditional, conditional = output.sample.chunk(2)
        state = output.encoder_state
        scale = run["guidance"] if low < 1 - sigma < high else 1.0
        latents = latents + (next_sigma - sigma) * guide(conditional, unconditional, scale)
    return latents


SAMPLED = {
    "ddt_lightning": ("pub4", "pub10", "plain4", "shift6", "refresh2_10", "refresh4_10", "sharing8_2"),
    "ddt_ema_only": ("pub4", "pub10", "shift6", "refresh2_10"),
}


@pytest.mark.parametrize(("name", "run"), [(name, run) for name, runs in SAMPLED.items() for run in runs])
@torch.no_grad()
def test_ddt_samples_equal_the_original(name, run):
    golden, model = load_golden(f"{name}.io"), load(name)
    (arguments,) = (entry for entry in arguments_of(name)["sample"] if entry["out"] == f"sample_{run}")
    assert relative_error(sample_ddt(model, golden, arguments), golden[f"sample_{run}"]) < 1e-4


def rae_guidance(strong, weak, golden):
    """Recorded kind of guidance -> the velocity for latents, time and labels."""

    def plain(latents, time, labels):
        return strong(latents, 1000 * time, labels).sample

    def classifier_free(latents, time, labels):
        null = torch.full_like(labels, strong.config.num_classes)
        return guide(plain(latents, time, labels), plain(latents, time, null), golden["cfg_scale"])

    def auto(latents, time, labels):
        return guide(plain(latents, time, labels), weak(latents, 1000 * time, labels).sample, golden["ag_scale"])

    def inside(guided):
        def velocity(latents, time, labels):
            low, high = golden["cfg_interval"]
            is_inside = ((time >= low) & (time <= high)).view(-1, 1, 1, 1)
            return torch.where(is_inside, guided(latents, time, labels), plain(latents, time, labels))

        return velocity

    kinds = {"": plain, "cfg_": classifier_free, "ag_": auto}
    return kinds | {"cfg_interval_": inside(classifier_free), "ag_interval_": inside(auto)}


@pytest.mark.parametrize("name", RAE_FILES)
@torch.no_grad()
def test_rae_guided_forwards_equal_the_original(name):
    golden = load_golden(f"{name}.io")
    inputs = [golden[f"cfg_{kind}"] for kind in "xty"]
    halves = [value.chunk(2)[0] for value in inputs]
    velocities = rae_guidance(load(name), load(f"{name}_guide"), golden)
    for kind in ("cfg_", "cfg_interval_"):  # the conditional half comes first, and the guided half twice
        assert relative_error(velocities[kind](*halves), golden[f"{kind}out"].chunk(2)[0]) < 1e-4
    for kind in ("ag_", "ag_interval_"):
        assert relative_error(velocities[kind](*inputs), golden[f"{kind}out"]) < 1e-4


RAE_RUNS = {
    "rae_dh": ("ode_5", "ode_mild_5", "ode_cfg_11", "ode_cfg_interval_11", "ode_ag_11"),
    "rae_dh_qknorm": ("ode_5", "ode_mild_5", "ode_cfg_5", "ode_cfg_interval_5", "ode_ag_5"),
}


@pytest.mark.parametrize(("name", "run"), [(name, run) for name, runs in RAE_RUNS.items() for run in runs])
@torch.no_grad()
def test_rae_samples_equal_the_original(name, run):
    golden = load_golden(f"{name}.io")
    kind, points = run.removeprefix("ode_").rpartition("_")[::2]
    guidance = "" if kind in ("", "mild") else f"{kind}_"
    velocity = rae_guidance(load(name), load(f"{name}_guide"), golden)[guidance]
    shift = golden["ode_shift_mild" if kind == "mild" else "ode_shift"]
    grid = golden[f"ode_mild_{points}_t" if kind == "mild" else f"ode_{points}_t"]
    latents = sample_rae(velocity, golden, grid, shift)
    assert relative_error(latents, golden[f"{run}_sample"]) < 1e-4


def sample_rae(velocity, golden, grid, shift):
    """Euler steps on a grid that ends before the data."""
    times = 1 - torch.linspace(0, 0.999, len(grid))
    times = shift * times / (1 + (shift - 1) * times)
    assert_close(times, grid, 1e-6)
    latents = golden["ode_z"]
    for time, following in zip(times[:-1], times[1:], strict=True):
        latents = latents + (following - time) * velocity(latents, time.expand(len(latents)), golden["ode_y"])
    return latents


@torch.no_grad()
def test_the_lightningdit_of_rae_equals_the_original():
    """The second class of RAE's code is an option of the model with one stream."""
    golden = load_golden("rae_lightningdit.io")
    model = DiTTransformer2DModel.from_single_file(FIXTURES / "rae_lightningdit.pt")
    assert model.config.time_embedding == "fourier"
    assert_close(model(golden["x"], 1000 * golden["t"], golden["y"]).sample, golden["out"])
    guided = rae_guidance(model, None, golden)
    for kind, points in (("", 5), ("cfg_", 11)):
        latents = sample_rae(guided[kind], golden, golden[f"ode_{points}_t"], golden["ode_shift"])
        assert relative_error(latents, golden[f"ode_{kind}{points}_sample"]) < 1e-4


def test_random_frequencies_stay_in_float32(tmp_path):
    DiTTransformer2DModel.from_single_file(FIXTURES / "rae_lightningdit.pt").save_pretrained(tmp_path)
    half = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.time_proj.weight.dtype == half.time_embed.linear_1.weight.dtype == torch.float32
    assert half.proj_out.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_training_targets_are_the_originals():
    """The loss of the recorded batch: noise − data against the output, with time as the scheduler's timestep."""
    golden, model = load_golden("ddt_lightning.io"), load("ddt_lightning")
    sigma = (1 - golden["fm_t"]).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * golden["fm_x"] + sigma * golden["fm_noise"]
    output = model(noisy, 1000 * sigma.flatten(), golden["fm_y_dropped"]).sample
    loss = (output - (golden["fm_noise"] - golden["fm_x"])).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, golden["fm_loss_per_sample"], rtol=1e-5, atol=0)
    for name in RAE_FILES:
        golden = load_golden(f"{name}.io")
        noisy, time, labels, noise, data, expected = (
            golden[f"train_logitnormal_{key}"] for key in ("xt", "t", "y", "x0", "x1", "loss")
        )
        loss = (load(name)(noisy, 1000 * time, labels).sample - (noise - data)).square().mean((1, 2, 3))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


# Weights and configs


@pytest.mark.parametrize("name", ALL)
def test_round_trip(name):
    family, original, config = read(name)
    model = load(name)
    tables = two_stream_tables(model)
    back = family.to_original(model.state_dict(), config)
    back |= {key: tables[table] for key, table in family.tables.items() if table in tables}
    assert back.keys() == original.keys()
    changed = {key for key, value in original.items() if not torch.equal(back[key], value)}
    assert changed <= ({"t_embedder.mlp.0.weight"} if family.data_at_one else set())
    assert max((back[key] - value).abs().max() for key, value in original.items()) <= 1e-6


@pytest.mark.parametrize("name", DDT_FILES | RAE_FILES)
def test_sizes_are_read_off_the_weights(name):
    expected, (_, _, config) = arguments_of(name)["config"], read(name)
    if name in DDT_FILES:
        sizes = {
            "num_layers": "num_blocks",
            "num_encoder_layers": "num_encoder_blocks",
            "num_attention_heads": "num_groups",
        }
        sizes |= {key: key for key in ("in_channels", "patch_size", "num_classes")}
        assert {ours: config[ours] for ours in sizes} == {ours: expected[theirs] for ours, theirs in sizes.items()}
        return
    heads = expected["num_heads"] if isinstance(expected["num_heads"], list) else [expected["num_heads"]] * 2
    decoder_heads = config["decoder_num_attention_heads"] or config["num_attention_heads"]
    assert [config["num_attention_heads"], decoder_heads] == heads
    assert config["num_encoder_layers"] == expected["depth"][0]
    assert config["num_layers"] == sum(expected["depth"])
    assert config["sample_size"] == expected["input_size"]
    assert (config["qk_norm"], config["position_table"]) == (expected["use_qknorm"], expected["use_pos_embed"])


def test_sizes_that_weights_do_not_tell_are_asked_for(caplog):
    original = read("ddt_lightning")[1]
    with pytest.raises(ValueError, match="how many of its 3 blocks are the encoder; pass num_encoder_blocks"):
        ddt.infer_config(original)
    with pytest.raises(ValueError, match="of its 3 blocks 3 can't be the encoder"):
        ddt.infer_config(original, num_encoder_blocks=3)
    with pytest.raises(ValueError, match="patches have 16 values.*of 3 channels; pass in_channels"):
        ddt.infer_config(original, num_encoder_blocks=1, in_channels=3)
    assert not caplog.text
    read("ddt_ema_only")
    assert "48 values are read as 3 channels of 4×4" in caplog.text
    with pytest.raises(ValueError, match="3 blocks have one width.*pass num_encoder_blocks"):
        rae.infer_config(read("rae_dh_qknorm")[1])
    original = read("rae_dh")[1]
    assert rae.infer_config(original, num_attention_heads=(2,))["decoder_num_attention_heads"] == 2
    with pytest.raises(ValueError, match="num_attention_heads has 3 numbers"):
        rae.infer_config(original, num_attention_heads=(2, 3, 4))
    with pytest.raises(ValueError, match="width 48 is not divisible by 5 attention heads"):
        rae.infer_config(original, num_attention_heads=(2, 5))
    with pytest.raises(ValueError, match=r"'blocks.1.' are missing"):
        rae.infer_config({key: value for key, value in original.items() if not key.startswith("blocks.1.")})
    with pytest.raises(ValueError, match="dec_feat_rope.freqs_cos' is missing"):
        rae.infer_config({key: value for key, value in original.items() if not key.startswith("dec_feat_rope.")})


@pytest.mark.parametrize("name", DDT_FILES | RAE_FILES)
def test_keys_and_shapes_that_do_not_fit_are_named(name):
    checkpoint = parse_checkpoint(FIXTURES / f"{name}.pt", num_encoder_blocks=ALL[name])
    original, layer = checkpoint.original, "blocks.1.attn.qkv.weight"
    changes = {
        f"'{layer}' is missing": {key: value for key, value in original.items() if key != layer},
        "'blocks.1.extra.weight' is unknown": original | {"blocks.1.extra.weight": torch.zeros(1)},
        f"'{layer}' has shape .*is needed": original | {layer: original[layer][:-1]},
        "linear.weight' has shape": original | {"final_layer.linear.weight": torch.zeros(2, 2)},
    }
    for message, changed in changes.items():
        with pytest.raises(ValueError, match=message):
            ours = checkpoint.family.to_ours(changed, checkpoint.config)
            build_model(DDTTransformer2DModel, replace(checkpoint, original=changed, weights=ours), "file.pt")


def test_streams_of_ddt_have_one_width():
    original = read("ddt_lightning")[1]
    wider = original | {"x_embedder.proj.weight": torch.zeros(64, 16), "blocks.1.mlp.w2.weight": torch.zeros(64, 170)}
    with pytest.raises(ValueError, match="differ in width or heads"):
        ddt.infer_config(wider, num_encoder_blocks=1)


def test_compiled_and_raw_weights_of_ddt_are_told_apart():
    state_dict = torch.load(FIXTURES / "ddt_lightning.pt", weights_only=True)["state_dict"]
    compiled = {key.replace("denoiser.", "denoiser._orig_mod.", 1): value for key, value in state_dict.items()}
    for weights in ("auto", "ema", "model"):
        expected, prefix = ddt.DDT.select(state_dict, weights)
        actual, _ = ddt.DDT.select(compiled, weights)
        assert prefix == ("denoiser" if weights == "model" else "ema_denoiser")
        assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    only_average = torch.load(FIXTURES / "ddt_ema_only.pt", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match="no 'model' weights; pass weights='ema'"):
        ddt.DDT.select(only_average, "model")


def preset_on_meta(name):
    with torch.device("meta"):
        return DDTTransformer2DModel.from_preset(name)


@pytest.mark.parametrize("name", DDT_PRESETS)
def test_presets_have_the_published_parameters(name):
    parameters = sum(parameter.numel() for parameter in preset_on_meta(name).parameters() if parameter.requires_grad)
    assert round(parameters / 1e6, 1) == DDT_PRESETS[name].parameters_m


@pytest.mark.parametrize(("name", "size"), [("RAE-DiT-DH-XL", "xl"), ("RAE-DiT-DH-S", "s")])
def test_presets_have_the_published_keys(name, size):
    model = preset_on_meta(name)
    shapes = json.loads((FIXTURES / f"rae_dh_{size}_256.keys.json").read_text())["keys"]
    original = rae.RAE.to_original(model.state_dict(), model.config)
    tables = {key: shape for key, shape in shapes.items() if key in rae.RAE.tables}
    assert {key: list(value.shape) for key, value in original.items()} | tables == shapes
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    for option, value in rae.infer_config(published).items():
        assert model.config[option] == value, option


def test_the_published_ddt_is_told_by_its_width(caplog):
    model = preset_on_meta("DDT-XL/2")
    original = ddt.DDT.to_original(model.state_dict(), model.config)
    assert "22 of its 28 blocks" not in caplog.text
    config = ddt.infer_config(original, name="model.ckpt")
    assert {option: model.config[option] for option in config} == config
    assert "model.ckpt: read as a model with 22 of its 28 blocks in the encoder" in caplog.text
    assert count_macs(model.config) / 1e9 == pytest.approx(131.48, abs=0.01)
