"""Training runs on small data, as commands."""

import contextlib
import json
import runpy
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import FIXTURES, ROOT, tiny_transformer
from testing_utils.scripts import run_forked

from dit_hf.data.latents import CachedLatents
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import VelocityObjective
from dit_hf.training.trainer import Trainer


TRAIN_DIT = ROOT / "examples" / "train_class_cond" / "train_dit.py"

HOLD = """
import sys, time
from dit_hf.training.running import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def train(output_dir, objective=None, validate=None, seed=0, model=None, **settings):
    """A short run of a tiny model on the emoji latents; returns its trainer."""
    settings = {"total_batch_size": 4, "max_train_steps": 4, "checkpointing_steps": 2, "lr_warmup_steps": 0} | settings
    config = TrainingConfig(output_dir, **({"ema_decay": 0.5} | settings))
    transformer = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False, seed=seed, **(model or {}))
    trainer = Trainer(config, transformer, CachedLatents(FIXTURES / "emoji_latents"), objective or VelocityObjective())
    trainer.train(validate)
    return trainer


def train_command(workspace, output_dir, **flags):
    flags = {
        "dataset_name": workspace / "data",
        "vae": workspace / "vae",
        "transformer_config": workspace / "config.json",
        "output_dir": output_dir,
        "resolution": 32,
        "total_batch_size": 4,
        "max_train_steps": 6,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 2,
        "validation_steps": 6,
        "validation_images_per_class": 2,
        "validation_inference_steps": 2,
    } | flags
    given = {name: value for name, value in flags.items() if value is not None}
    parts = (str(part) for name, value in given.items() for part in (f"--{name}", value))
    return [sys.executable, TRAIN_DIT, *(part for part in parts if part)]  # a flag without value is given as ""


def run(command, **options):
    """A command that succeeds; one with options, as an environment, in a fresh interpreter."""
    if not options:
        return run_forked(command, check=True)
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result


def refused(command, monkeypatch, capsys):
    """The error of a script that ends with exit code 2, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(part) for part in command[1:]])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(command[1]), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    return error


def read_log(output_dir):
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def losses(output_dir):
    return torch.tensor([line["loss"] for line in read_log(output_dir)], dtype=torch.float64)


def kill_after(command, path, env=None):
    """Starts a run and kills it, and the processes it started, as soon as a file or folder exists."""
    process = psutil.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    processes = [*process.children(recursive=True), process]  # those of torchrun are not in its process group
    for part in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()
    process.wait()
