"""The benchmark suite in small."""

import json
import sys

import datasets
import numpy as np
import PIL.Image
import torch
from conftest import ROOT
from testing_utils.scripts import run_forked


FD = "fd_efficientnet_lite0"


def bench(*flags):
    return run_forked([sys.executable, ROOT / "benchmarks" / "bench.py", *flags], ROOT)


def test_the_benchmarks_in_small(tmp_path):
    output = tmp_path / "bench.json"
    rows = [
        {"image": PIL.Image.fromarray(pixels), "label": index % 2}
        for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["sloth", "red apple"])}
    )
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "test.parquet")
    parts = ("forward", "compiled", "training", "memory", "sampling", "growth", "quality")
    flags = ("--settings", "DDIM", "UniPC, 5 steps", "1 jump", "--reference", tmp_path / "data", "--output", output)
    result = bench("--quick", "--parts", *parts, *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert set(found) == set(parts)
    assert found["sampling"]["largest_difference_of_pixels"] < 1e-4  # stock and ours generate the same
    assert len(found["forward"]["rows"]) == 6
    assert all(f"## {part}" in result.stdout for part in parts)
    assert found["forward"]["environment"]["versions"]["torch"] == torch.__version__
    assert len({row[FD] for row in found["quality"]["rows"].values()}) == 3
    assert 1e-4 < found["compiled"]["rows"]["int8"]["relative_error"] < 0.02
    again = bench("--quick", "--parts", "quality", *flags)
    assert again.returncode == 0 and "UniPC, 5 steps {" in result.stderr and "UniPC, 5 steps {" not in again.stderr
    command = [sys.executable, ROOT / "benchmarks" / "plot_frontier.py", "--results", output]
    run_forked([*command, "--output", tmp_path / "speed.png"], check=True)
    assert PIL.Image.open(tmp_path / "speed.png").width > 400


def test_guided_halves_in_two_calls_draw_the_same(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sampling

    names = ("DDIM", "DDIM, guided halves in two calls")
    settings = [sampling.SETTINGS[name]._replace(steps=2) for name in names]
    pipes = [sampling.build(setting, torch.device("cpu")) for setting in settings]
    for pipe in pipes:  # in single precision, batches of other sizes round otherwise
        pipe.transformer.double()
    images = [
        pipe([0, 3], generator=torch.manual_seed(0), output_type="latent", **sampling.call(setting)).images
        for pipe, setting in zip(pipes, settings, strict=True)
    ]
    assert "forward" in vars(pipes[1].transformer)
    torch.testing.assert_close(*images)


def test_quality_without_held_out_images_is_refused(tmp_path):
    result = bench("--parts", "quality", "--reference", tmp_path / "none", "--output", tmp_path / "bench.json")
    assert result.returncode == 2
    assert "held-out emoji" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "bench.json").exists()
