"""Commands that generate images: `sample` with any number of processes, batch size and kills; `generate`."""

import json
import os
import resource
import signal
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_transformer, tiny_vae
from filelock import FileLock
from PIL import Image, ImageFont
from testing_utils.scripts import run_forked
from testing_utils.training_runs import kill_after, run

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.commands import generate, metrics, sample
from dit_hf.commands.generate import class_labels
from dit_hf.commands.sample import asked_labels, call_settings
from dit_hf.evaluation.grid import caption_lines
from dit_hf.evaluation.samples import SAMPLING_RECIPES, sample_images, sample_labels, to_bytes
from dit_hf.evaluation.sources import ImageSource
from dit_hf.seeds import seeded_generator


FD = "fd_efficientnet_lite0"
COMPUTE = ROOT / "examples" / "evaluate" / "compute_metrics.py"
SAMPLE = ROOT / "examples" / "evaluate" / "sample.py"
GENERATE = ROOT / "examples" / "generate.py"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    names = {0: "dark", 1: "light", 2: "grey"}
    transformer = tiny_transformer(num_classes=3, learn_sigma=False)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler", shift=2.0), tiny_vae(), names).save_pretrained(
        folder
    )
    return folder


def command(pipeline, folder, **flags):
    flags = {
        "pretrained_model_name_or_path": pipeline,
        "num_samples": 14,
        "batch_size": 4,
        "num_inference_steps": 2,
        "guidance_scale": 2,
        "output_dir": folder,
    } | flags
    return [sys.executable, SAMPLE, *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def images(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def test_processes_batches_and_kills_do_not_change_the_set(pipeline, tmp_path):
    run(command(pipeline, tmp_path / "one"))
    kill_after(command(pipeline, tmp_path / "killed"), tmp_path / "killed" / "images" / "000005.png")
    kept = tmp_path / "killed" / "images" / "000002.png"
    written = kept.stat().st_mtime_ns
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run([*launch, *command(pipeline, tmp_path / "killed", batch_size=3)[1:]], env=environment)
    first, second = images(tmp_path / "one"), images(tmp_path / "killed")
    assert first.shape == (14, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.abs(first.astype(int) - second).max() <= 1  # rounding of other batch sizes
    assert len({image.tobytes() for image in first}) == 14
    assert kept.stat().st_mtime_ns == written
    assert np.array_equal(first[7], np.asarray(Image.open(tmp_path / "one" / "images" / "000007.png")))
    pipe = DiTClassCondPipeline.from_pretrained(pipeline)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    alone = pipe(7 % 3, generator=[seeded_generator(0, 7)], **options).images[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(alone.round() - first[7]).max() <= 1
    del options["output_type"]
    together = sample_images(pipe, torch.arange(14) % 3, 0, batch_size=4, **options)  # as validation generates them
    assert np.abs(together.permute(0, 2, 3, 1).numpy().astype(int) - first).max() <= 1
    recipe = json.loads((tmp_path / "one" / "recipe.json").read_text())
    assert (recipe["guidance_scale"], recipe["scheduler"]) == (2.0, "FlowMatchEulerDiscreteScheduler")
    assert recipe["classes"] == {"0": "dark", "1": "light", "2": "grey"}
    assert np.load(tmp_path / "one" / "samples.npz")["arr_1"].tolist() == [index % 3 for index in range(14)]
    assert "14 images, 0 of them new" in run(command(pipeline, tmp_path / "one")).stdout
    result = run_forked(command(pipeline, tmp_path / "one", seed=1))
    assert result.returncode == 2
    assert "seed was 0 and is 1" in result.stderr


def test_metrics_of_samples_with_the_classes_of_a_dataset(pipeline, tmp_path, workspace):
    """From the dataset's class names to the accuracy of a probe on them, and the same metrics of training images."""
    data = workspace / "data"
    run(command(pipeline, tmp_path / "out", labels=data, num_samples=12, num_inference_steps=1))
    flags = ["--samples", tmp_path / "out" / "samples.npz", "--reference", data, "--training", data]
    flags += ["--metrics", f"{FD},accuracy", "--bootstrap", 2, "--cache_dir", tmp_path / "cache", "--json"]
    found = json.loads(run([sys.executable, COMPUTE, *map(str, flags)]).stdout)
    names = ImageSource(data, "test").labels()
    drawn = ImageSource(tmp_path / "out" / "samples.npz").labels()
    assert sorted(drawn[:8]) == sorted(names)
    assert drawn[:8] != names  # shuffled
    assert drawn[8:] == drawn[:4]
    assert found["reference"]["accuracy"]["value"] > 0.5  # dark and light
    assert found["training images"]["count"] == 12
    assert found["training images"][FD]["value"] < found[FD]["value"]
    assert found["recipe"]["sampling"]["num_inference_steps"] == 1
    result = run_forked(command(pipeline, tmp_path / "no", labels=data / "none"))
    assert result.returncode == 2
    assert "none" in result.stderr
    assert not (tmp_path / "no" / "recipe.json").exists()


def test_pixels_are_rounded_or_truncated(pipeline, tmp_path, monkeypatch):
    """DiT's truncated 127.5 x + 128 is rounding, ADM's truncated (x + 1) 127.5 is not; the recipe says which."""
    values = torch.linspace(-1.1, 1.1, 4001)  # as a decoder gives them
    decoded = (values / 2 + 0.5).clamp(0, 1)
    assert torch.equal(to_bytes(decoded), (values * 127.5 + 128).clamp(0, 255).to(torch.uint8))
    assert torch.equal(to_bytes(decoded, "truncate"), ((values + 1) * 127.5).clamp(0, 255).to(torch.uint8))
    for rounding in ("round", "truncate"):
        flags = {"num_samples": 2, "num_inference_steps": 1, "rounding": rounding}
        in_process(monkeypatch, command(pipeline, tmp_path / rounding, **flags))
        recipe = json.loads((tmp_path / rounding / "recipe.json").read_text())
        assert (recipe["rounding"], recipe["guidance"]) == (rounding, "away from the null class")
    darker = images(tmp_path / "round").astype(int) - images(tmp_path / "truncate")
    assert set(np.unique(darker)) == {0, 1}


def test_another_sampler_and_interval_are_the_models(pipeline, tmp_path):
    flags = {"num_samples": 2, "scheduler": "flow_dpm++", "guidance_scale": 4}
    run(command(pipeline, tmp_path / "all", **flags))
    assert json.loads((tmp_path / "all" / "recipe.json").read_text())["scheduler_config"]["flow_shift"] == 2.0
    assert "2 images, 0 of them new" in run(command(pipeline, tmp_path / "all", **flags), env=os.environ).stdout
    run([*command(pipeline, tmp_path / "half", **flags), "--guidance_interval", "0", "0.5"])
    assert not np.array_equal(images(tmp_path / "half"), images(tmp_path / "all"))


def test_labels_are_balanced_or_drawn():
    assert sample_labels("balanced", 7, 3, 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = sample_labels("random", 300, 3, 0)
    assert drawn.bincount().min() > 70
    assert torch.equal(sample_labels("random", 5, 3, 0), drawn[:5])
    assert not torch.equal(sample_labels("random", 300, 3, 1), drawn)


def test_a_dry_run_prints_the_cost_of_a_row_of_the_paper(pipeline, tmp_path):
    flags = {"recipe": "dit-xl-2-g1.50", "vae": pipeline / "vae", "scheduler": "flow_euler", "guidance_scale": 1.0}
    flags |= {"num_samples": 1000, "num_inference_steps": 10, "batch_size": 2}
    output = run([*command(pipeline, tmp_path / "out", **flags), "--dry_run"]).stdout
    plan = json.loads(output[output.index("{") :])
    assert plan["images"] == 1000
    assert plan["hours"] >= 0
    assert not (tmp_path / "out").exists()
    scales = {name: recipe["guidance_scale"] for name, recipe in SAMPLING_RECIPES.items()}
    sizes = ("dit-xl-2", "dit-xl-2-512")
    assert scales == {f"{size}-g{scale:.2f}": scale for size in sizes for scale in (1.0, 1.25, 1.5)}
    for recipe in SAMPLING_RECIPES.values():
        assert recipe | {"num_inference_steps": 250, "guidance_channels": 3, "scheduler": "ddpm"} == recipe
        assert recipe | {"num_samples": 50_000, "labels": "random", "vae": "stabilityai/sd-vae-ft-mse"} == recipe
        assert recipe["guidance_interval"] == (0.0, 1.0)


def test_flags_that_are_not_given_are_the_pipelines_own(pipeline, tmp_path):
    """The recipe holds what was used; giving the same values is the same set."""
    flags = {"num_samples": 2, "output_dir": tmp_path / "own"}
    own = [sys.executable, SAMPLE, "--pretrained_model_name_or_path", pipeline, *flatten(flags)]
    run_forked(own, check=True)
    recipe = json.loads((tmp_path / "own" / "recipe.json").read_text())
    settings = ("num_inference_steps", "guidance_scale", "guidance_channels", "guidance_interval")
    pipe = DiTClassCondPipeline.from_pretrained(pipeline)
    used = call_settings(pipe, Namespace(**dict.fromkeys(settings)))
    assert {name: recipe[name] for name in settings} == used | {"guidance_interval": list(used["guidance_interval"])}
    assert call_settings(pipe, Namespace(**dict.fromkeys(settings) | {"guidance_scale": 2.0}))["guidance_scale"] == 2.0
    given = {"num_inference_steps": used["num_inference_steps"], "guidance_scale": used["guidance_scale"]}
    result = run_forked([*own, *flatten(given)], check=True)
    assert "2 images, 0 of them new" in result.stdout
    bad = run_forked([*own, "--guidance_scale", "1.25"])
    assert bad.returncode == 2
    assert "guidance_scale was" in bad.stderr


def flatten(flags):
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def test_a_grid_of_named_classes(pipeline, tmp_path):
    """A folder or a bundled name; each value is a class, whatever commas its name has."""
    flags = ["--num_images_per_label", "2", "--num_inference_steps", "1", "--seed", "3"]
    command = [sys.executable, GENERATE, *flags, "--pretrained_model_name_or_path"]
    result = run_forked([*command, pipeline, "--output", tmp_path / "a" / "grid.png"], check=True)
    assert result.stdout.startswith("6 images in")
    assert Image.open(tmp_path / "a" / "grid.png").size == (8 + 2 * 104, 8 + 3 * 68)
    run_forked([*command[:-1], "--pipeline", pipeline, "--output", tmp_path / "b.png"], check=True)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a" / "grid.png").read_bytes()
    labels = ["--class_labels", "grey", "0", "--output", tmp_path / "c.png"]
    result = run_forked([*command, pipeline, *labels], check=True)
    assert result.stdout.startswith("4 images in")
    result = run_forked([*command, "emoji64", "--class_labels", "sloth", "--output", tmp_path / "d.webp"], check=True)
    assert Image.open(tmp_path / "d.webp").size == (8 + 2 * 104, 8 + 100)
    for flags, message in (
        (["--class_labels", "gray"], "Did you mean 'grey'"),
        (["--class_labels", "3"], "0 to 2"),
        (["--output", tmp_path / "e.txt"], "image file"),
        (["--num_images_per_label", "0"], "at least 1"),
    ):
        bad = run_forked([*command, pipeline, "--output", tmp_path / "e.png", *flags])
        assert bad.returncode == 2
        assert message in bad.stderr
    assert not (tmp_path / "e.png").exists()


def test_captions_fit_their_cell():
    """Two lines at most, whole words where they fit, and an ellipsis where they don't."""
    font = ImageFont.load_default(size=12)
    assert caption_lines("sloth", font, 96) == ["sloth"]
    assert caption_lines("woman in motorized wheelchair facing right", font, 96)[0] == "woman in"
    for name in ("w" * 40, "", "grinning face with smiling eyes and much more", "a " * 60):
        lines = caption_lines(name, font, 96)
        assert len(lines) <= 2 and all(font.getlength(line) <= 96 for line in lines)
    assert caption_lines("w" * 40, font, 96)[0].endswith("w…")


def test_a_label_is_a_name_first():
    """As in `pipe("4")`; a number that is no name is an id, and a name may hold commas."""
    id2label = dict(enumerate(("10", "2, two", "crane, bird", "4")))
    assert class_labels(["4", "2", "two", "3", "crane, bird"], id2label) == ["4", "2", "two", 3, "crane, bird"]
    pipe = DiTClassCondPipeline(tiny_transformer(num_classes=4), make_scheduler("ddim"), None, id2label)
    assert pipe.resolve_class_labels(class_labels(["4", "2", "1", "crane, bird"], id2label)) == [3, 1, 1, 2]


def test_names_of_a_dataset_are_looked_up_at_once(tmp_path, monkeypatch):
    """An index of the class names is built by each call of `get_label_ids`."""
    for name in ("dark", "grey", "light"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "0.png")
    id2label = {0: "dark", 1: "light", 2: "grey"}
    pipe = DiTClassCondPipeline(tiny_transformer(num_classes=3), make_scheduler("ddim"), None, id2label)
    calls, get_label_ids = [], pipe.get_label_ids
    monkeypatch.setattr(pipe, "get_label_ids", lambda names: calls.append(names) or get_label_ids(names))
    args = Namespace(labels=str(tmp_path), holdout=0.0, seed=0)
    labels = asked_labels(args, pipe, 6)
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert calls == [["dark", "grey", "light"]]


def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.txt").write_text("mine")
    script = ROOT / "examples" / "evaluate" / "sample.py"
    command = [sys.executable, script, "--pretrained_model_name_or_path", "emoji64", "--num_samples", "2"]
    for flags, message in (
        (["--output_dir", tmp_path / "data"], "is not empty and holds no set of samples"),
        (["--output_dir", tmp_path / "new", "--scheduler", "euler"], "no scheduler recipe 'euler'"),
        (["--output_dir", tmp_path / "new", "--scheduler", "ddim"], "this pipeline was built for 'velocity'"),
        (
            ["--output_dir", tmp_path / "new", "--guidance_scale", "-1"],
            "--guidance_scale: '-1' is not a finite number at least 0",
        ),
        (["--output_dir", tmp_path / "new", "--seed", "-1"], "--seed: '-1' is not a whole number at least 0"),
    ):
        result = run_forked([*command, *flags])
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["own.txt"]


def in_process(monkeypatch, arguments, main=sample.main):
    monkeypatch.setattr(sys, "argv", [str(part) for part in arguments[1:]])
    main()


def test_damaged_samples_are_generated_again_and_foreign_ones_refused(pipeline, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    flags = command(pipeline, folder, num_samples=3, num_inference_steps=1, batch_size=1)
    in_process(monkeypatch, flags)
    first = images(folder)
    (folder / "images" / ".DS_Store").write_text("")
    files = [folder / "images" / f"{index:06d}.png" for index in range(3)]
    whole = files[1].read_bytes()
    for damaged in (whole[:-40], whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]):
        files[1].write_bytes(damaged)
        in_process(monkeypatch, flags)
        assert np.array_equal(images(folder), first)
        assert files[1].read_bytes() == whole
    recipe, samples = ((folder / name).read_bytes() for name in ("recipe.json", "samples.npz"))
    other = tmp_path / "other"
    in_process(monkeypatch, command(pipeline, other, num_samples=3, num_inference_steps=1, seed=1))
    foreign = (other / "images" / "000002.png", files[1], pipeline / "README.md", pipeline / "vae" / "empty")
    foreign[-1].write_bytes(b"")
    for content in (path.read_bytes() for path in foreign):
        files[2].write_bytes(content)
        with pytest.raises(ValueError, match="000002.png is not the sample of this number in this set"):
            in_process(monkeypatch, flags)
        assert files[2].read_bytes() == content
    files[2].unlink()
    (folder / "images" / "mine.png").write_text("mine")
    with pytest.raises(ValueError, match="mine.png does not belong to this set"):
        in_process(monkeypatch, flags)
    assert [(folder / name).read_bytes() for name in ("recipe.json", "samples.npz")] == [recipe, samples]
    (folder / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="recipe.json was not written by this version"):
        in_process(monkeypatch, flags)


def test_a_set_that_was_never_begun_leaves_no_recipe(pipeline, tmp_path, monkeypatch):
    """Or the next command, with other flags, would be refused."""
    flags = command(pipeline, tmp_path / "out", num_samples=2, num_inference_steps=1)

    def fails(*_, **__):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(DiTClassCondPipeline, "__call__", fails)
        with pytest.raises(OSError, match="no"):
            in_process(monkeypatch, flags)
    in_process(monkeypatch, [*flags, "--seed", "1"])
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["seed"] == 1


def test_a_folder_in_use_is_refused(pipeline, tmp_path, monkeypatch):
    holder = FileLock(tmp_path / ".lock")  # as another process holds it
    with holder, pytest.raises(ValueError, match="is in use by another run"):
        in_process(monkeypatch, command(pipeline, tmp_path))
    assert not (tmp_path / "recipe.json").exists()


def test_samples_are_those_of_their_recipe(pipeline, tmp_path, monkeypatch):
    for name, count in (("a", 2), ("b", 2), ("c", 3)):
        flags = command(pipeline, tmp_path / name, num_samples=count, num_inference_steps=1, seed=ord(name))
        in_process(monkeypatch, flags)
    for name, difference in (("b", "`pixels`"), ("c", "`num_samples` is 3, there it is 2")):
        (tmp_path / "a" / "samples.npz").write_bytes((tmp_path / name / "samples.npz").read_bytes())
        flags = [0, "x", "--samples", tmp_path / "a" / "samples.npz", "--reference", tmp_path / "b" / "samples.npz"]
        with pytest.raises(ValueError, match=f"is not the set that recipe.json beside it describes: {difference}"):
            in_process(monkeypatch, [*flags, "--cache_dir", tmp_path / "cache"], metrics.main)
    assert not (tmp_path / "cache").exists()


def test_a_grid_that_cannot_be_written_keeps_what_was_there(pipeline, tmp_path, monkeypatch):
    (tmp_path / "grid.png").write_text("before")
    flags = [0, "x", "--pipeline", pipeline, "--output", tmp_path / "grid.png", "--num_inference_steps", "1"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # as a full disk
        with pytest.raises(OSError, match="grid.png can't be written: .*; what was there before is unchanged"):
            in_process(monkeypatch, flags, generate.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"grid.png": "before"}
