"""Bad files and flags of every command: one line, exit code 2, nothing written."""

import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import FIXTURES, tiny_transformer, tiny_vae
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.saving import save_original
from dit_hf.command_line import run
from dit_hf.commands import convert, export, generate, latents, metrics, sample, train, verify
from dit_hf.data import pixels
from dit_hf.evaluation import reference
from dit_hf.evaluation.extractors import Features
from dit_hf.evaluation.sources import ImageSource
from dit_hf.space import command as space


COMMANDS = {
    "convert": convert,
    "export": export,
    "generate": generate,
    "latents": latents,
    "metrics": metrics,
    "sample": sample,
    "space": space,
    "train": train,
    "verify": verify,
}
# What is given beside the bad flag; names of files are those of `files`.
GIVEN = {
    "convert": {"checkpoint_path": "dit.pt", "output_dir": "new"},
    "export": {"model_path": "diffusion", "family": "dit", "checkpoint_path": "new.pt"},
    "generate": {"pipeline": "pipe", "output": "new.png", "num_inference_steps": "1", "num_images_per_label": "1"},
    "latents": {"train_data_dir": "data", "vae": "pipe/vae", "output_dir": "new"},
    "metrics": {"samples": "images.npz", "reference": "folder", "cache_dir": "new", "bootstrap": "0"},
    "precomputed": {
        "samples": "a.safetensors",
        "reference": "b.safetensors",
        "feature_extractor": "precomputed",
        "bootstrap": "0",
        "metrics": "fid",
    },
    "sample": {"pipeline": "pipe", "output_dir": "new", "num_samples": "2", "num_inference_steps": "1"},
    "space": {"model": "pipe"},
    "train": {"train_data_dir": "data", "vae": "pipe/vae", "transformer_config": "config.json", "output_dir": "new"},
    "verify": {"checkpoint_path": "dit.pt", "model_path": "diffusion"},
}


def write_npz(path, shape, claimed=None):
    """Black images of a shape under the header of another."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": claimed or shape})
        file.write(bytes(int(np.prod(shape))))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good inputs, and in `bad` what a user or an attacker might give instead."""
    disable_progress_bar()
    folder = tmp_path_factory.mktemp("files")
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    transformer = tiny_transformer(num_classes=3, learn_sigma=False)
    names = {0: "dark", 1: "light", 2: "grey"}
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), names).save_pretrained(folder / "pipe")
    diffusion = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddpm"))
    diffusion.save_pretrained(folder / "diffusion")
    save_original(diffusion.transformer, FAMILIES["dit"], folder / "dit.pt", None)
    for name in ("jit_p4", "ddt_lightning", "ddt_ema_only", "rae_dh", "rae_dh_qknorm", "rae_lightningdit"):
        shutil.copy(FIXTURES / f"{name}.pt", folder)
    for place in ("folder", *(f"data/{split}/{name}" for split in ("train", "test") for name in ("dark", "light"))):
        (folder / place).mkdir(parents=True)
        for index, image in enumerate(images if place == "folder" else images[:2]):
            Image.fromarray(image).save(folder / place / f"{index}.png")
    (folder / "config.json").write_text('{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}')
    np.savez(folder / "images.npz", arr_0=images)
    np.savez(folder / "few.npz", arr_0=images[:3])
    for seed, name in enumerate("ab"):
        drawn = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
        Features(drawn, None, drawn[:, :5], {"name": "inception"}).save(folder / f"{name}.safetensors")

    bad = folder / "bad"
    bad.mkdir()
    whole = {"npz": folder / "images.npz", "safetensors": folder / "a.safetensors", "json": folder / "config.json"}
    whole["pt"] = whole["safetensors"]
    for ending, good in whole.items():
        (bad / f"empty.{ending}").touch()
        (bad / f"random.{ending}").write_bytes(np.random.default_rng(1).bytes(3000))
        (bad / f"cut.{ending}").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
        os.mkfifo(bad / f"pipe.{ending}")
        (bad / f"folder.{ending}").mkdir()
    flipped = bytearray(whole["npz"].read_bytes())
    flipped[2000] ^= 1
    (bad / "flipped.npz").write_bytes(flipped)
    flipped = bytearray(whole["safetensors"].read_bytes())
    flipped[-5] ^= 1
    (bad / "flipped.safetensors").write_bytes(flipped)
    (bad / "list.json").write_text("[1]")
    (bad / "text.json").write_text('"a"')
    moments = {"mu": np.zeros(8), "sigma": np.eye(8)}
    for name, changed in {
        "nan": {"mu": np.full(8, np.nan)},
        "shape": {"sigma": np.eye(7)},
        "dimensions": {"mu": np.zeros((8, 8))},
        "nothing": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        "asymmetric": {"sigma": np.triu(np.ones((8, 8)))},
        "negative": {"sigma": -np.eye(8)},
        "indefinite": {"sigma": np.ones((8, 8)) * 2 - np.eye(8)},
        "complex": {"mu": np.zeros(8, complex)},
        "words": {"mu": np.array(["a"] * 8)},
        "objects": {"mu": np.array([{}] * 8, dtype=object)},
        "extractor": {"extractor": np.array("{")},
        "extractor_list": {"extractor": np.array("[1]")},
        "no_count": {"count": np.array(0)},
        "negative_count": {"count": np.array(-5)},
        "counts": {"count": np.array([1, 2])},
        "size": {"image_size": np.array("a")},
    }.items():
        np.savez(bad / f"moments_{name}.npz", **(moments | changed))
    np.savez(bad / "moments_alone.npz", mu=np.zeros(8))
    np.savez(bad / "float.npz", arr_0=images.astype(float))
    np.savez(bad / "no_images.npz", arr_0=images[:0])
    np.savez(bad / "no_arrays.npz")
    write_npz(bad / "no_side.npz", (4, 0, 16, 3))
    write_npz(bad / "short.npz", (4, 16, 16, 3), (10**12, 16, 16, 3))
    write_npz(bad / "long.npz", (4, 16, 16, 3), (3, 16, 16, 3))
    write_npz(bad / "below_zero.npz", (4, 16, 16, 3), (-4, 16, -16, 3))
    features = {"features": torch.zeros(40, 8)}
    for name, (tensors, metadata) in {
        "nan": ({"features": torch.full((40, 8), torch.nan)}, None),
        "dimensions": ({"features": torch.zeros(40)}, None),
        "absent": ({"other": torch.zeros(40, 8)}, None),
        "integers": ({"features": torch.zeros(40, 8, dtype=torch.int64)}, None),
        "no_rows": ({"features": torch.zeros(0, 8)}, None),
        "no_columns": ({"features": torch.zeros(40, 0)}, None),
        "one": ({"features": torch.zeros(1, 8)}, {"extractor": '{"name": "inception"}'}),
        "other_channels": ({"features": torch.randn(40, 7)}, {"extractor": '{"name": "inception"}'}),
        "extractor": (features, {"extractor": "{"}),
        "extractor_list": (features, {"extractor": "[1]"}),
        "extractor_number": (features, {"extractor": '{"name": 5}'}),
        "size": (features, {"image_size": "5"}),
        "size_names": (features, {"image_size": '["a", "b"]'}),
    }.items():
        save_file(tensors, bad / f"features_{name}.safetensors", metadata=metadata)
    for place in ("cut_images", "pipes", "postscript", "samples/images", "recipe"):
        (bad / place).mkdir(parents=True)
    (bad / "cut_images" / "0.png").write_bytes((folder / "folder" / "0.png").read_bytes()[:60])
    os.mkfifo(bad / "pipes" / "0.png")
    (bad / "postscript" / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n")
    shutil.copy(folder / "folder" / "0.png", bad / "samples" / "images" / "000000.png")
    (bad / "recipe" / "recipe.json").write_text("[1]")
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def run_command(command, given, monkeypatch, capsys, folder):
    """The line that a command ends with."""
    given = {flag: value for flag, value in given.items() if value is not None}
    arguments = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items()]
    if interval := given.pop("guidance_interval", None):
        arguments = [*(part for part in arguments if "interval" not in part), "--guidance_interval", *interval.split()]
    name = {"precomputed": "metrics"}.get(command, command)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"dit-hf {name}", *arguments])
    before = snapshot(folder)
    with pytest.raises(SystemExit) as exit_:
        run(COMMANDS[name].main)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert snapshot(folder) == before
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


BAD_FILES = ("nope", "bad/empty", "bad/random", "bad/cut", "bad/pipe", "bad/folder")
NAMES = ("a\0b", "n" * 300)
DEVICES = ("/dev/zero", "/dev/null")
OUTPUTS = ("/proc/new", "config.json/new", "a\0b", "n" * 300)
NUMBERS = ("-1", "nan", "inf", "x", "", "1e999", "9" * 30)
WHOLE = (*NUMBERS, "1.5")


def rows(command, flag, values, **others):
    return [(command, {flag: value} | others) for value in values]


CHECKPOINTS = ["nope", *(f"{name}.pt" for name in BAD_FILES), "config.json", "images.npz", *NAMES, *DEVICES]
IMAGES = [
    *(f"bad/{name}.npz" for name in ("empty", "random", "cut", "pipe", "folder", "flipped", "float", "no_images")),
    *(f"bad/{name}.npz" for name in ("no_arrays", "no_side", "short", "long", "below_zero", "moments_alone")),
    *("nope.npz", "nope.safetensors", "config.json", "folder/0.png", "", "bad/pipe.json", *NAMES, *DEVICES),
    *("bad/cut_images", "bad/pipes", "bad/postscript"),
]
MOMENTS = [
    *("nan", "shape", "dimensions", "nothing", "asymmetric", "negative", "indefinite", "complex", "words", "objects"),
    *("extractor", "extractor_list", "no_count", "negative_count", "counts", "size", "alone"),
]
FEATURES = [
    *("nan", "dimensions", "absent", "integers", "no_rows", "no_columns", "one", "other_channels", "extractor"),
    *("extractor_list", "extractor_number", "size", "size_names"),
]
PRECOMPUTED = [
    *(f"bad/features_{name}.safetensors" for name in FEATURES),
    *(f"{name}.safetensors" for name in (*BAD_FILES, "bad/flipped")),
    *("", "images.npz", "folder", "config.json", *NAMES, *DEVICES),
]
TABLE = [
    *rows("metrics", "samples", IMAGES),
    *rows("metrics", "reference", IMAGES),
    *rows("metrics", "training", ("nope.npz", "bad/short.npz", "bad/pipes")),
    *rows("precomputed", "samples", PRECOMPUTED),
    *rows("precomputed", "reference", PRECOMPUTED),
    *rows("precomputed", "reference", [f"bad/moments_{name}.npz" for name in MOMENTS]),
    *rows("precomputed", "training", ["bad/features_one.safetensors", "bad/flipped.safetensors", "nope"]),
    *rows("metrics", "bootstrap", (*WHOLE, "1")),
    *rows("metrics", "batch_size", (*WHOLE, "0")),
    *rows("metrics", "resolution", (*WHOLE, "0")),
    *rows("metrics", "seed", WHOLE),
    *rows("metrics", "holdout", (*NUMBERS, "1", "0.5")),
    *rows("metrics", "output", (*OUTPUTS, "folder", "images.npz", "folder/new.json", "bad/pipe.json")),
    *rows("metrics", "save_statistics", (*OUTPUTS, "folder", "images.npz", "folder/new.npz")),
    *rows("metrics", "cache_dir", (*OUTPUTS, "config.json", "folder", "folder/new")),
    *rows("metrics", "update_card", ("nope", "folder", "config.json", *NAMES)),
    *rows("metrics", "metrics", ("", "x", ",", "fid", "precision,precision", "accuracy", "a\nb")),
    *rows("metrics", "metrics", ("is", "precision", "density"), samples="few.npz"),
    *rows("metrics", "feature_extractor", ("", "nope", "inception", "bad/folder.json", "config.json", "pipe", *NAMES)),
    *rows(
        "metrics", "extractor_weights", (*(f"{name}.pt" for name in BAD_FILES), *NAMES), feature_extractor="inception"
    ),
    *rows("metrics", "extractor_weights", ("a.safetensors",)),
    *rows("metrics", "split", ("nope", ""), samples="data"),
    *rows("metrics", "image_column", ("nope", "label", ""), samples="data"),
    *rows("metrics", "push_to_hub", (True,)),
    *rows("metrics", "hub_model_id", ("user/name",)),
    *rows("sample", "num_samples", (*WHOLE, "0")),
    *rows("sample", "batch_size", (*WHOLE, "0")),
    *rows("sample", "seed", WHOLE),
    *rows("sample", "labels", ("nope", "bad/pipe.json", "config.json", "bad/postscript", "", *NAMES)),
    *rows("sample", "holdout", (*NUMBERS, "1", "0.5")),
    *rows("sample", "scheduler", ("", "nope", "ddim")),
    *rows("sample", "recipe", ("", "nope")),
    *rows("sample", "vae", ("nope/nope", "pipe/transformer", "config.json", "bad/folder.json", *NAMES)),
    *rows("sample", "pipeline", ("nope/nope", "config.json", "bad/folder.json", "", *NAMES)),
    *rows("sample", "output_dir", (*OUTPUTS, "config.json", "folder", "bad/samples", "bad/recipe", "bad/pipe.json")),
    *rows("sample", "output_dir", ("data", "data/new"), labels="data"),
    *rows("generate", "num_images_per_label", (*WHOLE, "0")),
    *rows("generate", "seed", WHOLE),
    *rows("generate", "class_labels", ("nope", "3", "-1", "", "1.5")),
    *rows("generate", "pipeline", ("nope/nope", "config.json", "bad/folder.json", "", *NAMES)),
    *rows(
        "generate", "output", ("new.txt", "new.psd", "new.h5", "new.xbm", "folder", "", "/proc/new.png", "a\0b.png")
    ),
    *rows("generate", "output", ("config.json/new.png", f"{'n' * 300}.png", f"{'n' * 250}.png")),
    *(row for name in ("convert", "verify") for row in rows(name, "checkpoint_path", CHECKPOINTS)),
    *(row for name in ("export", "verify") for row in rows(name, "model_path", ("nope", "config.json", *NAMES))),
    *rows(
        "convert", "id2label", ("nope", "bad/empty.json", "bad/random.json", "bad/list.json", "bad/text.json", "data")
    ),
    *rows("convert", "output_dir", (*OUTPUTS, "folder", "config.json")),
    *rows("convert", "vae", ("nope/nope", "config.json", "pipe/transformer", *NAMES)),
    *rows("convert", "checkpoint_path", ("jit_p4.pt", "ddt_lightning.pt", "ddt_ema_only.pt", "rae_dh_qknorm.pt")),
    *rows("convert", "in_context_start", (*WHOLE, "2"), checkpoint_path="jit_p4.pt", noise_scale="1"),
    *rows("convert", "noise_scale", NUMBERS[:-1], checkpoint_path="jit_p4.pt", in_context_start="1"),
    *rows("convert", "num_attention_heads", ("3", "8"), checkpoint_path="jit_p4.pt", in_context_start="1"),
    *rows("convert", "num_encoder_blocks", (*WHOLE, "0", "3"), checkpoint_path="ddt_lightning.pt"),
    *rows("convert", "num_attention_heads", ("2", "3"), checkpoint_path="rae_dh.pt"),
    *rows("convert", "no_null_class", (True,), checkpoint_path="rae_dh.pt"),
    *rows("convert", "family", ("jit", "ddt", "rae", "rae_lightningdit", "nope")),
    *rows("convert", "family", ("dit", "ddt", "rae"), checkpoint_path="jit_p4.pt"),
    *rows("convert", "family", ("jit", "rae_lightningdit", "lightningdit"), checkpoint_path="rae_dh.pt"),
    *rows("convert", "family", ("jit", "lightningdit", "dit"), checkpoint_path="rae_lightningdit.pt"),
    *rows("convert", "weights", ("model", "nope"), checkpoint_path="jit_p4.pt", in_context_start="1"),
    *rows("convert", "weights", ("model",), checkpoint_path="ddt_ema_only.pt", num_encoder_blocks="1"),
    *rows("convert", "weights", ("model",), checkpoint_path="rae_lightningdit.pt"),
    *(row for name in ("in_context_start", "num_encoder_blocks", "noise_scale") for row in rows("convert", name, "2")),
    *rows("export", "checkpoint_path", (*OUTPUTS, "new.txt", "folder", "bad/pipe.pt", "bad/folder.pt")),
    *rows("latents", "train_data_dir", ("nope", "config.json", "bad/pipe.json", "bad/postscript", *NAMES)),
    *rows("latents", "vae", ("nope/nope", "config.json", "pipe/transformer", *NAMES)),
    *rows("latents", "output_dir", ("data", "data/new", *OUTPUTS)),
    *rows("train", "transformer_config", ("nope", "bad/empty.json", "bad/list.json", "bad/text.json", "data", *NAMES)),
    *rows("train", "output_dir", ("data", "data/new", *OUTPUTS)),
    *rows("space", "model", ("nope", "config.json", *NAMES)),
    *(row for name in ("sample", "generate") for row in rows(name, "num_inference_steps", (*WHOLE, "0"))),
    *(row for name in ("sample", "generate") for row in rows(name, "guidance_scale", NUMBERS[:-1])),
    *(row for name in ("sample", "generate") for row in rows(name, "guidance_channels", (*WHOLE, "0"))),
    *(
        row
        for name in ("sample", "generate")
        for row in rows(name, "guidance_interval", ("1 0", "nan 1", "-1 1", "0"))
    ),
]


def name_row(row):
    command, flags = row
    return "-".join([command, *(f"{flag}={str(value)[:30]!r}" for flag, value in flags.items())])


@pytest.mark.parametrize(("command", "flags"), TABLE, ids=map(name_row, TABLE))
def test_bad_input_is_one_line(command, flags, files, monkeypatch, capsys):
    run_command(command, GIVEN[command] | flags, monkeypatch, capsys, files)


def test_what_is_compressed_is_bounded_before_it_is_read(tmp_path, monkeypatch):
    """A kilobyte of the file may be a megabyte of zeros: sizes count before anything is allocated."""
    np.savez_compressed(tmp_path / "images.npz", arr_0=np.zeros((1, 64, 65, 3), np.uint8))
    np.savez_compressed(tmp_path / "moments.npz", mu=np.zeros(9), sigma=np.zeros((9, 9)))
    np.savez_compressed(tmp_path / "text.npz", mu=np.zeros(8), sigma=np.eye(8), extractor=np.array("a" * 1000))
    monkeypatch.setattr(pixels, "MAX_PIXELS", 64 * 64)
    monkeypatch.setattr(reference, "MAX_CHANNELS", 8)
    monkeypatch.setattr(reference, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(ValueError, match="images.npz: an image has 65 × 64 pixels; at most 4,096"):
        ImageSource(tmp_path / "images.npz")
    with pytest.raises(ValueError, match="moments.npz: `sigma` has 648 bytes; at most 512 are read"):
        reference.reference_statistics(tmp_path / "moments.npz")
    with pytest.raises(ValueError, match="text.npz: `extractor` has 4,000 bytes; at most 1,000 are read"):
        reference.reference_statistics(tmp_path / "text.npz")
