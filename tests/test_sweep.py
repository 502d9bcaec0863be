"""Sweeps of sampling settings: the cells, what is best, resuming, averages of a run."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import ROOT, tiny_transformer, tiny_vae
from PIL import Image
from testing_utils.scripts import run_forked
from testing_utils.training_runs import run

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.evaluation.sweeps import best, cell_name, grid, markdown_table, plot


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    transformer = tiny_transformer(num_classes=3, learn_sigma=False)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae()).save_pretrained(folder)
    return folder


def command(pipeline, workspace, folder, *flags):
    words = ["--pretrained_model_name_or_path", pipeline, "--reference", workspace / "data", "--num_samples", 6]
    words += ["--output_dir", folder / "sweep", "--cache_dir", folder / "cache", *flags]
    return [sys.executable, ROOT / "examples" / "evaluate" / "sweep.py", *map(str, words)]


def test_a_sweep_measures_every_cell_and_resumes(pipeline, workspace, tmp_path):
    flags = ["--guidance_scale", 1, 3, "--num_inference_steps", 1, 2, "--guidance_interval", "0,0.5"]
    flags += ["--held_out_extractor", "efficientnet-lite2", "--metrics", "kid", "--bootstrap", 2]
    result = run_forked(command(pipeline, workspace, tmp_path, *flags))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "sweep" / "results.json").read_text())
    rows = found["rows"]
    assert len(rows) == 4 and {len(row) for row in rows} == {7}
    assert [row["kid"] for row in rows] == sorted(row["kid"] for row in rows)
    name = cell_name({"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5), "num_inference_steps": 2})
    cell = tmp_path / "sweep" / name
    recipe = json.loads((cell / "recipe.json").read_text())
    assert (recipe["guidance_scale"], recipe["guidance_interval"]) == (3.0, [0.0, 0.5])
    nearest = min(rows, key=lambda row: row["fd_efficientnet_lite2"])
    settings = {
        name: value for name, value in nearest.items() if name.split(" ")[0] not in ("kid", "fd_efficientnet_lite2")
    }
    assert found["best"]["fd_efficientnet_lite2"]["cell"] == settings
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert result.stdout.startswith(table) and len(table.splitlines()) == 6
    assert "Best by kid, with new noise: dit-hf sample" in result.stdout
    measured = json.loads((cell / "metrics.json").read_text())
    assert sorted(measured["extractors"]) == ["efficientnet-lite0", "efficientnet-lite2"]
    assert Image.open(tmp_path / "sweep" / "plot.png").size[0] > 300
    # A cell that lost its end is completed by two processes, and all others keep their images.
    kept, lost = cell / "images" / "000001.png", cell / "images" / "000005.png"
    before = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run([*launch, *command(pipeline, workspace, tmp_path, *flags)[1:]], env=environment)
    assert kept.stat().st_mtime_ns == before[0] and lost.exists()
    again = json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]
    assert [row["guidance_scale"] for row in again] == [row["guidance_scale"] for row in rows]
    assert again[0]["kid"] == pytest.approx(rows[0]["kid"], rel=0.05)  # rounding of another batch size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scheduler", "flow_euler", "ddim"], "samples models that predict 'epsilon'"),
        (["--guidance_interval", "0.5,0.2"], "`guidance_interval` is"),
        (["--metrics", "beauty"], "There is no metric 'beauty'"),
        (["--metrics", "fdr"], "fdr needs training images (--training)"),
        (["--metrics", "is"], "is needs at least 10"),
        (["--reference", "{data}-nowhere"], "nowhere"),
        (["--guidance_interval", "0", "0.5"], "'0' must be two fractions of the steps, START,END"),
        (["--sigma_rel", 0.1], "--run and --sigma_rel belong together"),
        (["--output_dir", "{data}"], "--output_dir"),
    ],
)
def test_a_cell_that_can_not_run_is_refused_before_the_first_image(flags, words, pipeline, workspace, tmp_path):
    flags = [str(flag).format(data=workspace / "data") for flag in flags]
    flags += [] if {"--scheduler", "--guidance_interval"} & {*flags} else ["--num_inference_steps", 2]
    result = run_forked(command(pipeline, workspace, tmp_path, *flags))
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_cells_tables_and_plots(tmp_path):
    cells = grid({"guidance_scale": [1.0, 2.0], "num_inference_steps": [5, 10, 20]})
    assert cells[1] == {"guidance_scale": 1.0, "num_inference_steps": 10} and len(cells) == 6
    rows = [cell | {"fd": abs(cell["guidance_scale"] - 2) + 1 / cell["num_inference_steps"]} for cell in cells]
    ranked = best(rows, "fd")
    assert ranked[0] == {"guidance_scale": 2.0, "num_inference_steps": 20, "fd": 0.05}
    assert best(rows, "fd", higher_is_better=True)[0]["fd"] == 1.2
    assert markdown_table(ranked, ["fd"]).splitlines()[2] == "| 2 | 20 | 0.05 |"
    assert markdown_table([ranked[0] | {"fd ±": 0.012}], ["fd"]).splitlines()[2] == "| 2 | 20 | 0.05 ± 0.012 |"
    order = [row["fd"] for row in best([{"fd": value} for value in (float("nan"), 1.0, 0.5)], "fd", True)]
    assert order[:2] == [1.0, 0.5]
    assert plot(ranked, "fd", tmp_path / "contours.png")
    assert plot([row for row in ranked if row["guidance_scale"] == 2], "fd", tmp_path / "curve.png")
    assert not plot(ranked[:1], "fd", tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    pixels = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("contours", "curve")]
    assert pixels[0].std() > 20 and pixels[1].std() > 5
