"""Sets of images to be measured, and the command that measures them."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_transformer, tiny_vae
from datasets import ClassLabel, Dataset
from datasets import Features as Columns
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from safetensors.torch import save_file
from testing_utils.hub_server import HubServer
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.commands.metrics import main
from dit_hf.data.pixels import center_crop, to_tensor
from dit_hf.evaluation import metrics as table
from dit_hf.evaluation.extractors import Features
from dit_hf.evaluation.frechet import frechet_distance
from dit_hf.evaluation.metrics import METRICS, Metric
from dit_hf.evaluation.protocol import protocol_line
from dit_hf.evaluation.reference import reference_statistics
from dit_hf.evaluation.sources import ImageSource
from dit_hf.evaluation.statistics import GaussianStatistics, gaussian


FD, SFD = "fd_efficientnet_lite0", "sfd_efficientnet_lite0"
SCRIPT = ROOT / "examples" / "evaluate" / "compute_metrics.py"


def random_features(count, dim=12, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def images(tmp_path):
    """The same twelve images as a folder and as an npz."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(pixels):
        PILImage.fromarray(image).save(tmp_path / "folder" / f"{index:03d}.png")
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return tmp_path, pixels


def test_sources_hold_the_same_images(images, workspace):
    folder, pixels = images
    sources = [ImageSource(folder / "folder"), ImageSource(folder / "images.npz")]
    for source in sources:
        found = torch.cat(list(source.batches(5)))
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), pixels)
    assert sources[0].digest() == sources[1].digest()
    assert torch.cat(list(ImageSource(workspace / "data").batches(3))).shape == (8, 3, 32, 32)


def test_classes_of_samples_are_those_of_the_recipe(images):
    folder, pixels = images
    np.savez(folder / "samples.npz", arr_0=pixels[:2], arr_1=np.array([1, 0]))
    assert ImageSource(folder / "samples.npz").labels() is None  # no recipe beside it
    (folder / "recipe.json").write_text(json.dumps({"classes": {"0": "a", "1": "b"}}))
    assert ImageSource(folder / "samples.npz").labels() == ["b", "a"]
    assert ImageSource(folder / "images.npz").labels() is None  # another set, not of that recipe
    (folder / "recipe.json").write_text(json.dumps({"classes": {"0": "a"}}))
    with pytest.raises(ValueError, match="samples.npz has images of class 1"):
        ImageSource(folder / "samples.npz").labels()
    (folder / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json can't be read"):
        ImageSource(folder / "samples.npz").labels()


def test_bad_sources_are_named(images):
    folder, pixels = images
    content = (folder / "images.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    np.savez(folder / "float.npz", arr_0=pixels.astype(np.float32))
    np.savez(folder / "other.npz", images=pixels)
    np.savez(folder / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (folder / "flipped.npz").write_bytes(flipped)
    np.savez(folder / "none.npz", arr_0=pixels[:0])
    bad = {"cut": "an npz file", "float": "must be uint8", "missing": "", "flipped": "CRC", "none": "no images"}
    for name, message in (bad | {"other": "arr_0"}).items():
        with pytest.raises(ValueError, match=f"{name}.npz.*{message}"):
            list(ImageSource(folder / f"{name}.npz").batches())
    np.savez(folder / "alone.npz", mu=np.zeros(3))
    np.savez(folder / "mean.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    for name, message in (("other", "has images"), ("nan", "finite"), ("mean", "finite"), ("alone", "sigma")):
        with pytest.raises(ValueError, match=f"{name}.npz.*{message}"):
            reference_statistics(folder / f"{name}.npz")
    np.savez(folder / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(folder / "words.npz", mu=np.zeros(3), sigma=np.eye(3), extractor=np.array("{"))
    for name, message in (("shape", "of shapes"), ("words", "can't be read as")):
        with pytest.raises(ValueError, match=f"{name}.npz.*{message}"):
            reference_statistics(folder / f"{name}.npz")
    assert reference_statistics(folder / "images.npz") is None
    few = GaussianStatistics.from_moments(torch.zeros(12), torch.cov(random_features(5).T))
    with pytest.warns(UserWarning, match="reference"):  # the rank of a covariance tells of how few images it is
        frechet_distance(gaussian(random_features(50)), few)
    PILImage.new("RGB", (8, 8)).save(folder / "folder" / "999.png")
    with pytest.raises(ValueError, match="999.png.*another size, 16×16 and 8×8 pixels: pass --resolution"):
        list(ImageSource(folder / "folder").batches())
    cropped = torch.cat(list(ImageSource(folder / "folder", resolution=8).batches()))
    assert cropped.shape == (13, 3, 8, 8)
    assert torch.equal(cropped[0], to_tensor(center_crop(PILImage.fromarray(pixels[0]), 8)))
    assert torch.equal(cropped[:12], torch.cat(list(ImageSource(folder / "images.npz", resolution=8).batches())))
    save_file({"features": random_features(4)}, folder / "words.safetensors", metadata={"extractor": "{"})
    for name in ("images.npz", "words.safetensors"):
        with pytest.raises(ValueError, match=f"{name} can't be read as features"):
            Features.load(folder / name)


def run_script(*arguments, env=None):
    command = [sys.executable, SCRIPT, "--json", *map(str, arguments)]
    if env is None:
        return run_forked(command)
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_the_command_and_its_cache(images):
    folder, _ = images
    flags = ("--metrics", f"{FD},kid,precision", "--bootstrap", 2, "--cache_dir", folder / "cache")
    result = run_script("--samples", folder / "folder", "--reference", folder / "images.npz", *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert abs(found[FD]["value"]) < 1e-2  # the same images
    assert found["precision"]["value"] == 1
    assert found["recipe"]["extractor"]["resize"].startswith("112×112, bicubic, antialias")
    (cached,) = (folder / "cache").iterdir()  # one set of images, seen once
    flags = ("--feature_extractor", "precomputed", "--metrics", FD, "--bootstrap", 0)
    bad = run_script("--samples", cached, "--reference", folder / "images.npz", *flags)
    assert bad.returncode == 2
    assert "images.npz" in bad.stderr


def test_statistics_in_the_format_of_adm(images):
    """Saved, read again in place of the images, and refused where another extractor made them."""
    folder, _ = images
    flags = ("--metrics", f"{FD},{SFD}", "--bootstrap", 0, "--cache_dir", folder / "cache")
    saved = folder / "reference.npz"
    command = ("--samples", folder / "images.npz", "--reference")
    run_script(*command, folder / "folder", *flags, "--save_statistics", saved)
    with np.load(saved) as arrays:
        assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s", "count", "extractor", "image_size"}
        assert arrays["sigma"].shape == (1280, 1280)
        theirs = {name: arrays[name] for name in ("mu", "sigma")}
    found = json.loads(run_script(*command, saved, *flags).stdout)
    assert abs(found[FD]["value"]) < 1e-2
    assert abs(found[SFD]["value"]) < 1e-2
    statistics = reference_statistics(saved)
    extractor = statistics.extractor
    assert statistics.parts["features"].count == 12
    assert extractor["name"] == "efficientnet-lite0"
    assert statistics.image_size == (16, 16)
    np.savez(folder / "adm.npz", **theirs)
    np.savez(folder / "other.npz", **theirs, extractor=np.array(json.dumps(extractor | {"resize": "64x64"})))
    np.savez(folder / "both.npz", arr_0=np.load(folder / "images.npz")["arr_0"], mu=np.zeros(7), sigma=np.eye(7))
    for name, message in (("adm", "inception (the file names none"), ("other", "64x64")):
        bad = run_script(*command, folder / f"{name}.npz", *flags)
        assert bad.returncode == 2
        assert f"{name}.npz" in bad.stderr
        assert message in bad.stderr
    both = run_script(*command, folder / "both.npz", *flags)  # as ADM's own: statistics of Inception, images for any
    assert abs(json.loads(both.stdout)[FD]["value"]) < 1e-2
    cached = next(path for path in (folder / "cache").iterdir())  # the same of features computed elsewhere
    flags = ("--feature_extractor", "precomputed", "--metrics", FD, "--bootstrap", 0)
    assert run_script("--samples", cached, "--reference", saved, *flags).returncode == 0
    bad = run_script("--samples", cached, "--reference", folder / "other.npz", *flags)
    assert bad.returncode == 2
    assert "64x64" in bad.stderr
    bad = run_script("--samples", cached, "--reference", saved, *flags, "--save_statistics", folder / "again.npz")
    assert bad.returncode == 2
    assert "a file of statistics already" in bad.stderr


def test_images_beside_statistics_give_what_statistics_cannot(images):
    """As in ADM's reference batches: distances by the statistics, precision by the images."""
    folder, pixels = images
    flags = ("--bootstrap", 0, "--cache_dir", folder / "cache")
    command = ("--samples", folder / "images.npz", "--reference")
    run_script(*command, folder / "folder", *flags, "--metrics", FD, "--save_statistics", folder / "reference.npz")
    with np.load(folder / "reference.npz") as arrays:
        moved = {name: arrays[name] for name in arrays} | {"mu": arrays["mu"] + 1}
    np.savez(folder / "both.npz", arr_0=pixels, **moved)
    found = json.loads(run_script(*command, folder / "both.npz", *flags, "--metrics", f"precision,{FD}").stdout)
    assert list(found)[:2] == ["precision", FD]
    assert found["precision"]["value"] == 1
    assert found[FD]["value"] == pytest.approx(1280, rel=1e-3)  # 1² in each of 1280 channels


def test_metrics_go_into_the_card_with_their_recipe(images):
    folder, _ = images
    DiTClassCondPipeline(
        tiny_transformer(num_classes=2, learn_sigma=False), make_scheduler("flow_euler"), tiny_vae(), {0: "a", 1: "b"}
    ).save_pretrained(folder / "pipe")
    Features(random_features(40), None, None, {"name": str(folder / "dinov2")}).save(folder / "a.safetensors")
    Features(random_features(50, seed=1), None, None, {"name": str(folder / "dinov2")}).save(folder / "b.safetensors")
    flags = ("--feature_extractor", "precomputed", "--metrics", "fd_dinov2,kid", "--bootstrap", 0)
    with HubServer() as hub:
        environment = os.environ | hub.environment(folder / "home")
        result = run_script(
            *("--samples", folder / "a.safetensors", "--reference", folder / "b.safetensors", *flags),
            *("--training", folder / "a.safetensors", "--update_card", folder / "pipe", "--push_to_hub"),
            *("--hub_model_id", "user/measured"),
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        published = hub.files("user/measured")["README.md"].decode()
    other = ("--samples", folder / "a.safetensors", "--reference", folder / "a.safetensors", *flags)
    run_script(*other, "--update_card", folder / "pipe", "--dataset_title", "themselves")
    found = json.loads(result.stdout)
    neighbours = found["nearest training image"]
    assert neighbours["fraction of suspects"] == 1  # the samples are the training images
    assert "count" in found["training images"]
    assert neighbours["nearest"][0] == {"sample": 0, "training": 0, "distance": 0.0}
    assert neighbours["median of the reference"] > 0
    local = ModelCard.load(folder / "pipe" / "README.md")
    for card in (local, ModelCard(published)):
        held_out = [result for result in card.data.eval_results if result.dataset_name == "held-out images"]
        results = {result.metric_type: result for result in held_out}
        assert results["fd_dinov2"].metric_value == float(f"{found['fd_dinov2']['value']:.6g}")
        assert results["kid"].metric_args["num_reference"] == 50
        assert results["kid"].metric_args["samples"] == "a.safetensors"
        assert str(folder) not in card.content
        assert "Fréchet distance (dinov2)" in card.text
        assert "Protocol, held-out images: labels: not recorded; " in card.text
        assert "; seed: not recorded." in card.text  # to its end
        assert "reference: 50 images of b.safetensors; N: 40; " in results["kid"].metric_args["protocol"]
    assert len(local.data.eval_results) == 4  # of two references


def test_broken_images_are_skipped_and_named(images):
    """In folders and datasets, as training does; neighbours and classes are those of the images that are left."""
    folder, pixels = images
    (folder / "folder" / "002.png").write_bytes((folder / "folder" / "002.png").read_bytes()[:60])
    (folder / "folder" / "notes.txt").write_text("no image")
    PILImage.fromarray(pixels[4]).save(folder / "folder" / "004.TIFF")  # suffixes as training reads them
    (folder / "folder" / "004.png").unlink()
    source = ImageSource(folder / "folder")
    found = torch.cat(list(source.batches(5))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.delete(pixels, 2, axis=0))
    assert list(source.skipped) == [2]
    assert source.skipped[2].startswith("002.png: ")
    rows = [{"path": None, "bytes": (folder / "folder" / f"{index:03d}.png").read_bytes()} for index in (1, 2, 3)]
    columns = Columns({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    (folder / "data").mkdir()
    dataset = Dataset.from_dict({"image": rows, "label": [0, 0, 1]}, features=columns)
    dataset.to_parquet(folder / "data" / "test.parquet")
    dataset = ImageSource(folder / "data")
    assert torch.cat(list(dataset.batches())).shape[0] == 2
    assert dataset.skipped[1].startswith("image 1")
    assert dataset.labels() == ["a", "b"]
    command = ("--samples", folder / "folder", "--reference", folder / "images.npz", "--training", folder / "folder")
    flags = ("--metrics", "precision", "--bootstrap", 0, "--cache_dir", folder / "cache")
    result = run_script(*command, *flags)
    assert "Skipped in samples" in result.stderr
    assert "002.png" in result.stderr
    recipe = json.loads(result.stdout)["recipe"]
    assert recipe["skipped"] == {"samples": 1, "reference": 0, "training": 1}
    assert recipe["num_samples"] == 11
    pairs = json.loads(result.stdout)["nearest training image"]["nearest"]
    assert [(pair["sample"], pair["training"]) for pair in pairs] == [(index, index) for index in (0, 1, 3, 4, 5)]
    for path in (folder / "folder").glob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no images that can be read \(000.png"):
        list(ImageSource(folder / "folder").batches())


def test_images_beside_folders_of_images_are_ambiguous(images):
    folder, pixels = images
    (folder / "folder" / "test" / "class").mkdir(parents=True)
    assert len(list(ImageSource(folder / "folder").batches())) == 1
    PILImage.fromarray(pixels[0]).save(folder / "folder" / "test" / "class" / "a.JPG")
    with pytest.raises(ValueError, match=r"images \(000.png\) and a folder of images \(test\)"):
        ImageSource(folder / "folder")


def test_classes_are_read_only_where_they_are_needed(images):
    """A test split without labels, -1 as on the Hub, has an FD; what needs classes says so."""
    folder, pixels = images
    columns = Columns({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = [PILImage.fromarray(image) for image in pixels]
    for split, labels in (("test", [-1] * 12), ("train", [0, 1] * 6)):
        (folder / "data").mkdir(exist_ok=True)
        dataset = Dataset.from_dict({"image": rows, "label": labels}, features=columns)
        dataset.to_parquet(folder / "data" / f"{split}.parquet")
    command = ("--samples", folder / "folder", "--reference", folder / "data", "--bootstrap", 0)
    command = (*command, "--cache_dir", folder / "cache", "--metrics")
    assert abs(json.loads(run_script(*command, FD).stdout)[FD]["value"]) < 1e-2
    bad = run_script(*command, "accuracy", "--training", folder / "data")
    assert bad.returncode == 2
    assert "accuracy needs the class of every image" in bad.stderr
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=np.zeros(12, dtype=int))
    (folder / "recipe.json").write_text(json.dumps({"classes": {"1": "a"}}))
    command = ("--samples", folder / "samples.npz", *command[2:])
    assert run_script(*command, FD).returncode == 0
    assert "does not name" in run_script(*command, "accuracy", "--training", folder / "data").stderr


def test_held_out_images_of_one_split(images):
    """The same images as in training with the same fraction; together they are all."""
    folder, pixels = images
    columns = Columns({"image": ImageFeature()})
    (folder / "data").mkdir()
    dataset = Dataset.from_dict({"image": [PILImage.fromarray(image) for image in pixels]}, features=columns)
    dataset.to_parquet(folder / "data" / "train.parquet")
    splits = ("train", "test")
    sources = {split: ImageSource(folder / "data", split, holdout=0.4) for split in splits}
    kept, held_out = ({image.numpy().tobytes() for image in next(sources[split].batches())} for split in splits)
    assert len(kept) > len(held_out) > 0
    assert len(kept | held_out) == 12


def test_sets_of_different_sizes_are_refused_before_work(images):
    folder, pixels = images
    large = pixels.repeat(4, axis=1).repeat(4, axis=2)
    np.savez(folder / "large.npz", arr_0=large)
    flags = ("--metrics", FD, "--bootstrap", 0, "--cache_dir", folder / "cache")
    command = ("--samples", folder / "folder", "--reference", folder / "large.npz", *flags)
    bad = run_script(*command)
    assert bad.returncode == 2
    assert "16×16 pixels (samples) and 64×64 (reference); pass --resolution" in bad.stderr
    assert not (folder / "cache").exists()
    cropped = json.loads(run_script(*command, "--resolution", 16).stdout)
    assert cropped["recipe"]["resolution"] == 16
    assert abs(cropped[FD]["value"]) < 1e-2  # halved with a box filter, the large images are the small ones


def command_in_process(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["metrics", "--json", *map(str, arguments)])
    main()
    return json.loads(capsys.readouterr().out)


def test_a_folder_is_no_output(tmp_path, monkeypatch, capsys):
    """Refused at once, not after the work."""
    sets = ("--samples", tmp_path / "nowhere", "--reference", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder; it must name a file"):
        command_in_process(monkeypatch, capsys, *sets, "--output", tmp_path)


def test_the_command_knows_a_new_row_and_its_defaults(tmp_path, monkeypatch, capsys):
    """The metrics of the command are the table's; those of inception's features have their published names."""
    sets = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for seed, path in enumerate(sets):
        Features(random_features(40, seed=seed), None, random_features(40, 5, seed), {"name": "inception"}).save(path)
    flags = ("--samples", sets[0], "--reference", sets[1], "--feature_extractor", "precomputed", "--bootstrap", 0)
    found = command_in_process(monkeypatch, capsys, *flags)
    assert list(found) == ["fid", "is", "kid", "precision", "recall", "protocol", "recipe"]
    assert "shuffled" in found["recipe"]["settings"]["is"]
    monkeypatch.setattr(table, "METRICS", [*METRICS, Metric("gap", "gap", lambda a, b: (a.mean() - b.mean()).item())])
    found = command_in_process(monkeypatch, capsys, *flags, "--metrics", "gap, fid")
    assert list(found) == ["gap", "fid", "protocol", "recipe"]
    assert found["gap"]["value"] != 0
    with pytest.raises(ValueError, match="There is no metric 'sfdi'; .*, gap"):
        command_in_process(monkeypatch, capsys, *flags, "--metrics", "sfdi")
    with pytest.raises(ValueError, match="accuracy needs training images"):
        command_in_process(monkeypatch, capsys, *flags, "--metrics", "accuracy")


def test_a_table_is_printed_and_json_is_written(tmp_path, monkeypatch, capsys):
    """One line for each metric, with the interval and the training images' value; then the protocol."""
    sets = [tmp_path / f"{name}.safetensors" for name in ("samples", "reference", "training")]
    for seed, path in enumerate(sets):
        Features(random_features(40, seed=seed), None, None, {"name": "a"}).save(path)
    flags = ["--samples", sets[0], "--reference", sets[1], "--training", sets[2], "--metrics", "fd,precision,fdr"]
    flags += ["--feature_extractor", "precomputed", "--bootstrap", 2, "--output", tmp_path / "a.json"]
    monkeypatch.setattr(sys, "argv", ["metrics", *map(str, flags)])
    main()
    head, *rows, copies, _, protocol = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "a.json").read_text())
    assert head.split() == ["metric", "samples", "±", "training", "images"]
    value, real = found["fd_a"], found["training images"]["fd_a"]["value"]
    assert 0.1 < value["ci95"] < 1  # two digits of it are two decimals
    assert rows[0].split() == ["fd_a", "↓", f"{value['value']:.2f}", f"{value['ci95']:.2f}", f"{real:.2f}"]
    assert [row.split()[:2] for row in rows[1:]] == [["precision", "↑"], ["fdr", "↓"]]
    assert len(rows[2].split()) == 4  # no ratio of training images
    assert copies.startswith("fraction of suspects (0.01 without copies): ")
    assert protocol == found["protocol"] == protocol_line(found["recipe"])


def test_the_mean_ratio_takes_results_of_other_extractors(tmp_path, monkeypatch, capsys):
    sets = [tmp_path / f"{name}.safetensors" for name in ("samples", "reference", "training")]
    flags = ["--samples", sets[0], "--reference", sets[1], "--training", sets[2], "--metrics", "fdr"]
    flags += ["--feature_extractor", "precomputed", "--bootstrap", 0]
    ratios = {}
    for extractor, more in (("a", ["--output", tmp_path / "a.json"]), ("b", ["--fdr_results", tmp_path / "a.json"])):
        for seed, path in enumerate(sets):
            Features(random_features(40, seed=seed) ** (1 + len(ratios)), None, None, {"name": extractor}).save(path)
        found = command_in_process(monkeypatch, capsys, *flags, *more)
        ratios[extractor] = found["fdr"]["value"]
    assert found["mean fdr"] == {"mean": pytest.approx(sum(ratios.values()) / 2), "extractors": ratios}
    (tmp_path / "c.json").write_text(json.dumps({"fid": {"value": 1.0}}))
    for other, name, message in (
        ("c.json", sets[0], "c.json is not a result with 'fdr'"),
        ("a.json", sets[1], "Results of b, a differ in `samples`"),
    ):
        with pytest.raises(ValueError, match=message):
            command_in_process(monkeypatch, capsys, "--fdr_results", tmp_path / other, *flags, "--samples", name)
    with pytest.raises(SystemExit):
        command_in_process(monkeypatch, capsys, "--fdr_results", tmp_path / "a.json", *flags, "--metrics", "kid")


def test_the_protocol_says_what_is_recorded_and_what_is_not():
    sampling = {"labels": "balanced", "rounding": "truncate", "scheduler": "DDIMScheduler", "num_inference_steps": 30}
    guided = {"guidance_scale": 1.5, "guidance_channels": 3, "guidance_interval": [0.0, 0.5], "seed": 7}
    recipe = {"extractor": {"name": "facebook/dinov2-base", "weights": "ab12", "resize": "224×224"}, "resolution": 64}
    recipe |= {"reference": "data/ref.npz", "num_reference": 50, "statistics": "file", "num_samples": 40}
    recipe |= {"sampling": sampling | guided | {"guidance": "away from the null class"}}
    assert protocol_line(recipe) == (
        "labels: balanced; rounding to 8 bits: truncate; resize: cropped to 64×64, then 224×224; "
        "extractor: dinov2-base (weights ab12); reference: statistics in ref.npz and 50 images of ref.npz; N: 40; "
        "guidance: scale 1.5, channels 3, interval 0 to 0.5, away from the null class; solver: DDIMScheduler; "
        "steps: 30; seed: 7"
    )
    assert "channels all," in protocol_line({"sampling": guided | {"guidance_channels": None}})
    assert "guidance: in the weights;" in protocol_line(
        {"sampling": {"guidance_scale": 1.0, "guidance": "in the weights"}}
    )
    assert "labels: as in the dataset pictures;" in protocol_line({"sampling": {"labels": "/home/me/pictures"}})
    unknown = dict(part.split(": ", 1) for part in protocol_line({"sampling": {}}).split("; "))
    assert unknown.pop("guidance").count("not recorded") == 4
    assert set(unknown.values()) == {"not recorded"}


def test_few_images_omit_metrics_and_the_command_says_so(images, monkeypatch, capsys):
    folder, pixels = images
    np.savez(folder / "few.npz", arr_0=pixels[:9])
    flags = ("--samples", folder / "few.npz", "--reference", folder / "images.npz", "--bootstrap", 0)
    flags += ("--cache_dir", folder / "cache", "--training", folder / "few.npz")
    monkeypatch.setattr(sys, "argv", ["metrics", "--json", *map(str, flags)])
    main()
    output = capsys.readouterr()
    assert "Omitted: is needs at least 10 images; there are 9 (samples)." in output.err
    assert list(json.loads(output.out))[:5] == [FD, SFD, "kid", "precision", "recall"]
    with pytest.raises(ValueError, match="is needs at least 10 images; there are 9"):
        command_in_process(monkeypatch, capsys, *flags, "--metrics", "is")


def test_cached_features_are_those_of_the_images(images, monkeypatch, capsys):
    """Another set's under the name are computed again; a damaged file is named."""
    folder, _ = images
    flags = ("--samples", folder / "folder", "--reference", folder / "images.npz", "--bootstrap", 0)
    flags += ("--cache_dir", folder / "cache", "--metrics", FD)
    command_in_process(monkeypatch, capsys, *flags)
    (cached,) = (folder / "cache").iterdir()
    features = Features.load(cached)
    replace(features, features=features.features + 1, digest="0" * 64).save(cached)
    assert abs(command_in_process(monkeypatch, capsys, *flags)[FD]["value"]) < 1e-2
    assert torch.equal(Features.load(cached).features, features.features)
    content = bytearray(cached.read_bytes())
    content[-9] ^= 1
    cached.write_bytes(content)
    with pytest.raises(ValueError, match=f"{cached.name} is damaged"):
        command_in_process(monkeypatch, capsys, *flags)


def test_classes_without_training_images_are_refused_before_the_work(images, monkeypatch, capsys):
    folder, pixels = images
    for place in ("data/test/cats", "data/test/dogs", "training/train/cats", "training/train/cows"):
        (folder / place).mkdir(parents=True)
        for index in range(2):
            PILImage.fromarray(pixels[index]).save(folder / place / f"{index}.png")
    flags = ("--samples", folder / "data", "--reference", folder / "images.npz", "--training", folder / "training")
    with pytest.raises(ValueError, match="No training image is of class 'dogs'"):
        command_in_process(monkeypatch, capsys, *flags, "--cache_dir", folder / "cache")
    assert not (folder / "cache").exists()
