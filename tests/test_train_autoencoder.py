"""The autoencoder script: held-out images, where it resumes from, and how it ends."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT
from datasets import load_dataset
from testing_utils.scripts import run_forked
from testing_utils.training_runs import HOLD, Code, read_log, refused

from dit_hf.training.checkpointing import checkpoint_step, list_checkpoints


SCRIPT = ROOT / "examples" / "train_autoencoder" / "train_autoencoder.py"


@pytest.fixture(scope="module")
def data(workspace, tmp_path_factory):
    """Images without a test split, one of them damaged."""
    folder = tmp_path_factory.mktemp("data")
    for index, row in enumerate(load_dataset(str(workspace / "data"), split="train")):
        path = folder / str(row["label"]) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        row["image"].save(path)
    (folder / "0" / "broken.png").write_bytes(b"not an image")
    return folder


def command(data, output_dir, **flags):
    flags = {
        "dataset_name": data,
        "output_dir": output_dir,
        "holdout": 0.3,
        "resolution": 32,
        "perceptual_resolution": 32,
        "train_batch_size": 4,
        "max_train_steps": 1,
        "checkpointing_steps": 1,
        "lr_warmup_steps": 1,
    } | flags
    parts = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return [sys.executable, SCRIPT, "--block_out_channels", 8, 8, 8, *parts]


def test_it_resumes_from_where_it_is_told(data, tmp_path, monkeypatch, capsys):
    result = run_forked(command(data, tmp_path / "a", max_train_steps=2), check=True)
    assert "holdout 0.3: split test has" in result.stdout
    assert "broken.png" in result.stderr
    for name in ("checkpoint-1", "train_log.jsonl", "training_config.json"):
        copy = shutil.copytree if name == "checkpoint-1" else shutil.copyfile
        copy(tmp_path / "a" / name, (tmp_path / "b").mkdir(exist_ok=True) or tmp_path / "b" / name)
    run_forked(command(data, tmp_path / "b", max_train_steps=2, resume_from_checkpoint="checkpoint-1"), check=True)
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == ["checkpoint-1", "checkpoint-2"]
    assert read_log(tmp_path / "b")[-1]["loss"] == read_log(tmp_path / "a")[-1]["loss"]
    for asked, message in (
        ("never", "holds checkpoint-1, checkpoint-2; resume from the newest"),
        ("checkpoint-1", "also holds checkpoint-2, which resuming from checkpoint-1 would overwrite"),
        ("best", "best is not a checkpoint of"),
    ):
        again = command(data, tmp_path / "a", max_train_steps=3, resume_from_checkpoint=asked)
        assert message in refused(again, monkeypatch, capsys)
    assert "is in the folder" in refused(command(data, data / "0" / "out"), monkeypatch, capsys)
    assert not (data / "0" / "out").exists()


def test_an_interrupted_run_saves_and_exits_130(data, tmp_path):
    def interrupt():
        log = tmp_path / "train_log.jsonl"
        while not stop.wait(0.02):
            if log.exists() and log.stat().st_size:
                (process,) = multiprocessing.active_children()
                os.kill(process.pid, signal.SIGINT)
                return

    stop = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run_forked(command(data, tmp_path, max_train_steps=100000, checkpointing_steps=1000))
    stop.set()
    thread.join()
    assert result.returncode == 130
    (checkpoint,) = list_checkpoints(tmp_path)  # none was due
    assert f"Stopped at step {checkpoint_step(checkpoint)} by SIGINT; run the same command" in result.stdout
    assert read_log(tmp_path)[-1]["step"] == checkpoint_step(checkpoint)


def test_it_refuses_before_it_writes(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other" / "vae").mkdir(parents=True)
    (tmp_path / "other" / "vae" / "config.json").write_text("mine")
    for folder, flags, message in (
        ("file", {}, "is a file, not a folder"),
        ("other", {}, "holds vae, which this run would overwrite"),
        ("run", {"learning_rate": "nan"}, "--learning_rate: 'nan' is not a finite number at least 0"),
        ("run", {"max_grad_norm": -1}, "--max_grad_norm: '-1' is not a finite number at least 1e-06"),
        ("run", {"resolution": 30}, "--resolution 30 must be divisible by 4"),
        ("run", {"train_batch_size": 64}, "A batch of 64 can't be sampled"),
        ("run", {"holdout": 1}, "--holdout: '1' is not a finite number at least 0 and below 1"),
    ):
        assert message in refused(command(data, tmp_path / folder, **flags), monkeypatch, capsys)
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "other" / "vae" / "config.json").read_text() == "mine"


def test_no_pickle_runs_code_and_no_second_run_enters(data, tmp_path, monkeypatch, capsys):
    run_forked(command(data, tmp_path / "run"), check=True)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for name in ("custom_checkpoint_0.pkl", "scheduler.bin", "optimizer.bin", "random_states_0.pkl"):
        before = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else None
        torch.save(Code(tmp_path / "marker"), checkpoint / name)
        error = refused(command(data, tmp_path / "run", max_train_steps=2), monkeypatch, capsys)
        assert f"checkpoint-1/{name} " in error
        (checkpoint / name).unlink() if before is None else (checkpoint / name).write_bytes(before)
    assert not (tmp_path / "marker").exists()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    error = refused(command(data, tmp_path / "run", max_train_steps=2), monkeypatch, capsys)
    assert "in use by another run" in error
    holder.kill()
    holder.wait()
