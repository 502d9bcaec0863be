"""The autoencoder script: held-out images, where it resumes from, and how it ends."""

import multiprocessing
import os
import signal
import sys
import threading

import pytest
from conftest import ROOT
from datasets import load_dataset
from testing_utils.scripts import run_forked
from testing_utils.training_runs import read_log, refused

from dit_hf.training.checkpointing import list_checkpoints


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
    first = tmp_path / "a" / "checkpoint-1"
    run_forked(command(data, tmp_path / "b", max_train_steps=2, resume_from_checkpoint=first), check=True)
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == ["checkpoint-2"]
    assert read_log(tmp_path / "b")[-1]["loss"] == read_log(tmp_path / "a")[-1]["loss"]
    for asked, message in (
        ("never", "has checkpoint-2, later than --resume_from_checkpoint never"),
        (first, "has checkpoint-2, later than --resume_from_checkpoint"),
        ("best", "--resume_from_checkpoint best is no checkpoint"),
    ):
        again = command(data, tmp_path / "a", max_train_steps=3, resume_from_checkpoint=asked)
        assert message in refused(again, monkeypatch, capsys)
    assert "lies in the data" in refused(command(data, data / "0" / "out"), monkeypatch, capsys)
    assert not (data / "0" / "out").exists()


def test_an_interrupted_run_exits_130(data, tmp_path):
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
    assert "Stopped." in result.stderr
