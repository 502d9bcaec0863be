"""JiT: the original's recorded numbers, its checkpoints both ways, and what sets its model apart from DiT."""

import json

import pytest
import torch
from conftest import FIXTURES, load_golden, tiny_design, tiny_inputs
from safetensors import safe_open

from dit_hf import JiTTransformer2DModel
from dit_hf.checkpoints.jit import JIT, infer_jit_config, jit_reference_forward
from dit_hf.checkpoints.loading import build_model
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.checkpoints.saving import save_original
from dit_hf.checkpoints.sizes import Hints
from dit_hf.presets import JIT_PRESETS
from dit_hf.training.objectives import ClampedVelocityObjective, LogitNormal
from dit_hf.transformer_jit import count_weights, sincos_positions


# Without training arguments in the file, the first block with context tokens must be told.
CONTEXT_STARTS = {"jit_b16_train": None, "jit_p4": 1}


def read_original(name, weights="ema", **told):
    """A recorded checkpoint, parsed."""
    told = {"in_context_start": CONTEXT_STARTS[name]} | told
    return parse_checkpoint(FIXTURES / f"{name}.pt", weights=weights, **told)


def load_original(name, weights="ema", **told):
    return build_model(JiTTransformer2DModel, read_original(name, weights, **told), name)


def recorded_settings(name, kind):
    with safe_open(FIXTURES / f"{name}.io.safetensors", "pt") as file:
        return json.loads(file.metadata()[kind])


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "weights", "output"),
    [
        ("jit_b16_train", "ema", "out"),
        ("jit_b16_train", "model", "out_model"),
        ("jit_p4", "ema", "out"),
    ],
)
@torch.no_grad()
def test_forward_equals_the_original(name, weights, output):
    golden = load_golden(f"{name}.io")
    model, inputs = load_original(name, weights), (golden["x"], 1000 * (1 - golden["t"]), golden["y"])
    images = model(*inputs, return_pred_original_sample=True).sample
    torch.testing.assert_close(images, golden[output], rtol=0, atol=1e-5)
    sigma = (1 - golden["t"]).view(-1, 1, 1, 1)
    assert sigma.min() < 0.05  # the clamp is among the recorded times
    torch.testing.assert_close(model(*inputs).sample, (golden["x"] - images) / sigma.clamp(min=0.05))


@pytest.mark.parametrize("name", CONTEXT_STARTS)
@torch.no_grad()
def test_reference_forward_equals_the_original(name):
    golden, checkpoint = load_golden(f"{name}.io"), read_original(name)
    inputs = golden["x"], golden["t"], golden["y"]
    output = jit_reference_forward(checkpoint.original, checkpoint.config, *inputs)
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)


def guided_velocity(model, images, time, labels, cfg, interval):
    """data − noise of every sample at its time, guided inside of the interval."""
    null = torch.full_like(labels, model.config.num_classes)
    conditional, unconditional = (-model(images, 1000 * (1 - time), ids).sample for ids in (labels, null))
    low, high = interval
    guided = (time < high) & ((time > low) | (low == 0))
    scale = torch.where(guided, cfg, 1.0).view(-1, 1, 1, 1)
    return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("settings", recorded_settings("jit_p4", "cfg"), ids=str)
@torch.no_grad()
def test_guided_velocity_equals_the_original(settings):
    golden, model = load_golden("jit_p4.io"), load_original("jit_p4")
    inputs = golden["cfg_z"], golden["cfg_t"], golden["cfg_y"]
    output = guided_velocity(model, *inputs, settings["scale"], settings["interval"])
    assert relative_error(output, golden[settings["out"]]) < 1e-5


def sample(model, noise, labels, method, steps, cfg, interval):
    """The original's samplers on their uniform grid; Heun's last step is Euler's."""
    images, times = noise, torch.linspace(0, 1, steps + 1)
    for index in range(steps):
        step = times[index + 1] - times[index]
        time, after = (end.expand(len(labels)) for end in times[index : index + 2])
        slope = guided_velocity(model, images, time, labels, cfg, interval)
        if method == "heun" and index < steps - 1:
            ahead = guided_velocity(model, images + step * slope, after, labels, cfg, interval)
            slope = (slope + ahead) / 2
        images = images + step * slope
        yield images


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for name in CONTEXT_STARTS for settings in recorded_settings(name, "sample")],
    ids=lambda value: value if isinstance(value, str) else value["out"],
)
@torch.no_grad()
def test_sampling_equals_the_original(name, settings):
    golden, model = load_golden(f"{name}.io"), load_original(name, noise_scale=settings["noise_scale"])
    noise = model.config.noise_scale * golden["sample_noise"]
    call = [settings[key] for key in ("method", "steps", "cfg", "interval")]
    steps = list(sample(model, noise, golden["sample_y"], *call))
    assert relative_error(steps[-1], golden[settings["out"]]) < 1e-4
    if settings["out"] == "sample_heun4" and name == "jit_p4":
        assert relative_error(torch.stack(steps)[:, :1], golden["sample_heun4_traj"]) < 1e-4


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@torch.no_grad()
def test_training_loss_equals_the_original(noise_scale):
    golden, model = load_golden("jit_p4.io"), load_original("jit_p4", noise_scale=noise_scale)
    settings = recorded_settings("jit_p4", "loss")
    objective = ClampedVelocityObjective(t_eps=settings["t_eps"], noise_scale=noise_scale)
    # The original draws the time of the data, 1 - sigma.
    mean, std = -settings["P_mean"], settings["P_std"]
    assert objective.time_sampler == LogitNormal(mean, std)
    sigma = (mean - std * golden["loss_t_normal"]).sigmoid()
    batch = {"x_start": golden["loss_x"], "noise": golden["loss_noise"] / noise_scale, "time": sigma}
    batch |= {"label": golden["loss_y"], "drop": golden["loss_drop_uniform"] < settings["label_drop_prob"]}
    losses = objective.loss(model, batch)
    torch.testing.assert_close(losses, golden["loss_per_sample"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.mean(), golden["loss"], rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_loss_is_zero_for_the_data_below_the_clamp_too():
    objective, sigma = ClampedVelocityObjective(noise_scale=2.0), torch.tensor([0.0, 0.01, 0.05, 0.7])
    batch = {"x_start": torch.randn(4, 3, 8, 8), "noise": torch.randn(4, 3, 8, 8), "time": sigma}
    noisy = objective.add_noise(batch["x_start"], batch["noise"], sigma)
    velocity = (noisy - batch["x_start"]) / sigma.clamp(min=0.05).view(4, 1, 1, 1)
    assert objective.sample_losses(velocity, batch).max() < 1e-9


# Checkpoints


@pytest.mark.parametrize("name", CONTEXT_STARTS)
def test_weights_come_back_to_the_bit(name):
    checkpoint = read_original(name)
    model = build_model(JiTTransformer2DModel, checkpoint, name)
    back = JIT.to_original(model.state_dict(), model.config)
    assert back.keys() == checkpoint.original.keys()
    assert all(torch.equal(back[key], weight) for key, weight in checkpoint.original.items())


def test_positions_are_those_of_the_file(tmp_path):
    """Averaging the weights has moved the table; a computed one would be another model."""
    model = load_original("jit_b16_train")
    moved = model.pos_embed.positions - sincos_positions(3, 3, 32)
    assert 5e-5 < moved.abs().max() < 5e-4
    model.save_pretrained(tmp_path)
    assert torch.equal(JiTTransformer2DModel.from_pretrained(tmp_path).pos_embed.positions, model.pos_embed.positions)
    with torch.no_grad():
        assert model.pos_embed(torch.zeros(1, 3, 48, 32)).shape == (1, 6, 32)


def test_configuration_is_read_off_the_file():
    with safe_open(FIXTURES / "jit_b16_train.io.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["config"])
    config = read_original("jit_b16_train").config
    assert config == {
        "sample_size": recorded["input_size"],
        "patch_size": recorded["patch_size"],
        "in_channels": recorded["in_channels"],
        "num_layers": recorded["depth"],
        "num_attention_heads": recorded["num_heads"],
        "attention_head_dim": recorded["hidden_size"] // recorded["num_heads"],
        "mlp_ratio": 4.0,
        "bottleneck_dim": recorded["bottleneck_dim"],
        "in_context_len": recorded["in_context_len"],
        "in_context_start": recorded["in_context_start"],
        "num_classes": recorded["num_classes"],
        "dropout": 0.0,
        "t_eps": 0.05,
        "noise_scale": 1.0,
    }
    ours = read_original("jit_b16_train", in_context_start=2, noise_scale=2.0).config
    assert (ours["in_context_start"], ours["noise_scale"]) == (2, 2.0)


def infer(arguments=(), **changed):
    weights = read_original("jit_p4", noise_scale=1.0).weights | changed
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    return infer_jit_config(weights, Hints(arguments=dict(arguments)), "file.pt")


def test_the_first_block_with_context_tokens_is_not_guessed():
    for arguments in ({}, {"model": "JiT-X/16"}, {"model": ["JiT-B/16"]}):
        with pytest.raises(ValueError, match=r"in_context_start.*--in_context_start"):
            infer(arguments)
    starts = {name: infer({"model": name})["in_context_start"] for name in JIT_PRESETS}
    assert starts == {
        f"JiT-{size}/{patch}": start for size, start in (("B", 4), ("L", 8), ("H", 10)) for patch in (16, 32)
    }


def test_an_unknown_noise_scale_is_that_of_the_published_models(caplog):
    model = {"model": "JiT-B/32"}
    assert infer(model)["noise_scale"] == 1.0 and "--noise_scale" in caplog.text
    assert infer(model, **{"pos_embed.positions": torch.zeros(1, 128**2, 64)})["noise_scale"] == 2.0
    caplog.clear()
    assert infer(model | {"noise_scale": 3.0})["noise_scale"] == 3.0 and not caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_embed.weight": None}, "'net.y_embedder.embedding_table.weight' is missing"),
        ({"pos_embed.proj.weight": torch.zeros(64, 16)}, r"'net.x_embedder.proj2.weight' has shape \(64, 16\)"),
        ({"pos_embed.positions": torch.zeros(1, 15, 64)}, "15 tokens, which is not a square number"),
        ({"transformer_blocks.0.attn.norm_q.weight": torch.ones(12)}, "64 is not divisible by 12"),
        ({"transformer_blocks.0.ff.gate_proj.weight": torch.ones(0, 64)}, r"'net.blocks.0.mlp.w12.weight'"),
    ],
)
def test_weights_that_make_no_sense_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        infer({"model": "JiT-B/16"}, **changed)


# The model


def test_context_tokens_join_before_their_block():
    model, seen = tiny_design("jit", num_layers=5, in_context_start=3), []
    for block in model.transformer_blocks:
        block.ff.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    with torch.no_grad():
        model(**tiny_inputs())
    assert seen == [16, 16, 16, 20, 20]


def test_dropout_is_in_the_middle_half():
    model = tiny_design("jit", num_layers=9, dropout=0.25)
    for of_block in (lambda block: block.attn.to_out[1].p, lambda block: block.ff.dropout.p):
        assert [of_block(block) for block in model.transformer_blocks] == [0.0] * 2 + [0.25] * 4 + [0.0] * 3
    model.train()
    inputs = tiny_inputs() | {"force_drop_ids": torch.zeros(3)}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).sample, model(**inputs).sample)


def test_fresh_model_is_initialised_as_the_original():
    torch.manual_seed(0)
    model = JiTTransformer2DModel(sample_size=32, num_layers=1, in_context_start=0, attention_head_dim=32)
    dim, hidden = 384, 1024
    for block in model.transformer_blocks:
        assert block.modulation.weight.abs().max() == 0
        # Xavier over what is one matrix in the original.
        for layer, height in ((block.attn.to_q, 3 * dim), (block.ff.up_proj, 2 * hidden)):
            assert 0.95 < layer.weight.abs().max() / (6 / (dim + height)) ** 0.5 <= 1
    assert 0.95 < model.pos_embed.bottleneck.weight.abs().max() / (6 / (128 + 3 * 16**2)) ** 0.5 <= 1
    for weight in (model.class_embed.weight, model.time_embed.linear_1.weight, model.context_embed.positions):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    images = torch.randn(1, 3, 32, 32)
    output = model.eval()(images, 500, torch.tensor([1]), return_pred_original_sample=True).sample
    assert output.abs().max() == 0


@torch.no_grad()
def test_label_dropout_is_drawn_once_a_sample():
    """The context tokens and the adaptive norms see the same label."""
    model, seen = tiny_design("jit", class_dropout_prob=0.3).train(), []
    model.transformer_blocks = torch.nn.ModuleList()
    model.class_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.zeros(4096, 4, 2, 2), torch.zeros(4096), torch.full((4096,), 5))
    assert len(seen) == 1 and set(seen[0].tolist()) == {5, 10}
    assert (seen[0] == 10).float().mean().item() == pytest.approx(0.3, abs=0.04)
    inputs = tiny_inputs() | {"force_drop_ids": torch.tensor([1, 0, 0])}
    model = tiny_design("jit")
    null = model(**(tiny_inputs() | {"class_labels": torch.tensor([10, 0, 10])})).sample
    assert torch.equal(model.train()(**inputs).sample, null)


@pytest.mark.parametrize("size", [(8, 16), (4, 12), (2, 2)])
@torch.no_grad()
def test_other_sizes(size):
    inputs = tiny_inputs(height=size[0], width=size[1])
    assert tiny_design("jit")(**inputs).sample.shape == (3, 4, *size)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"in_context_start": 2}, "`in_context_start` is 2; a model of 2 layers has blocks 0 to 1"),
        ({"in_context_start": -1}, "`in_context_start` is -1"),
        ({"in_context_len": 0}, "`in_context_len` is 0"),
        ({"bottleneck_dim": 2**20}, "`bottleneck_dim` is 1048576"),
        ({"attention_head_dim": 10}, "`attention_head_dim` is 10; .*multiple of 4"),
        ({"sample_size": 9}, "9 is not divisible by `patch_size` 2"),
        ({"dropout": 1.5}, "`dropout` is 1.5"),
        ({"t_eps": 0}, "`t_eps` is 0"),
        ({"noise_scale": float("nan")}, "`noise_scale` is nan"),
        ({"mlp_ratio": 1e-3}, "`mlp_ratio` is 0.001"),
        ({"num_layers": 1024, "num_attention_heads": 4096}, "parameters; at most"),
    ],
)
def test_wrong_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        tiny_design("jit", **option)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 4, 7, 8)}, "7×8 is not divisible by the patch size 2"),
        ({"hidden_states": torch.zeros(3, 3, 8, 8)}, r"\(3, 3, 8, 8\).*\(batch, 4, height, width\)"),
        ({"class_labels": torch.tensor([1, 2])}, r"\(2,\).*batch of 3"),
        ({"class_labels": torch.tensor([1, 2, 11])}, "holds 11; the allowed ids are 0 to 10"),
        ({"force_drop_ids": torch.zeros(3, 1)}, r"`force_drop_ids` has shape \(3, 1\).*\(3,\)"),
        ({"timestep": torch.zeros(2)}, r"`timestep` has shape \(2,\).*\(3,\)"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_design("jit")(**(tiny_inputs() | change))


def test_weights_are_counted_as_they_are():
    model = tiny_design("jit", num_layers=3)
    assert count_weights(model.config) == sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)


def test_a_flag_that_contradicts_the_files_own_arguments_is_named(caplog):
    for told in ({"in_context_start": 3}, {"noise_scale": 2.0}):
        (name, value), *_ = told.items()
        assert read_original("jit_b16_train", **told).config[name] == value
        assert f"it was trained with {name}=" in caplog.text and f"{value}, as given" in caplog.text
    caplog.clear()
    assert read_original("jit_b16_train", in_context_start=4).config["in_context_start"] == 4
    assert "it was trained" not in caplog.text


def test_an_export_has_the_three_entries_that_its_code_reads(tmp_path):
    save_original(load_original("jit_p4"), JIT, tmp_path / "back.pt")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert content.keys() == {"model_ema1", "model", "model_ema2"}
    assert (tmp_path / "back.pt").stat().st_size < 1.1 * 4 * sum(w.numel() for w in content["model"].values()) + 50_000
