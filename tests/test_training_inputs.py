"""What `train_dit.py` reads and what it refuses, before the first step."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partialmethod

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import FIXTURES, ROOT, tiny_transformer, tiny_vae
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderTiny
from huggingface_hub import HfApi
from PIL import Image as PILImage
from testing_utils.training_runs import TRAIN_DIT, losses, read_log, refused, run, train_command

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.commands.train import parse_args, training_config
from dit_hf.console import main
from dit_hf.data.images import load_image_dataset
from dit_hf.training.data import ImageData
from dit_hf.training.model import check_architecture, load_vae


BUNDLED_VAE = ROOT / "src" / "dit_hf" / "bundled" / "emoji64" / "vae"


def class_folders(workspace, folder):
    """The workspace's images as one folder a class."""
    for index, row in enumerate(load_image_dataset(str(workspace / "data"))):
        path = folder / ("dark", "light")[row["label"]] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return folder


def test_a_streamed_folder_and_precomputed_latents_train_alike(workspace, tmp_path):
    folder = class_folders(workspace, tmp_path / "images")
    (folder / "dark" / "broken.png").write_bytes(b"not a picture")
    flags = {"dataset_name": None, "train_data_dir": folder, "streaming": "", "max_train_steps": 2}
    result = run(train_command(workspace, tmp_path / "streamed", **flags))
    assert "1 of 21 images can't be read" in result.stderr
    assert "broken.png" in result.stderr
    flags = {"dataset_name": None, "latents_dir": tmp_path / "streamed" / "latents", "max_train_steps": 2}
    run(train_command(workspace, tmp_path / "cached", **flags))
    assert torch.equal(losses(tmp_path / "streamed"), losses(tmp_path / "cached"))
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "cached" / "pipeline")
    assert pipe.labels == {"dark": 0, "light": 1}


def test_latents_need_no_cache_and_the_distance_is_logged(workspace, tmp_path):
    flags = {"no-cache_latents": "", "max_train_steps": 2, "validation_split": "test", "validation_steps": 1}
    run(train_command(workspace, tmp_path, **flags))
    assert not (tmp_path / "latents").exists()
    lines = read_log(tmp_path)
    assert all(line["fd_efficientnet_lite0"] > 0 for line in lines)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert f"| {lines[-1]['fd_efficientnet_lite0']:.6g} |" in card
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vae.config.latents_mean is None  # its own scale is what was trained with


def test_any_autoencoder_trains_and_held_out_images_are_not_trained_on(workspace, tmp_path):
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
    vae.save_pretrained(tmp_path / "vae")
    flags = {"dataset_name": None, "train_data_dir": class_folders(workspace, tmp_path / "images"), "holdout": 0.3}
    flags |= {"vae": tmp_path / "vae", "validation_split": "test", "max_train_steps": 1}
    output = run(train_command(workspace, tmp_path / "run", **flags)).stdout
    kept, held_out = (
        len(ImageData(32, None, flags["train_data_dir"], holdout=0.3).load(s)) for s in ("train", "test")
    )
    assert kept + held_out == 20 and 0 < held_out < 10
    assert f"\n{kept} images: dark " in output
    assert read_log(tmp_path / "run")[-1]["fd_efficientnet_lite0"] > 0
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe.vae) is AutoencoderTiny
    assert len(pipe.vae.config.latents_mean) == 4  # of these latents
    assert pipe("dark", num_inference_steps=1).images[0].size == (32, 32)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "| holdout | 0.3 |" in card and "| total_batch_size | 4 |" in card and "| ema_warmup | False |" in card


def one_class(workspace, folder):
    features = Features({"image": Image(), "label": ClassLabel(names=["only"])})
    rows = [{"image": PILImage.new("RGB", (32, 32)), "label": 0}] * 4
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": None}, "either --dataset_name or --train_data_dir"),
        ({"dataset_name": None, "train_data_dir": "{tmp}/none"}, "no folder '{tmp}/none'"),
        ({"dataset_name": None, "train_data_dir": "{tmp}/empty"}, "'{tmp}/empty' is empty"),
        ({"dataset_name": None, "train_data_dir": "{tmp}/broken", "total_batch_size": 2},
         "2 of 2 images can't be read"),
        ({"image_column": "photo"}, "no column 'photo'; the dataset has image, label"),
        ({"label_column": "class"}, "no column 'class'; the dataset has image, label"),
        ({"label_column": "image"}, "a class's id, from 0, or its name"),
        ({"split": "validation"}, "split 'validation'"),
        ({"resolution": 30}, "--resolution 30 is not divisible by 4"),
        ({"resolution": 36}, "`sample_size` 9 is not divisible by `patch_size` 2"),
        ({"vae": "{tmp}/none"}, "{tmp}/none"),
        ({"transformer_config": None, "pretrained_model_name_or_path": "{tmp}/vae"}, "{tmp}/vae"),
        ({"dataset_name": None, "latents_dir": "{tmp}/none"}, "no cache of latents"),
        ({"dataset_name": None, "latents_dir": "{tmp}/empty", "vae": None}, "empty has no folder vae; pass --vae"),
        ({"transformer_config": "{tmp}/sized.json"}, "sets sample_size, which data, VAE and flags decide; remove it"),
        ({"dataset_name": None, "latents_dir": FIXTURES / "emoji_latents", "vae": BUNDLED_VAE, "dry_run": ""},
         "emoji_latents is of 64 pixels; omit --resolution 32"),
        ({"transformer_config": None, "vae": None, "pretrained_model_name_or_path": "{tmp}/base", "resolution": 64},
         "{tmp}/base is of 32 pixels; omit --resolution 64"),
        ({"dataset_name": None, "latents_dir": FIXTURES / "emoji_latents", "resolution": None, "vae": BUNDLED_VAE,
          "proj_coeff": 0.5}, "precompute it with --features"),
        ({"proj_coeff": 0.5, "alignment_depth": 9}, "blocks 1 to 2"),
        ({"dataset_name": None, "latents_dir": FIXTURES / "emoji_latents", "resolution": 64, "vae": "{tmp}/wide"},
         "was not made with the vae of --vae"),
        ({"transformer_config": None, "pretrained_model_name_or_path": "{tmp}/base", "vae": "{tmp}/vae"},
         "trained with 0.5; omit --vae"),
        ({"transformer_config": None, "vae": None, "pretrained_model_name_or_path": "{tmp}/base", "lora_rank": 2},
         "has no class 'light', and adapters can't add one"),
        ({"total_batch_size": 64}, "A batch of 64 can't be sampled from 20 samples"),
        ({"validation_split": "nothing"}, "split 'nothing'"),
        ({"objective": "epsilon", "validation_inference_steps": 2000},
         "`num_inference_steps` is 2000, which DDPMScheduler can't take"),
        ({"push_to_hub": "", "hub_model_id": "no name"}, "--hub_model_id 'no name' is not the name of a repository"),
        ({"output_dir": "{tmp}/broken/a/x.png"}, "x.png is a file, not a folder"),
        ({"output_dir": "{tmp}/broken/a/x.png/run"}, "x.png is a file"),
        ({"output_dir": "{tmp}/loop"}, "{tmp}/loop can't be written: Too many levels of symbolic links"),
        ({"output_dir": "{tmp}/loop/run"}, "can't be written: Too many levels of symbolic links"),
        ({"resume_from_checkpoint": "{tmp}/loop"}, "{tmp}/loop is not a checkpoint of"),
        ({"dataset_name": None, "latents_dir": "{tmp}/empty", "output_dir": "{tmp}/empty/run"},
         "is in the folder {tmp}/empty that is read"),
        ({"dataset_name": None, "train_data_dir": "{tmp}/broken", "output_dir": "{tmp}/broken/run"},
         "is in the folder {tmp}/broken that is read"),
        ({"report_to": "nothing"}, "accelerate can't start"),
        ({"transformer_config": "{tmp}/empty"}, "{tmp}/empty is a folder, not a file"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_the_first_step(workspace, tmp_path, flags, message, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "x.png").write_bytes(b"not a picture")
    (tmp_path / "broken" / "b").mkdir()
    shutil.copyfile(tmp_path / "broken" / "a" / "x.png", tmp_path / "broken" / "b" / "y.png")
    tiny_vae().save_pretrained(tmp_path / "vae")
    scaled = tiny_vae()
    scaled.register_to_config(scaling_factor=0.5)
    names = {0: "dark", 1: "other"}
    transformer = tiny_transformer(num_classes=2, learn_sigma=False)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), scaled, names).save_pretrained(tmp_path / "base")
    with torch.no_grad():
        scaled.encoder.conv_in.weight.mul_(2)
    scaled.save_pretrained(tmp_path / "wide")
    (tmp_path / "sized.json").write_text('{"sample_size": 8}')
    given = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in flags.items()}
    folder = given.pop("output_dir", tmp_path / "run")
    error = refused(train_command(workspace, folder, **given), monkeypatch, capsys)
    assert message.format(tmp=tmp_path) in error
    assert "error: " in error
    written = {path.name for path in (tmp_path / "run").glob("*")} - {"latents", ".lock", ".lock_holder"}
    assert not written  # and nothing at all, but for what only encoding the images shows
    assert "can't be read" in error or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("index", "config", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, None,
         "is a StableDiffusionPipeline, which has no transformer"),
        ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
         {"_class_name": "FluxTransformer2DModel"}, "is a FluxPipeline with a FluxTransformer2DModel"),
        ({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "Transformer2DModel"]},
         {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}, "with a Transformer2DModel"),
        ({"_class_name": "DiTPipeline", "transformer": ["diffusers", "Transformer2DModel"]},
         {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}, None),
    ],
)  # fmt: skip
def test_a_folder_of_another_architecture_is_named(tmp_path, index, config, message):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if config is not None:
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_architecture(tmp_path)


def test_training_from_another_architecture_is_one_line(workspace, tmp_path, monkeypatch, capsys):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]})
    )
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path}
    error = refused(train_command(workspace, tmp_path / "run", **start), monkeypatch, capsys)
    assert error.splitlines()[-1].startswith(f"error: {tmp_path} is a StableDiffusionPipeline")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"snr_gamma": 5}, "--snr_gamma has no effect on velocity"),
        ({"objective": "epsilon", "cosine_loss": ""}, "--cosine_loss has no effect on epsilon"),
        ({"lora_alpha": 4}, "--lora_alpha has no effect without --lora_rank"),
        ({"freeze": "time_embed"}, "--freeze has no effect without --pretrained"),
        ({"lora_rank": 4}, "--lora_rank has no effect without --pretrained"),
        ({"latents_dir": "here"}, "--dataset_name has no effect with --latents_dir"),
        ({"alignment_depth": 1}, "--alignment_depth has no effect without --proj_coeff"),
        ({"checkpointing_steps": 0}, "'0' is not a whole number at least 1"),
        ({"max_train_steps": -1}, "'-1' is not a whole number at least 1"),
        ({"lr_scheduler": "steps"}, "invalid choice: 'steps'"),
        ({"vae": None}, "--vae is missing"),
        ({"objective": "epsilon", "time_sampling": "uniform"}, "--time_sampling has no effect on epsilon"),
        ({"train_batch_size": 2}, "not allowed with argument --total_batch_size"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7 is not a checkpoint of"),
    ],
)
def test_flags_are_never_ignored_in_silence(workspace, tmp_path, flags, message, monkeypatch, capsys):
    assert message in refused(train_command(workspace, tmp_path / "run", **flags), monkeypatch, capsys)


def test_the_batch_is_given_per_process_or_in_all():
    """Per process as in the scripts of diffusers: one micro-batch."""

    def total(processes, *flags):
        with pytest.MonkeyPatch.context() as patch:
            required = ["--preset", "DiT-S/2", "--vae", "vae", "--output_dir", "run"]
            patch.setattr(sys, "argv", ["train", *required, *flags])
            return training_config(parse_args(), processes).total_batch_size

    assert total(1) == 128
    assert total(4, "--train_batch_size", "8", "--gradient_accumulation_steps", "2") == 64
    assert total(4, "--total_batch_size", "64", "--gradient_accumulation_steps", "2") == 64
    assert total(8, "--recipe", "dit") == 256
    assert total(8, "--recipe", "dit", "--train_batch_size", "4") == 32
    with pytest.raises(ValueError, match="--total_batch_size 64 can't be split evenly over 3 processes"):
        total(3, "--total_batch_size", "64")


OUT_OF_RANGE = [
    *((name, value) for name in ("guidance_scale", "learning_rate", "max_grad_norm", "snr_gamma", "weight_decay")
      for value in ("nan", "-1", "-inf", "x")),
    *((name, "inf") for name in ("guidance_scale", "learning_rate", "snr_gamma", "weight_decay", "proj_coeff")),
    *((name, value) for name in ("class_dropout_prob", "flip_probability", "ema_decay", "adam_beta2")
      for value in ("nan", "-0.1", "1.1")),
    ("guidance_scale", 1e30), ("learning_rate", 1e30), ("snr_gamma", 1e308), ("snr_gamma", 1e-320),
    ("weight_decay", 1e30), ("proj_coeff", 1e30), ("max_grad_norm", 1e-320),
    ("lr_warmup_steps", -1), ("seed", -1), ("seed", 2**32), ("layer_decay", 0), ("lora_rank", 0),
    ("validation_inference_steps", 0), ("alignment_depth", 0), ("snr_gamma", 0), ("max_train_steps", 1.5),
]  # fmt: skip


def test_numbers_out_of_range_are_no_flags(workspace, tmp_path, monkeypatch, capsys):
    for name, value in OUT_OF_RANGE:
        command = [str(part) for part in train_command(workspace, tmp_path)[1:]]
        monkeypatch.setattr(sys, "argv", [*command, f"--{name}={value}"])
        with pytest.raises(SystemExit) as stop:
            parse_args()
        assert stop.value.code == 2
        assert f"argument --{name}: '{value}' is not a" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--max_grad_norm=inf"])
    assert parse_args().max_grad_norm == float("inf")  # none


def test_an_unreachable_hub_is_noticed_before_training(workspace, tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=address, token="hf_none"))
    command = train_command(workspace, tmp_path / "run", push_to_hub="", hub_model_id="user/mine")
    error = refused(command, monkeypatch, capsys)
    assert "--push_to_hub can't publish to user/mine" in error
    assert not (tmp_path / "run").exists()


def test_another_holdout_is_named_as_such(workspace, tmp_path, monkeypatch, capsys):
    images = class_folders(workspace, tmp_path / "images")
    flags = {"dataset_name": None, "train_data_dir": images, "max_train_steps": 1, "holdout": 0.2}
    run(train_command(workspace, tmp_path / "run", **flags))
    error = refused(train_command(workspace, tmp_path / "run", **flags | {"holdout": 0.4}), monkeypatch, capsys)
    assert "holdout was 0.2 and is 0.4. Use a new folder" in error
    for image in images.rglob("*.png"):  # as a copy on another machine
        os.utime(image, (4e8, 4e8))
    run(train_command(workspace, tmp_path / "run", **flags | {"max_train_steps": 2}))
    assert len(read_log(tmp_path / "run")) == 2


def test_latents_that_moved_resume(workspace, tmp_path, monkeypatch):
    """They are compared by their fingerprint; neither a relative path nor another place makes them other latents."""
    latents, folder = tmp_path / "latents", tmp_path / "run"
    flags = {"train_data_dir": class_folders(workspace, tmp_path / "images"), "vae": workspace / "vae"}
    words = (str(part) for name, value in flags.items() for part in (f"--{name}", value))
    script = TRAIN_DIT.with_name("precompute_latents.py")
    run([sys.executable, script, *words, "--resolution", 32, "--output_dir", latents])
    flags = {"dataset_name": None, "vae": None, "resolution": None}
    run(train_command(workspace, folder, latents_dir=latents, max_train_steps=1, **flags))
    monkeypatch.chdir(tmp_path)
    run(train_command(workspace, folder, latents_dir="latents", max_train_steps=2, **flags))
    latents.rename(tmp_path / "elsewhere")
    run(train_command(workspace, "run", latents_dir="elsewhere", max_train_steps=3, **flags))
    assert len(read_log(folder)) == 3


def test_images_without_a_cache_are_compared_as_well(workspace, tmp_path, monkeypatch, capsys):
    images = class_folders(workspace, tmp_path / "images")
    flags = {"dataset_name": None, "train_data_dir": images, "no-cache_latents": "", "max_train_steps": 1}
    run(train_command(workspace, tmp_path / "run", **flags))
    PILImage.new("RGB", (32, 32)).save(images / "dark" / "new.png")
    error = refused(train_command(workspace, tmp_path / "run", **flags | {"max_train_steps": 2}), monkeypatch, capsys)
    assert "have changed (latents" in error


WITHOUT = """
import sys
sys.modules |= {"peft": None}
from dit_hf.console import main
main()
"""


def test_adapters_without_peft_name_the_extra(workspace, tmp_path):
    names = {0: "dark", 1: "light"}
    transformer = tiny_transformer(num_classes=2, learn_sigma=False)
    pipe = DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), names)
    pipe.save_pretrained(tmp_path / "base")
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "base"}
    flags = train_command(workspace, tmp_path / "run", **start, lora_rank=2)[2:]
    command = [sys.executable, "-c", WITHOUT, "train", *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == "error: dit_hf.training.lora needs peft: pip install 'dit_hf[train]'."
    assert not (tmp_path / "run").exists()


def test_nothing_imports_what_windows_lacks():
    pattern = re.compile(r"^\s*(import|from) (fcntl|resource|pwd|grp|termios)\b", re.MULTILINE)
    files = [path for folder in ("src", "examples", "conversion") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert not [path for path in files if pattern.search(path.read_text())]


def test_every_spelling_of_the_command(workspace, tmp_path, monkeypatch, capsys):
    flags = [*map(str, train_command(workspace, tmp_path / "run", max_train_steps=10)[2:]), "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["dit-hf", "train", *flags])
    AcceleratorState._reset_state(reset_partial_state=True)
    main()
    assert '"steps": 10' in capsys.readouterr().out
    module = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--module", "dit_hf.commands.train", *flags]
    assert '"steps": 10' in subprocess.run(module, check=True, capture_output=True, text=True).stdout


def test_labels_that_are_no_class_are_named(workspace, tmp_path, monkeypatch, capsys):
    rows = [{"image": PILImage.new("RGB", (32, 32)), "label": label} for label in (0, 1, -1, 0, 1)]
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    command = train_command(workspace, tmp_path / "run", dataset_name=tmp_path / "data")
    assert "Image 2 has the label -1; the classes are 0 to 1" in refused(command, monkeypatch, capsys)


def test_a_checkpoint_of_another_model_is_refused(workspace, tmp_path, monkeypatch, capsys):
    run(train_command(workspace, tmp_path / "run", max_train_steps=2))
    config = json.loads((workspace / "config.json").read_text()) | {"num_layers": 3}
    (tmp_path / "other.json").write_text(json.dumps(config))
    command = train_command(workspace, tmp_path / "run", transformer_config=tmp_path / "other.json")
    error = refused(command, monkeypatch, capsys)
    assert "holds a run with other settings" in error
    assert "'num_layers': 2" in error


def test_a_vae_whose_config_lacks_a_default_is_the_same(tmp_path):
    """Configurations older than an option do not name it."""
    DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"), tiny_vae()).save_pretrained(tmp_path)
    file = tmp_path / "vae" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("scaling_factor") == 0.18215
    file.write_text(json.dumps(config))
    tiny_vae().save_pretrained(tmp_path / "given")
    load_vae(tmp_path / "given", tmp_path)
    scaled = tiny_vae()
    scaled.register_to_config(scaling_factor=0.5)
    scaled.save_pretrained(tmp_path / "given")
    with pytest.raises(ValueError, match="scaling_factor 0.5, the weights were trained with 0.18215"):
        load_vae(tmp_path / "given", tmp_path)


def test_one_class_trains(workspace, tmp_path):
    one_class(workspace, tmp_path / "one")
    run(train_command(workspace, tmp_path / "out", dataset_name=tmp_path / "one", max_train_steps=2))
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipe.transformer.config.num_classes == len(pipe.labels) == 1
    assert pipe(0, num_inference_steps=1).images[0].size == (32, 32)
