"""Figures against closed forms, scipy, and plain numpy; sources of images; the command."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, tiny_transformer, tiny_vae
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from safetensors.torch import save_file
from testing_utils.hub_server import HubServer
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.data.pixels import center_crop, to_tensor
from dit_hf.evaluation.extractors import Features, load_extractor
from dit_hf.evaluation.frechet import frechet_distance
from dit_hf.evaluation.metrics import compute_metrics, gaussian
from dit_hf.evaluation.sets import inception_score, kernel_distance, nearest_neighbours, precision_recall
from dit_hf.evaluation.sources import ImageSource, reference_statistics
from dit_hf.evaluation.statistics import GaussianStatistics


SCRIPT = ROOT / "examples" / "evaluate" / "compute_metrics.py"


def draw(count, dim=12, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + shift


def test_distance_of_known_gaussians():
    """Diagonal covariances: |m|² + Σ (σ - σ')²."""
    first, second = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([9.0, 4.0, 1.0])
    mean = torch.tensor([1.0, -2.0, 0.5])
    statistics = [GaussianStatistics.from_moments(mean, first.diag())]
    statistics.append(GaussianStatistics.from_moments(torch.zeros(3), second.diag()))
    found = frechet_distance(*statistics)
    assert found == pytest.approx(1 + 4 + 0.25 + (1 - 3) ** 2 + 0 + (0.5 - 1) ** 2, rel=1e-12)


def test_distance_is_scipys():
    samples, reference = draw(200), draw(150, seed=1, shift=0.3)
    covariances = [np.cov(part.numpy(), rowvar=False) for part in (samples, reference)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = (samples.mean(0) - reference.mean(0)).square().sum().item()
    expected = shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root)
    assert frechet_distance(gaussian(samples), gaussian(reference)) == pytest.approx(expected, rel=1e-6)


def test_distance_with_few_images_is_exact_and_warns():
    """tr (C C')^½ is the sum of singular values of the cross-product of centred features."""
    samples, reference = draw(8, dim=30), draw(10, dim=30, seed=1)
    centred = [(part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (samples, reference)]
    cross = np.linalg.svd((centred[0] @ centred[1].T).numpy(), compute_uv=False).sum()
    shift = (samples.mean(0) - reference.mean(0)).square().sum()
    expected = (shift + sum(part.square().sum() for part in centred) - 2 * cross).item()
    with pytest.warns(UserWarning, match="8 images .samples. give 30 channels.*KID"):
        found = frechet_distance(gaussian(samples), gaussian(reference))
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.warns(UserWarning):
        assert abs(frechet_distance(gaussian(samples), gaussian(samples))) < 1e-5 * expected


def test_statistics_do_not_depend_on_order_or_batches():
    features = draw(101) + 1e4  # a large mean would cost raw sums of squares their digits
    whole = gaussian(features)
    batches = GaussianStatistics(12)
    for batch in features.flip(0).split(7):
        batches.update(batch)
    assert batches.count == 101
    torch.testing.assert_close(batches.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(batches.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9)


def test_fifty_thousand_images_fit_in_two_gigabytes():
    """Statistics take features a batch at a time, and figures over pairs a block at a time."""
    code = """
import resource, torch
from dit_hf.evaluation.sets import nearest_neighbours
from dit_hf.evaluation.statistics import GaussianStatistics
statistics = GaussianStatistics(2048)
features = torch.randn(50_000, 2048)
for batch in features.split(5000):
    statistics.update(batch)
distances, indices = nearest_neighbours(features[:1100], features)
assert statistics.count == 50_000 and indices.tolist() == list(range(1100)) and (distances == 0).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    peak = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert peak < 2


def test_bad_statistics_are_named():
    with pytest.raises(ValueError, match=r"shape \(3, 4\).*\(images, 12\)"):
        GaussianStatistics(12).update(torch.zeros(3, 4))
    features = draw(5)
    features[3, 2] = float("nan")
    with pytest.raises(ValueError, match="image 3 are not finite"):
        gaussian(features)
    with pytest.raises(ValueError, match="at least 2 images; there are 1"):
        _ = gaussian(draw(1)).covariance
    with pytest.raises(ValueError, match="different extractors"):
        frechet_distance(gaussian(draw(50)), gaussian(draw(50, dim=8)))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        GaussianStatistics.from_moments(torch.zeros(2), torch.diag(torch.tensor([4.0, -1.0]))).root()


def test_inception_score_is_numpys():
    logits = 3 * torch.randn(53, 10, generator=torch.Generator().manual_seed(0))
    scores = []
    for index in range(10):
        part = logits.double().numpy()[index * 53 // 10 : (index + 1) * 53 // 10]
        probabilities = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        ratio = np.log(probabilities) - np.log(probabilities.mean(0))
        scores.append(np.exp((probabilities * ratio).sum(1).mean()))
    mean, std = inception_score(logits)
    assert (mean, std) == (pytest.approx(np.mean(scores), rel=1e-9), pytest.approx(np.std(scores), rel=1e-9))
    sure = 1000 * torch.nn.functional.one_hot(torch.arange(100) % 10, 10).float()
    assert inception_score(sure)[0] == pytest.approx(10, rel=1e-9)  # ten classes, each image certain
    assert inception_score(torch.zeros(20, 10))[0] == pytest.approx(1, rel=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        inception_score(torch.full((20, 10), float("nan")))
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(logits[:5])


def test_kernel_distance_is_the_double_sum():
    samples, reference = draw(9, dim=4).numpy(), draw(7, dim=4, seed=1, shift=0.2).numpy()

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    pairs = [(len(samples), samples), (len(reference), reference)]
    within = sum(
        sum(kernel(part[i], part[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for n, part in pairs
    )
    between = np.mean([[kernel(x, y) for y in reference] for x in samples])
    found = kernel_distance(torch.from_numpy(samples), torch.from_numpy(reference))
    assert found == pytest.approx(within - 2 * between, rel=1e-9)


def test_kernel_distance_of_a_redrawn_set():
    """An image that was drawn twice makes no pair with itself."""
    samples, reference = draw(6, dim=4), draw(5, dim=4, seed=1)
    rows = torch.tensor([0, 0, 0, 2, 3, 3])
    kernel = (samples[rows] @ samples[rows].T / 4 + 1) ** 3
    pairs = rows[:, None] != rows
    whole = kernel_distance(samples[rows], reference) + 0.0
    inflated = ((kernel.sum() - kernel.diagonal().sum()) / 30 - kernel[pairs].mean()).item()
    found = kernel_distance(samples, reference, rows.bincount(minlength=6))
    assert found == pytest.approx(whole - inflated, rel=1e-9)
    assert inflated > 0
    once = kernel_distance(samples, reference, torch.ones(6))
    assert once == pytest.approx(kernel_distance(samples, reference), rel=1e-12)


def test_kernel_distance_in_blocks(monkeypatch):
    samples, reference = draw(40), draw(33, seed=1)
    whole = kernel_distance(samples, reference)
    monkeypatch.setattr("dit_hf.evaluation.sets.BLOCK", 7)
    assert kernel_distance(samples, reference) == pytest.approx(whole, rel=1e-9)


def test_precision_and_recall_are_numpys(monkeypatch):
    samples, reference = draw(31, dim=3), draw(27, dim=3, seed=1, shift=1.0)
    a, b = samples.numpy(), reference.numpy()
    to_a, to_b, between = (np.linalg.norm(x[:, None] - y[None], axis=2) for x, y in ((a, a), (b, b), (a, b)))
    radius_a, radius_b = np.sort(to_a, axis=1)[:, 3], np.sort(to_b, axis=1)[:, 3]
    expected = {
        "precision": (between <= radius_b[None]).any(1).mean(),
        "recall": (between <= radius_a[:, None]).any(0).mean(),
        "density": (between <= radius_b[None]).sum() / (3 * len(a)),
        "coverage": (between <= radius_b[None]).any(0).mean(),
    }
    monkeypatch.setattr("dit_hf.evaluation.sets.BLOCK", 10)
    found = precision_recall(samples, reference)
    assert {name: values.mean().item() for name, values in found.items()} == pytest.approx(expected)
    assert 0 < expected["precision"] < 1
    same = {name: values.mean().item() for name, values in precision_recall(samples, samples).items()}
    in_balls = (to_a <= radius_a[None]).sum() / (3 * len(a))  # ties: each image is on the rim of its neighbours' balls
    assert same == {"precision": 1, "recall": 1, "coverage": 1, "density": pytest.approx(in_balls, rel=1e-12)}
    with pytest.raises(ValueError, match="more than 3 images; there are 31 and 3"):
        precision_recall(samples, reference[:3])


@pytest.mark.parametrize("figure", [kernel_distance, precision_recall, nearest_neighbours])
def test_figures_of_pairs_name_bad_sets(figure):
    bad = draw(9)
    bad[4, 2] = float("inf")
    for sets, message in (
        ((draw(9), draw(9, dim=8)), "12 feature channels, the reference 8"),
        ((bad, draw(9)), r"\(samples\) are not finite"),
        ((draw(9), bad), r"\(reference\) are not finite"),
        ((draw(1), draw(9)), r"\(samples\).*at least 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            figure(*sets)


def test_copies_of_training_images_are_found(monkeypatch):
    monkeypatch.setattr("dit_hf.evaluation.sets.BLOCK", 10)
    training = draw(50)
    distances, indices = nearest_neighbours(torch.stack([training[17], training[4] + 0.01]), training)
    assert indices.tolist() == [17, 4]
    assert distances[0] == 0 < distances[1]


def features(count, seed=0, shift=0.0, extractor="a"):
    return Features(
        draw(count, seed=seed, shift=shift), draw(count, 5, seed), draw(count, 6, seed), {"name": extractor}
    )


def test_named_figures_and_their_intervals():
    samples, reference = features(200), features(50, seed=1, shift=0.2)
    every = ("fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage")
    found = compute_metrics(samples, reference, every, bootstrap=20)
    assert list(found) == list(every)
    assert all(figure["ci95"] > 0 for figure in found.values())
    share = found["precision"]["value"]
    assert found["precision"]["ci95"] == pytest.approx(1.96 * (share * (1 - share) / 200) ** 0.5, rel=0.4)
    plain = compute_metrics(samples, reference, every)
    assert all(plain[name]["value"] == found[name]["value"] for name in every)
    statistics = {"features": gaussian(reference.features)}
    assert compute_metrics(samples, statistics, ["fid"])["fid"] == pytest.approx(plain["fid"])
    # Recall is a mean over reference images: those are redrawn.
    share = found["recall"]["value"]
    assert found["recall"]["ci95"] == pytest.approx(1.96 * (share * (1 - share) / 50) ** 0.5, rel=0.4)
    with pytest.raises(ValueError, match="none or at least 2"):
        compute_metrics(samples, reference, ["fid"], bootstrap=1)
    for metrics, other, message in (
        (["fidd"], reference, "no metric 'fidd'; choose of fid"),
        (["fid"], features(110, extractor="b"), "seen by"),
        (["kid"], statistics, "not enough"),
        (["sfid"], statistics, "no statistics for sfid"),
    ):
        with pytest.raises(ValueError, match=message):
            compute_metrics(samples, other, metrics)
    with pytest.raises(ValueError, match="sfid needs `spatial`"):
        compute_metrics(Features(samples.features, None, None, {"name": "a"}), reference, ["sfid"])


@pytest.fixture
def pictures(tmp_path):
    """The same twelve pictures as a folder and as an npz."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(pixels):
        PILImage.fromarray(image).save(tmp_path / "folder" / f"{index:03d}.png")
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return tmp_path, pixels


def test_sources_hold_the_same_images(pictures, workspace):
    folder, pixels = pictures
    sources = [ImageSource(folder / "folder"), ImageSource(folder / "images.npz")]
    for source in sources:
        found = torch.cat(list(source.batches(5)))
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), pixels)
    assert sources[0].digest() == sources[1].digest()
    assert torch.cat(list(ImageSource(workspace / "data").batches(3))).shape == (8, 3, 32, 32)


def test_classes_of_samples_are_those_of_the_recipe(pictures):
    folder, pixels = pictures
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


def test_bad_sources_are_named(pictures):
    folder, pixels = pictures
    content = (folder / "images.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    np.savez(folder / "float.npz", arr_0=pixels.astype(np.float32))
    np.savez(folder / "other.npz", images=pixels)
    np.savez(folder / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (folder / "flipped.npz").write_bytes(flipped)
    np.savez(folder / "none.npz", arr_0=pixels[:0])
    bad = {"cut": "no npz", "float": "must be uint8", "missing": "no npz", "flipped": "CRC", "none": "no images"}
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
    for name in ("shape", "words"):
        with pytest.raises(ValueError, match=f"{name}.npz can't be used"):
            reference_statistics(folder / f"{name}.npz")
    assert reference_statistics(folder / "images.npz") is None
    few = GaussianStatistics.from_moments(torch.zeros(12), torch.cov(draw(5).T))
    with pytest.warns(UserWarning, match="reference"):  # the rank of a covariance tells of how few images it is
        frechet_distance(gaussian(draw(50)), few)
    PILImage.new("RGB", (8, 8)).save(folder / "folder" / "999.png")
    with pytest.raises(ValueError, match="999.png.*another size: pass --resolution"):
        list(ImageSource(folder / "folder").batches())
    cropped = torch.cat(list(ImageSource(folder / "folder", resolution=8).batches()))
    assert cropped.shape == (13, 3, 8, 8)
    assert torch.equal(cropped[0], to_tensor(center_crop(PILImage.fromarray(pixels[0]), 8)))
    save_file({"features": draw(4)}, folder / "words.safetensors", metadata={"extractor": "{"})
    for name in ("images.npz", "words.safetensors"):
        with pytest.raises(ValueError, match=f"{name} can't be read as features"):
            Features.load(folder / name)


def run_script(*arguments, env=None):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    if env is None:
        return run_forked(command)
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_the_command_and_its_cache(pictures):
    folder, _ = pictures
    flags = ("--metrics", "fid,kid,precision", "--bootstrap", 2, "--cache_dir", folder / "cache")
    result = run_script("--samples", folder / "folder", "--reference", folder / "images.npz", *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert abs(found["fid"]["value"]) < 1e-2  # the same images
    assert found["precision"]["value"] == 1
    assert found["recipe"]["extractor"]["resize"].startswith("112×112, bicubic, antialias")
    (cached,) = (folder / "cache").iterdir()  # one set of images, seen once
    flags = ("--feature_extractor", "precomputed", "--metrics", "fid", "--bootstrap", 0)
    bad = run_script("--samples", cached, "--reference", folder / "images.npz", *flags)
    assert bad.returncode == 2
    assert "images.npz" in bad.stderr


def test_statistics_in_the_format_of_adm(pictures):
    """Saved, read again in place of the images, and refused where another extractor made them."""
    folder, _ = pictures
    flags = ("--metrics", "fid,sfid", "--bootstrap", 0, "--cache_dir", folder / "cache")
    saved = folder / "reference.npz"
    command = ("--samples", folder / "images.npz", "--reference")
    run_script(*command, folder / "folder", *flags, "--save_statistics", saved)
    with np.load(saved) as arrays:
        assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s", "count", "extractor"}
        assert arrays["sigma"].shape == (1280, 1280)
        theirs = {name: arrays[name] for name in ("mu", "sigma")}
    found = json.loads(run_script(*command, saved, *flags).stdout)
    assert abs(found["fid"]["value"]) < 1e-2
    assert abs(found["sfid"]["value"]) < 1e-2
    statistics, extractor = reference_statistics(saved)
    assert statistics["features"].count == 12
    assert extractor["name"] == "efficientnet-lite0"
    np.savez(folder / "adm.npz", **theirs)
    np.savez(folder / "other.npz", **theirs, extractor=np.array(json.dumps(extractor | {"resize": "64x64"})))
    np.savez(folder / "both.npz", arr_0=np.load(folder / "images.npz")["arr_0"], mu=np.zeros(7), sigma=np.eye(7))
    for name, message in (("adm", "inception (the file names none"), ("other", "64x64")):
        bad = run_script(*command, folder / f"{name}.npz", *flags)
        assert bad.returncode == 2
        assert f"{name}.npz" in bad.stderr
        assert message in bad.stderr
    both = run_script(*command, folder / "both.npz", *flags)  # as ADM's own: statistics of Inception, images for any
    assert abs(json.loads(both.stdout)["fid"]["value"]) < 1e-2
    cached = next(path for path in (folder / "cache").iterdir())  # the same of features computed elsewhere
    flags = ("--feature_extractor", "precomputed", "--metrics", "fid", "--bootstrap", 0)
    assert run_script("--samples", cached, "--reference", saved, *flags).returncode == 0
    bad = run_script("--samples", cached, "--reference", folder / "other.npz", *flags)
    assert bad.returncode == 2
    assert "64x64" in bad.stderr
    bad = run_script("--samples", cached, "--reference", saved, *flags, "--save_statistics", folder / "again.npz")
    assert bad.returncode == 2
    assert "a file of statistics already" in bad.stderr


def test_images_beside_statistics_give_what_statistics_cannot(pictures):
    """As in ADM's reference batches: distances by the statistics, precision by the images."""
    folder, pixels = pictures
    flags = ("--bootstrap", 0, "--cache_dir", folder / "cache")
    command = ("--samples", folder / "images.npz", "--reference")
    run_script(*command, folder / "folder", *flags, "--metrics", "fid", "--save_statistics", folder / "reference.npz")
    with np.load(folder / "reference.npz") as arrays:
        moved = {name: arrays[name] for name in arrays} | {"mu": arrays["mu"] + 1}
    np.savez(folder / "both.npz", arr_0=pixels, **moved)
    found = json.loads(run_script(*command, folder / "both.npz", *flags, "--metrics", "precision,fid").stdout)
    assert list(found)[:2] == ["precision", "fid"]
    assert found["precision"]["value"] == 1
    assert found["fid"]["value"] == pytest.approx(1280, rel=1e-3)  # 1² in each of 1280 channels


def test_figures_go_into_the_card_with_their_recipe(pictures):
    folder, _ = pictures
    DiTClassCondPipeline(
        tiny_transformer(num_classes=2, learn_sigma=False), make_scheduler("flow_euler"), tiny_vae(), {0: "a", 1: "b"}
    ).save_pretrained(folder / "pipe")
    Features(draw(40), None, None, {"name": str(folder / "dinov2")}).save(folder / "a.safetensors")
    Features(draw(50, seed=1), None, None, {"name": str(folder / "dinov2")}).save(folder / "b.safetensors")
    flags = ("--feature_extractor", "precomputed", "--metrics", "fid,kid", "--bootstrap", 0)
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
    copies = found["nearest training image"]
    assert copies["share of suspects"] == 1  # the samples are the training images
    assert "count" in found["training images"]
    assert copies["nearest"][0] == {"sample": 0, "training": 0, "distance": 0.0}
    assert copies["median of the reference"] > 0
    local = ModelCard.load(folder / "pipe" / "README.md")
    for card in (local, ModelCard(published)):
        held_out = [result for result in card.data.eval_results if result.dataset_name == "held-out images"]
        results = {result.metric_type: result for result in held_out}
        assert results["fid"].metric_value == round(found["fid"]["value"], 4)
        assert results["kid"].metric_args["num_reference"] == 50
        assert results["kid"].metric_args["samples"] == "a.safetensors"
        assert str(folder) not in card.content
        assert "Fréchet distance (dinov2)" in card.text
    assert len(local.data.eval_results) == 4  # of two references


def test_inception_asks_for_its_weights():
    with pytest.raises(ValueError, match="--extractor_weights"):
        load_extractor("inception")
