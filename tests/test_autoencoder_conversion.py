"""Original autoencoders, VA-VAE's and REPA-E's: the same numbers as the original code computes, and back."""

import argparse
import json
import re
import sys

import pytest
import torch
from accelerate import init_empty_weights
from conftest import FIXTURES, ROOT, load_golden, tiny_transformer
from diffusers import AutoencoderKL
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.checkpoints.autoencoders import (
    AutoencoderHints,
    build_autoencoder,
    original_autoencoder,
    parse_autoencoder,
)
from dit_hf.checkpoints.autoencoders.family import original_keys
from dit_hf.checkpoints.autoencoders.kl import VAVAE as FAMILY
from dit_hf.checkpoints.autoencoders.kl import infer_config
from dit_hf.checkpoints.autoencoders.parity import measure_autoencoder_parity
from dit_hf.checkpoints.autoencoders.reference import reference_decode, reference_encode
from dit_hf.checkpoints.latents_stats import FORMS, original_latents_stats, read_latents_stats
from dit_hf.command_line import run
from dit_hf.commands import convert, export, verify
from dit_hf.data.autoencoders import vae_statistics
from dit_hf.data.latents import normalise_latents


# Fixture -> groups of its group norms, and whose form its statistics have.
VAES = {"vavae": (3, "vavae"), "repae_vae": (2, "repae"), "repae_ldm_vae": (2, "repae")}
VAVAE = {
    "checkpoint_path": FIXTURES / "vavae.pt",
    "latents_stats": FIXTURES / "vavae-latents-stats.pt",
    "norm_num_groups": 3,
}


def parse(name):
    return parse_autoencoder(FIXTURES / f"{name}.pt", AutoencoderHints(VAES[name][0]))


def load(name, latent_multiplier=1.0):
    statistics = read_latents_stats(FIXTURES / f"{name}-latents-stats.pt", latent_multiplier)
    return build_autoencoder(parse(name), name, statistics)


def assert_close(output, expected):
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


# Numbers


@pytest.mark.parametrize("name", VAES)
def test_encoding_and_decoding_equal_the_original(name):
    vae, golden = load(name), load_golden(f"{name}.io")
    with torch.no_grad():
        posterior = vae.encode(golden["image"]).latent_dist
        decoded = vae.decode(golden["mean"]).sample
    assert_close(posterior.mean, golden["mean"])
    assert_close(posterior.std, golden["std"])
    assert_close(posterior.logvar, golden.get("logvar", 2 * golden["std"].log()))
    assert_close(decoded, golden["decoded_mean"])


@pytest.mark.parametrize(
    ("name", "multiplier", "suffix"), [*((name, 1.0, "") for name in VAES), ("vavae", 0.5, "_mult")]
)
def test_a_pipeline_decodes_normalised_latents_as_the_original(name, multiplier, suffix):
    vae, golden = load(name, multiplier), load_golden(f"{name}.io")
    pipe = DiTClassCondPipeline(tiny_transformer(in_channels=4), make_scheduler("flow_euler"), vae)
    images = pipe.decode_latents(golden["normalised"].float(), output_type="pt")
    assert_close(images, (golden[f"normalised_decoded{suffix}"] / 2 + 0.5).clamp(0, 1))
    assert_close(normalise_latents(golden[f"normalised_raw{suffix}"], *vae_statistics(vae)), golden["normalised"])
    if not suffix:  # the originals truncate, two ways, and diffusers rounds
        pixels = (images * 255).round().permute(0, 2, 3, 1)
        assert (pixels - golden["normalised_uint8"].float()).abs().max() <= 1


def test_what_the_transformer_sees_is_the_originals():
    vae, golden = load("vavae"), load_golden("vavae.io")
    with torch.no_grad():
        posterior = vae.encode(golden["image"]).latent_dist
    sample = posterior.mean + posterior.std * golden["noise"]
    assert_close(sample, golden["sample"])
    assert_close(normalise_latents(sample, *vae_statistics(vae)), golden["normalised_of_sample"])


@pytest.mark.parametrize("name", VAES)
def test_the_oracle_equals_the_original(name):
    golden, groups = load_golden(f"{name}.io"), VAES[name][0]
    weights = parse(name).original
    mean, logvar = reference_encode(weights, groups, golden["image"]).chunk(2, dim=1)
    assert_close(mean, golden["mean"])
    assert_close((logvar / 2).exp(), golden["std"])
    assert_close(reference_decode(weights, groups, golden["mean"]), golden["decoded_mean"])


# Weights


def original_weights(name="repae_vae"):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", VAES)
def test_every_key_comes_back_to_the_bit(name):
    content = original_weights(name)
    dropped = ("loss.", "foundation_model.", "linear_proj.")
    weights = {key: value for key, value in content.get("state_dict", content).items() if not key.startswith(dropped)}
    back = original_autoencoder(load(name))
    assert back.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(back[key], weight), key  # as shapes are, too


@pytest.mark.parametrize("name", VAES)
def test_statistics_come_back_to_the_bit(name):
    expected = torch.load(FIXTURES / f"{name}-latents-stats.pt", weights_only=True)
    written = original_latents_stats(load(name), VAES[name][1])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_both_forms_of_the_statistics_say_the_same(tmp_path):
    vae = load("vavae")
    for form in FAMILY.stats_forms:
        torch.save(original_latents_stats(vae, form), tmp_path / "stats.pt")
        mean, std = read_latents_stats(tmp_path / "stats.pt")
        assert mean == vae.config.latents_mean
        assert std == pytest.approx(vae.config.latents_std, rel=1e-7)


LAYOUTS = {
    "one level": {"block_out_channels": (8,)},
    "three blocks": {"block_out_channels": (4, 8), "layers_per_block": 3},
    "many latent channels": {"block_out_channels": (8, 8), "latent_channels": 33},
    "attention in the encoder only": {"block_out_channels": (4, 8, 8), "down": "-a-"},
    "attention at every level": {"block_out_channels": (4, 8, 8), "down": "aaa", "up": "aaa"},
    "grey images": {"block_out_channels": (8, 8), "in_channels": 1, "out_channels": 1},
}


def random_vae(block_out_channels, down="", up="", **options):
    torch.manual_seed(0)
    levels = len(block_out_channels)
    kinds = [["Attn" * (letter == "a") for letter in letters.ljust(levels, "-")] for letters in (down, up)]
    vae = AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=tuple(f"{kind}DownEncoderBlock2D" for kind in kinds[0]),
        up_block_types=tuple(f"{kind}UpDecoderBlock2D" for kind in kinds[1]),
        norm_num_groups=4,
        **options,
    )
    for parameter in vae.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return vae.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read_off_the_keys(layout, tmp_path):
    vae = random_vae(**LAYOUTS[layout])
    torch.save(original_autoencoder(vae), tmp_path / "vae.pt")
    autoencoder = parse_autoencoder(tmp_path / "vae.pt", AutoencoderHints(4))
    channels = vae.config.latent_channels
    read = build_autoencoder(autoencoder, tmp_path, ([0.0] * channels, [1.0] * channels))
    parity = measure_autoencoder_parity(autoencoder, read)
    assert parity.holds and parity.exact == parity.total
    expected = vae.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in read.state_dict().items())


CONTAINERS = {
    "state dict": lambda weights: weights,
    "Lightning": lambda weights: {"epoch": 3, "state_dict": weights, "callbacks": {}, "optimizer_states": [None]},
    "MAR": lambda weights: {"model": weights},
    "EMA": lambda weights: {"model": {}, "ema": weights, "args": argparse.Namespace(resolution=256)},
    "REPA-E's training": lambda weights: {"ema": {"bn.running_mean": torch.ones(4)}, "vae": weights, "steps": 4},
    "distributed": lambda weights: {f"module.{key}": weight for key, weight in weights.items()},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_weights_are_found_in_their_containers(kind, tmp_path):
    weights = original_weights()
    extras = {"loss.steps": torch.tensor(3), "foundation_model.model.cls_token": torch.full((1,), torch.nan)}
    torch.save(CONTAINERS[kind](weights | extras), tmp_path / "vae.pt")
    read = parse_autoencoder(tmp_path / "vae.pt", AutoencoderHints(2)).original
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)


def test_a_changed_weight_is_noticed():
    """Of the keys' bias, too, which no output shows."""
    vae, autoencoder = load("vavae"), parse("vavae")
    assert measure_autoencoder_parity(autoencoder, vae).holds
    vae.decoder.mid_block.attentions[0].to_k.bias.data[3] += 1e-3
    assert not measure_autoencoder_parity(autoencoder, vae).holds


# The real size


def test_the_published_layout_is_read_off_its_keys():
    """f16d32: 342 keys, 69.8 M parameters."""
    keys = json.loads((FIXTURES / "vavae_f16d32.keys.json").read_text())["keys"]
    config = infer_config({key: torch.empty(shape, device="meta") for key, shape in keys.items()}, "f16d32")
    with init_empty_weights():
        vae = AutoencoderKL(**config)
    weights = vae.state_dict()
    table = original_keys(FAMILY, vae)
    assert {key: list(FAMILY.original_shape(ours, weights[ours].shape)) for key, ours in table.items()} == keys
    assert vae.num_parameters() == 69_836_067
    assert config["block_out_channels"] == (128, 128, 256, 256, 512)
    assert (config["layers_per_block"], config["latent_channels"]) == (2, 32)


def test_memory_of_a_conversion():
    command = [sys.executable, ROOT / "benchmarks" / "conversion_memory.py", "--preset", "VA-VAE"]
    assert json.loads(run_forked(command, check=True).stdout)["ratio"] < 1.3


# Commands


def run_main(command, monkeypatch, **flags):
    given = {flag: value for flag, value in flags.items() if value is not None}
    arguments = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["dit-hf", *arguments])
    run(command.main)


@pytest.mark.parametrize("family", ["auto", "vavae"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_becomes_a_folder_and_goes_back(family, dtype, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_main(convert, monkeypatch, **VAVAE, family=family, output_dir=out, dtype=dtype)
    assert "242 of 242" in capsys.readouterr().out or dtype != "float32"
    vae = AutoencoderKL.from_pretrained(out)
    assert (vae.config.scaling_factor, vae.config.force_upcast) == (1.0, False)
    statistics = torch.load(VAVAE["latents_stats"], weights_only=True)
    assert vae.config.latents_mean == statistics["mean"].flatten().tolist()
    assert vae.config.latents_std == statistics["std"].flatten().tolist()
    run_main(verify, monkeypatch, **VAVAE | {"latents_stats": None}, model_path=out, dtype=dtype)
    if dtype != "float32":
        return
    for form in FAMILY.stats_forms:
        back, stats = tmp_path / f"{form}.pt", tmp_path / f"{form}-stats.pt"
        run_main(export, monkeypatch, model_path=out, family=form, checkpoint_path=back, latents_stats=stats)
        written, expected = torch.load(back, weights_only=True), parse("vavae").original
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)
        assert torch.load(stats, weights_only=True).keys() == {FORMS[form].mean, FORMS[form].spread}


@pytest.mark.parametrize("name", VAES)
def test_a_file_becomes_the_vae_of_a_pipeline(name, tmp_path, monkeypatch):
    flags = {"checkpoint_path": FIXTURES / "sit_p2.pt", "family": "sit", "num_attention_heads": 4}
    flags |= {"vae": FIXTURES / f"{name}.pt", "latents_stats": FIXTURES / f"{name}-latents-stats.pt"}
    run_main(convert, monkeypatch, **flags, norm_num_groups=VAES[name][0], output_dir=tmp_path / "out")
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    golden = load_golden(f"{name}.io")
    images = pipe.decode_latents(golden["normalised"].float(), output_type="pt")
    assert_close(images, (golden["normalised_decoded"] / 2 + 0.5).clamp(0, 1))
    assert pipe(3, num_inference_steps=2, output_type="pt").images.isfinite().all()
    verify_flags = {"checkpoint_path": flags["vae"], "norm_num_groups": VAES[name][0]}
    run_main(verify, monkeypatch, **verify_flags, model_path=tmp_path / "out" / "vae")


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    run_main(convert, monkeypatch, **VAVAE, output_dir=tmp_path / "out", dry_run=True)
    assert "an autoencoder of widths 6, 6, 12, 12, 24, 1 block per level, 4 latent" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# What is refused: one line, exit code 2, nothing written


def refused(command, monkeypatch, capsys, folder, **flags):
    """The line that a command ends with."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        run_main(command, monkeypatch, **flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit_.value.code == 2 and len(lines) == 1
    assert sorted(folder.rglob("*")) == before
    return lines[0]


STATISTICS = {
    "nothing": ({}, "holds no statistics of latents: 'mean' and 'std' or 'latents_bias' and 'latents_scale'"),
    "half": ({"mean": torch.zeros(4)}, "and it has mean"),
    "mixed": ({"mean": torch.zeros(4), "latents_scale": torch.ones(4)}, "and it has latents_scale, mean"),
    "shape": ({"mean": torch.zeros(2, 2), "std": torch.ones(4)}, r"'mean' has shape \(2, 2\), where \(1, C, 1, 1\)"),
    "empty": ({"mean": torch.zeros(0), "std": torch.ones(0)}, r"'mean' has shape \(0,\)"),
    "scalar": ({"mean": torch.zeros(()), "std": torch.ones(())}, r"'mean' has shape \(\)"),
    "apart": ({"mean": torch.zeros(4), "std": torch.ones(3)}, "'mean' is of 4 channels and 'std' of 3"),
    "NaN": ({"mean": torch.full((4,), torch.nan), "std": torch.ones(4)}, "'mean' holds NaN"),
    "zero": ({"mean": torch.zeros(4), "std": torch.tensor([1.0, 0, 1, 1])}, "'std' must give a finite standard"),
    "negative": ({"mean": torch.zeros(4), "std": -torch.ones(4)}, "'std' must give a finite standard"),
    "zero scale": ({"latents_bias": torch.zeros(4), "latents_scale": torch.zeros(4)}, "'latents_scale' must give"),
    "tiny": ({"mean": torch.zeros(4), "std": torch.full((4,), 1e-60, dtype=torch.float64)}, "'std' must give"),
    "integers": ({"mean": torch.zeros(4, dtype=torch.int64), "std": torch.ones(4)}, "'mean' holds torch.int64"),
    "list": ({"mean": [0.0] * 4, "std": [1.0] * 4}, "'mean' is not a tensor"),
    "view": ({"mean": torch.zeros(1).expand(10**9), "std": torch.ones(4)}, "'mean' .*repeats its storage"),
    "channels": ({"mean": torch.zeros(5), "std": torch.ones(5)}, "are of 5 channels, and the autoencoder .* of 4"),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_bad_statistics_are_one_line(kind, tmp_path, monkeypatch, capsys):
    content, message = STATISTICS[kind]
    torch.save(content, tmp_path / "stats.pt")
    flags = VAVAE | {"latents_stats": tmp_path / "stats.pt", "output_dir": tmp_path / "out"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **flags)
    assert re.search(message, line), line


CHANGES = {
    "missing": ({"decoder.mid.attn_1.k.bias": None}, "the key 'decoder.mid.attn_1.k.bias' is missing"),
    "unknown": ({"encoder.down.0.attn.7.q.bias": torch.ones(4)}, "'encoder.down.0.attn.7.q.bias' is unknown"),
    "gap": ({"encoder.down.9.block.0.conv1.bias": torch.ones(4)}, "'encoder.down.9.block.0.conv1.bias' is unknown"),
    "no level": ({"encoder.down.0.block.0.conv1.weight": None}, "'encoder.down.0.block.0.conv1.weight' is missing"),
    "shape": ({"encoder.conv_out.bias": torch.ones(3)}, r"'encoder.conv_out.bias' has shape \(3,\), where \(8,\)"),
    "no convolution": ({"encoder.conv_in.weight": torch.ones(4)}, "where 4 axes are needed"),
    "matrix": ({"decoder.mid.attn_1.q.weight": torch.ones(16, 16)}, r"where \(16, 16, 1, 1\) is needed"),
    "NaN": ({"quant_conv.bias": torch.full((8,), torch.nan)}, "8 of 8 values of 'quant_conv.bias' are NaN"),
    "integers": ({"quant_conv.bias": torch.ones(8, dtype=torch.int64)}, "'quant_conv.bias' holds torch.int64"),
    "diffusers": (
        {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(4)},
        "is already in diffusers' format; pass the folder",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_files_that_do_not_fit_are_one_line(kind, tmp_path, monkeypatch, capsys):
    changes, message = CHANGES[kind]
    weights = {key: weight for key, weight in (original_weights() | changes).items() if weight is not None}
    torch.save(weights, tmp_path / "vae.pt")
    flags = VAVAE | {"checkpoint_path": tmp_path / "vae.pt", "norm_num_groups": 2, "output_dir": tmp_path / "out"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **flags, family="vavae")
    assert re.search(message, line), line


SIT = {"checkpoint_path": FIXTURES / "sit_p2.pt", "family": "sit", "num_attention_heads": 4}
PIXELS = {"checkpoint_path": FIXTURES / "dit_p8_in3.pt", "family": "dit", "num_attention_heads": 4}
FLAGS = {
    "groups": (VAVAE | {"norm_num_groups": None}, r"its width 6 is not divisible by 32 groups; .*--norm_num_groups"),
    "no statistics": (VAVAE | {"latents_stats": None}, "has no statistics of its latents; pass --latents_stats FILE"),
    "family": (VAVAE | {"family": "sit"}, "is an autoencoder, not a transformer; `--family vavae` converts it"),
    "a transformer": (SIT | {"family": "vavae"}, "is not an original AutoencoderKL: the key 'encoder.down.0.block"),
    "a VAE of a VAE": (VAVAE | {"vae": "x"}, "--vae is for pipelines, and .*vavae.pt is an autoencoder; omit it"),
    "license": (VAVAE | {"license": "mit"}, "--license is for pipelines"),
    "no file of statistics": (VAVAE | {"latents_stats": "nope"}, "--latents_stats: Can't read checkpoint nope"),
    "weights as statistics": (VAVAE | {"latents_stats": FIXTURES / "vavae.pt"}, "holds no statistics of latents"),
    "multiplier": (
        VAVAE | {"latent_multiplier": 0},
        "argument --latent_multiplier: '0' is not a finite number above 0",
    ),
    "pipeline without": (
        SIT | {"vae": FIXTURES / "vavae.pt", "norm_num_groups": 3},
        "vavae.pt is an original autoencoder, whose file has",
    ),
    "no VAE": (SIT | {"latents_stats": VAVAE["latents_stats"]}, "--latents_stats is for an original autoencoder"),
    "no file of a VAE": (SIT | {"vae": "nope.pt", "latents_stats": "nope"}, "--vae nope.pt must be the folder or the"),
    "other file": (
        SIT | {"vae": SIT["checkpoint_path"], "latents_stats": VAVAE["latents_stats"]},
        "sit_p2.pt is not an original AutoencoderKL",
    ),
    "channels": (
        PIXELS | {"vae": FIXTURES / "vavae.pt", "latents_stats": VAVAE["latents_stats"], "norm_num_groups": 3},
        "has latents of 4 channels, and the checkpoint's model takes 3",
    ),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags_that_do_not_fit_are_one_line(kind, tmp_path, monkeypatch, capsys):
    flags, message = FLAGS[kind]
    line = refused(convert, monkeypatch, capsys, tmp_path, **flags, output_dir=tmp_path / "out")
    assert re.search(message, line), line


def test_a_folder_has_its_own_statistics(tmp_path, monkeypatch, capsys):
    random_vae((8,)).save_pretrained(tmp_path / "vae")
    flags = SIT | {"vae": tmp_path / "vae", "latents_stats": "nope"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **flags, output_dir=tmp_path / "out")
    assert "--latents_stats is for an original" in line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Autoencoders in diffusers' format, and a transformer."""
    folder = tmp_path_factory.mktemp("folders")
    load("repae_vae").save_pretrained(folder / "vae")
    random_vae((8,)).save_pretrained(folder / "scaled")
    random_vae((8,), mid_block_add_attention=False).save_pretrained(folder / "plain")
    random_vae((8,), use_quant_conv=False).save_pretrained(folder / "flux")
    tiny_transformer().save_pretrained(folder / "transformer")
    (folder / "there.pt").touch()
    return folder


EXPORTS = {
    "vae": ({"family": "dit"}, "is an AutoencoderKL; pass --family vavae or repae"),
    "transformer": (
        {},
        "must be the folder of an AutoencoderKL or AutoencoderRAE, such as the folder vae",
    ),
    "nope": ({}, "must be the folder of an AutoencoderKL"),
    "plain": ({}, "has mid_block_add_attention=False"),
    "flux": ({}, "has use_quant_conv=False"),
    "scaled": ({"latents_stats": "stats.pt"}, "has no latents_mean and latents_std; omit"),
    "vae ": ({"latents_stats": "there.pt"}, "there.pt exists; choose a new name"),
    " vae": ({"latents_stats": "new.pt"}, "are both"),
    "vae  ": ({"latents_stats": "stats.safetensors"}, "must end in .pt"),
    "transformer ": ({"family": "dit", "latents_stats": "stats.pt"}, "and .*transformer is none; omit it"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_that_do_not_fit_are_one_line(name, folders, monkeypatch, capsys):
    flags, message = EXPORTS[name]
    monkeypatch.chdir(folders)
    flags = {"family": "vavae", "model_path": folders / name.strip(), "checkpoint_path": "new.pt"} | flags
    line = refused(export, monkeypatch, capsys, folders, **flags)
    assert re.search(message, line), line
