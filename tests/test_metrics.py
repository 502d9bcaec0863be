"""Metrics against torch-fidelity, closed forms, scipy and numpy; the table of metrics; independence of the order of
images."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from dit_hf.evaluation import metrics as table
from dit_hf.evaluation.extractors import Features
from dit_hf.evaluation.frechet import frechet_distance
from dit_hf.evaluation.frechet_ratio import mean_ratio
from dit_hf.evaluation.inception_score import inception_score
from dit_hf.evaluation.kernel_distance import kernel_distance
from dit_hf.evaluation.metrics import METRICS, Available, Metric, compute_metrics, default_metrics
from dit_hf.evaluation.monge_distance import monge_distance
from dit_hf.evaluation.order import content_order
from dit_hf.evaluation.pairs import nearest_neighbours
from dit_hf.evaluation.precision_recall import precision_recall
from dit_hf.evaluation.reference import ReferenceStatistics
from dit_hf.evaluation.statistics import GaussianStatistics, gaussian
from dit_hf.evaluation.training_images import evaluate, matched_training_images


def random_features(count, dim=12, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + shift


# What torch-fidelity's functions of features (main branch, commit 5e211a9, 11 May 2026; *_features_to_metric and
# fid_statistics_to_metric) give for the two sets below: KID of one subset of all images, Inception Score of one split,
# the rest at its defaults. Its MIND is computed in float32, its precision and recall are averaged in float32.
TORCH_FIDELITY = {
    "fid": 2.2364678548457917,
    "kid": 0.2884146799530414,
    "is": 1.742566469944769,
    "mind": 5.880242228507996,
    "precision": 0.476666659116745,
    "recall": 0.9300000071525574,
}


def test_metrics_are_torch_fidelitys():
    first, second = (np.random.RandomState(seed).standard_normal((300, 16)) for seed in (0, 1))
    samples, reference = (
        Features(part, part, part, {"name": "inception"})
        for part in map(torch.from_numpy, (first * 1.2 + 0.3, second))
    )
    names = [*TORCH_FIDELITY, "sfid"]
    names.remove("is")
    found = {name: result["value"] for name, result in compute_metrics(samples, reference, names).items()}
    assert found.pop("sfid") == found["fid"]  # one function, of other features
    found["is"] = inception_score(samples.logits, splits=1)[0]
    assert found == pytest.approx(TORCH_FIDELITY, rel=1e-6)


def test_monge_distance_is_numpys(monkeypatch):
    """Sets of different sizes: each image is repeated until they are equally many; all parts and blocks count."""
    samples, reference = random_features(14, dim=5).numpy(), random_features(8, dim=5, seed=1, shift=0.4).numpy()
    directions = torch.randn(1000, 5, generator=torch.Generator().manual_seed(2020)).double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sorted_sets = [np.sort(part @ directions.T, axis=0) for part in (samples, reference)]
    gaps = np.repeat(sorted_sets[0], 8, axis=0) - np.repeat(sorted_sets[1], 14, axis=0)
    monkeypatch.setattr("dit_hf.evaluation.pairs.BLOCK", 5)
    found = monge_distance(torch.from_numpy(samples), torch.from_numpy(reference))
    assert found == pytest.approx(3 * 5 * (gaps**2).mean(), rel=1e-6)
    same = monge_distance(torch.from_numpy(samples), torch.from_numpy(np.repeat(samples, 3, axis=0)))
    assert same == pytest.approx(0, abs=1e-12)


def test_distance_of_known_gaussians():
    """Diagonal covariances: |m|² + Σ (σ - σ')²."""
    first, second = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([9.0, 4.0, 1.0])
    mean = torch.tensor([1.0, -2.0, 0.5])
    statistics = [GaussianStatistics.from_moments(mean, first.diag())]
    statistics.append(GaussianStatistics.from_moments(torch.zeros(3), second.diag()))
    found = frechet_distance(*statistics)
    assert found == pytest.approx(1 + 4 + 0.25 + (1 - 3) ** 2 + 0 + (0.5 - 1) ** 2, rel=1e-12)


def test_distance_is_scipys():
    samples, reference = random_features(200), random_features(150, seed=1, shift=0.3)
    covariances = [np.cov(part.numpy(), rowvar=False) for part in (samples, reference)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = (samples.mean(0) - reference.mean(0)).square().sum().item()
    expected = shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root)
    assert frechet_distance(gaussian(samples), gaussian(reference)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-6)


def test_distance_with_few_images_is_exact_and_warns():
    """tr (C C')^½ is the sum of singular values of the cross-product of centred features."""
    samples, reference = random_features(8, dim=30), random_features(10, dim=30, seed=1)
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
    features = random_features(101) + 1e4  # a large mean would cost raw sums of squares their digits
    whole = gaussian(features)
    batches = GaussianStatistics(12)
    for batch in features.flip(0).split(7):
        batches.update(batch)
    assert batches.count == 101
    torch.testing.assert_close(batches.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(batches.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9)


def test_fifty_thousand_images_fit_in_two_gigabytes():
    """Statistics take features a batch at a time, and metrics of pairs a block at a time."""
    code = """
import torch
from dit_hf.evaluation.pairs import nearest_neighbours
from dit_hf.evaluation.statistics import GaussianStatistics
statistics = GaussianStatistics(2048)
features = torch.randn(50_000, 2048)
for batch in features.split(5000):
    statistics.update(batch)
distances, indices = nearest_neighbours(features[:1100], features)
assert statistics.count == 50_000 and indices.tolist() == list(range(1100)) and (distances == 0).all()
# Not `ru_maxrss`, which begins with the memory of the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 2**20)
"""
    peak = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert peak < 2


def test_bad_statistics_are_named():
    with pytest.raises(ValueError, match=r"shape \(3, 4\).*\(images, 12\)"):
        GaussianStatistics(12).update(torch.zeros(3, 4))
    features = random_features(5)
    features[3, 2] = float("nan")
    with pytest.raises(ValueError, match="image 3 are not finite"):
        gaussian(features)
    with pytest.raises(ValueError, match="at least 2 images; there are 1"):
        _ = gaussian(random_features(1)).covariance
    with pytest.raises(ValueError, match=r"shape \(5,\).*\(images, channels\)"):
        gaussian(random_features(5)[:, 0])
    with pytest.raises(ValueError, match="different extractors"):
        frechet_distance(gaussian(random_features(50)), gaussian(random_features(50, dim=8)))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        GaussianStatistics.from_moments(torch.zeros(2), torch.diag(torch.tensor([4.0, -1.0]))).root()


def test_inception_score_is_numpys():
    logits = 3 * torch.randn(53, 10, generator=torch.Generator().manual_seed(0))
    shuffled = logits[content_order(logits)]
    scores = []
    for index in range(10):
        part = shuffled.double().numpy()[index * 53 // 10 : (index + 1) * 53 // 10]
        probabilities = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        ratio = np.log(probabilities) - np.log(probabilities.mean(0))
        scores.append(np.exp((probabilities * ratio).sum(1).mean()))
    mean, std = inception_score(logits)
    assert (mean, std) == (pytest.approx(np.mean(scores), rel=1e-9), pytest.approx(np.std(scores), rel=1e-9))
    sure = 1000 * torch.nn.functional.one_hot(torch.arange(100) % 10, 10).float()
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-9)  # ten classes, each image certain
    assert inception_score(torch.zeros(20, 10))[0] == pytest.approx(1, rel=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        inception_score(torch.full((20, 10), float("nan")))
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(logits[:5])


def test_kernel_distance_is_the_double_sum():
    samples, reference = random_features(9, dim=4).numpy(), random_features(7, dim=4, seed=1, shift=0.2).numpy()

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
    samples, reference = random_features(6, dim=4), random_features(5, dim=4, seed=1)
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
    samples, reference = random_features(40), random_features(33, seed=1)
    whole = kernel_distance(samples, reference)
    monkeypatch.setattr("dit_hf.evaluation.pairs.BLOCK", 7)
    assert kernel_distance(samples, reference) == pytest.approx(whole, rel=1e-9)


def test_precision_and_recall_are_numpys(monkeypatch):
    samples, reference = random_features(31, dim=3), random_features(27, dim=3, seed=1, shift=1.0)
    a, b = samples.numpy(), reference.numpy()
    to_a, to_b, between = (np.linalg.norm(x[:, None] - y[None], axis=2) for x, y in ((a, a), (b, b), (a, b)))
    radius_a, radius_b = np.sort(to_a, axis=1)[:, 3], np.sort(to_b, axis=1)[:, 3]
    expected = {
        "precision": (between <= radius_b[None]).any(1).mean(),
        "recall": (between <= radius_a[:, None]).any(0).mean(),
        "density": (between <= radius_b[None]).sum() / (3 * len(a)),
        "coverage": (between <= radius_b[None]).any(0).mean(),
    }
    monkeypatch.setattr("dit_hf.evaluation.pairs.BLOCK", 10)
    found = precision_recall(samples, reference)
    assert {name: values.mean().item() for name, values in found.items()} == pytest.approx(expected)
    assert 0 < expected["precision"] < 1
    same = {name: values.mean().item() for name, values in precision_recall(samples, samples).items()}
    in_balls = (to_a <= radius_a[None]).sum() / (3 * len(a))  # ties: each image is on the rim of its neighbours' balls
    assert same == {"precision": 1, "recall": 1, "coverage": 1, "density": pytest.approx(in_balls, rel=1e-12)}
    with pytest.raises(ValueError, match="more than 3 images; there are 31 and 3"):
        precision_recall(samples, reference[:3])


@pytest.mark.parametrize("metric", [kernel_distance, monge_distance, precision_recall, nearest_neighbours])
def test_metrics_of_pairs_name_bad_sets(metric):
    bad = random_features(9)
    bad[4, 2] = float("inf")
    for sets, message in (
        ((random_features(9), random_features(9, dim=8)), "12 feature channels, the reference 8"),
        ((bad, random_features(9)), r"\(samples\) are not finite"),
        ((random_features(9), bad), r"\(reference\) are not finite"),
        ((random_features(1), random_features(9)), r"\(samples\).*at least 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(*sets)


def test_copies_of_training_images_are_found(monkeypatch):
    monkeypatch.setattr("dit_hf.evaluation.pairs.BLOCK", 10)
    training = random_features(50)
    distances, indices = nearest_neighbours(torch.stack([training[17], training[4] + 0.01]), training)
    assert indices.tolist() == [17, 4]
    assert distances[0] == 0 < distances[1]


def features(count, seed=0, shift=0.0, extractor="a", **options):
    parts = (
        random_features(count, seed=seed, shift=shift),
        random_features(count, 5, seed),
        random_features(count, 6, seed),
    )
    return Features(*parts, {"name": extractor}, **options)


def of(dataset):
    """Mean and covariance alone, as in ADM's files."""
    return ReferenceStatistics({"features": gaussian(dataset.features)}, dataset.extractor, dataset.image_size, False)


def test_named_metrics_and_their_intervals():
    samples, reference = features(200), features(50, seed=1, shift=0.2)
    every = ("fd_a", "sfd_a", "is", "kid", "precision", "recall", "density", "coverage")
    found = compute_metrics(samples, reference, every, bootstrap=20)
    assert list(found) == list(every)
    assert all(result["ci95"] > 0 for result in found.values())
    assert found["is"]["std"] > 0
    fraction = found["precision"]["value"]
    assert found["precision"]["ci95"] == pytest.approx(1.96 * (fraction * (1 - fraction) / 200) ** 0.5, rel=0.4)
    plain = compute_metrics(samples, reference, every)
    assert all(plain[name]["value"] == found[name]["value"] for name in every)
    alone = compute_metrics(samples, None, ["fd_a"], statistics=of(reference))
    assert alone["fd_a"] == pytest.approx(plain["fd_a"])
    # Recall is a mean over reference images: those are redrawn.
    fraction = found["recall"]["value"]
    assert found["recall"]["ci95"] == pytest.approx(1.96 * (fraction * (1 - fraction) / 50) ** 0.5, rel=0.4)


def test_metrics_that_cannot_be_computed_are_refused():
    samples, reference = features(20), features(20, seed=1)
    for metric in ("fidd", "fd", "sfid2", "fd_b", "", "fd_inception"):  # no name falls through to another metric
        with pytest.raises(ValueError, match=f"no metric '{metric}'; with 'a' choose from fd_a, sfd_a, is, kid, prec"):
            compute_metrics(samples, reference, [metric])
    with pytest.raises(ValueError, match="none or at least 2"):
        compute_metrics(samples, reference, ["fd_a"], bootstrap=1)
    with pytest.raises(ValueError, match=r"features are of \{'name': 'a'\}, the reference of \{'name': 'b'\}"):
        compute_metrics(samples, features(20, extractor="b"), ["fd_a"])
    with pytest.raises(ValueError, match="the training of"):
        compute_metrics(samples, reference, ["fd_a"], training=features(20, extractor="b"))
    with pytest.raises(ValueError, match="kid needs the reference's images.*statistics are not enough"):
        compute_metrics(samples, None, ["kid"], statistics=of(reference))
    with pytest.raises(ValueError, match="sfd_a needs statistics of `spatial`"):
        compute_metrics(samples, None, ["sfd_a"], statistics=of(reference))
    with pytest.raises(ValueError, match="accuracy needs training images"):
        compute_metrics(samples, reference, ["accuracy"])
    with pytest.raises(ValueError, match="accuracy needs the class of every image"):
        compute_metrics(samples, reference, ["accuracy"], training=reference)
    with pytest.raises(ValueError, match="nearest_accuracy needs the class of every image of .* of the reference"):
        compute_metrics(samples, reference, ["nearest_accuracy"])
    with pytest.raises(ValueError, match="sfd_a needs `spatial`, which the extractor does not give"):
        compute_metrics(Features(samples.features, None, None, {"name": "a"}), reference, ["sfd_a"])
    with pytest.raises(ValueError, match="sfd_a needs `spatial` of every set; one has only features"):
        compute_metrics(samples, Features(reference.features, None, None, {"name": "a"}), ["sfd_a"])


def test_the_nearest_reference_image_decides():
    """Three samples of four stand beside an image of their class; a class without an image is an error."""
    corners = 5.0 * torch.eye(4)
    samples = Features(corners + 0.1, None, None, {"name": "a"}, labels=["cat", "dog", "cat", "sloth"])
    reference = Features(corners.flip(0), None, None, {"name": "a"}, labels=["sloth", "dog", "dog", "cat"])
    found = compute_metrics(samples, reference, ["nearest_accuracy"], training=reference)
    assert found["nearest_accuracy"]["value"] == 0.75
    unlabelled = Features(corners, None, None, {"name": "a"})
    assert evaluate(samples, reference, ["nearest_accuracy"], training=unlabelled)["nearest_accuracy"]["value"] == 0.75
    reference.labels = ["cat", "dog", "dog", "cat"]
    with pytest.raises(ValueError, match="No reference image is of class 'sloth'"):
        compute_metrics(samples, reference, ["nearest_accuracy"])


def test_the_ratio_of_distances_is_that_of_real_images():
    """FD(samples, training) over FD(reference, training); statistics of the reference are enough."""
    samples, reference, training = (features(60, seed, shift) for seed, shift in ((0, 0.5), (1, 0.0), (2, 0.1)))
    expected = frechet_distance(samples.features, training.features)
    expected /= frechet_distance(reference.features, training.features)
    found = compute_metrics(samples, reference, ["fdr"], bootstrap=2, training=training)["fdr"]
    assert found["value"] == pytest.approx(expected, rel=1e-9)
    assert found["ci95"] > 0
    alone = compute_metrics(samples, None, ["fdr"], training=training, statistics=of(reference))
    assert alone["fdr"]["value"] == pytest.approx(expected, rel=1e-9)
    assert compute_metrics(reference, reference, ["fdr"], training=training)["fdr"]["value"] == pytest.approx(1)
    assert "fdr" not in evaluate(samples, reference, ["fdr"], training=training)["training images"]
    with pytest.raises(ValueError, match="fdr needs training images"):
        compute_metrics(samples, reference, ["fdr"])
    with pytest.raises(ValueError, match="reference and the training images are the same"):
        compute_metrics(samples, training, ["fdr"], training=training)


def test_the_mean_ratio_is_of_several_extractors():
    def result(extractor, value, **recipe):
        recipe = {"extractor": {"name": extractor}, "samples": "s.npz"} | recipe
        return {"fdr": {"value": value}, "recipe": recipe}

    found = mean_ratio([result("a", 2.0), result("b", 5.0), result("c", 5.0)])
    assert found == {"mean": 4.0, "extractors": {"a": 2.0, "b": 5.0, "c": 5.0}}
    for second, message in (
        (result("a", 2.0), "Results of a, a; a mean ratio takes each extractor once"),
        (result("b", 2.0, samples="other.npz"), "Results of a, b differ in `samples`"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_ratio([result("a", 1.0), second])


def test_sets_of_different_image_sizes_are_refused():
    samples, reference = features(20, image_size=(64, 64)), features(20, seed=1, image_size=(256, 256))
    for sets in ({"reference": reference}, {"reference": None, "statistics": of(reference)}):
        with pytest.raises(
            ValueError,
            match=r"different sizes, 64×64 pixels \(samples\) and 256×256 \(reference.*\); pass --resolution",
        ):
            compute_metrics(samples, metrics=["fd_a"], **sets)
    with pytest.raises(ValueError, match=r"256×256 \(training\)"):
        compute_metrics(samples, samples, ["fd_a"], training=reference)


def test_published_names_are_inceptions_alone():
    names = {"fid": "fd", "sfid": "sfd", "mind": "mind"}
    inception, other = (features(20, extractor=name) for name in ("inception", "facebook/dinov2-base"))
    assert list(compute_metrics(inception, inception, [*names, "recall"])) == [*names, "recall"]
    for published, name in names.items():
        wanted = f"{name}_dinov2_base"
        assert list(compute_metrics(other, other, [wanted])) == [wanted]
        with pytest.raises(ValueError, match=f"'{published}' is .* of Inception's features; of .* called '{wanted}'"):
            compute_metrics(other, other, [published])
    everything = Available(inception.parts, True, (), True)
    assert default_metrics("inception", everything) == ["fid", "sfid", "is", "kid", "precision", "recall"]
    pooled = Available(["features"], True, (), False)
    assert default_metrics("dinov2", pooled) == ["fd_dinov2", "kid", "precision", "recall"]
    assert default_metrics("inception", Available(inception.parts, False, ["features"], False)) == ["fid", "is"]


def test_no_metric_depends_on_the_order_of_images():
    """Sorted by class or shuffled, in either set: the same values and intervals. Inception Score was 8.65 or 38.9."""
    names = [f"class {index // 6}" for index in range(60)]
    sets = [features(60, seed, 0.3 * seed, labels=names) for seed in range(3)]
    for part in sets:  # sure of a class each, sorted by class
        part.logits = (
            8.0 * torch.nn.functional.one_hot(torch.arange(60) // 6, 10) + random_features(60, 10, seed=5).sigmoid()
        )
    permutation = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    permuted = [part.select(permutation) for part in sets]
    every = [metric.full_name("a") for metric in METRICS]
    first, second = (
        compute_metrics(samples, reference, every, bootstrap=3, training=training)
        for samples, reference, training in (sets, permuted)
    )
    assert set(first) == {
        *("fd_a", "sfd_a", "is", "kid", "precision", "recall", "density", "coverage", "mind_a", "fdr", "accuracy"),
        "nearest_accuracy",
    }
    for name in every:
        assert first[name] == pytest.approx(second[name], rel=1e-9), name
    assert first["is"]["value"] > 3
    few = [part.select(torch.arange(0, 60, 6)) for part in sets]
    chosen = [matched_training_images(few[0], training).features for training in (sets[2], permuted[2])]
    torch.testing.assert_close(*chosen, rtol=0, atol=0)


def test_inception_score_of_samples_sorted_by_class():
    """10 images of each of 100 classes: 8.65 in contiguous splits of the sorted set, 38.9 shuffled."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 100, generator=generator)
    logits[torch.arange(1000), torch.arange(100).repeat_interleave(10)] += 8
    score = inception_score(logits)[0]
    assert 37 < score < 41
    assert inception_score(logits[torch.randperm(1000, generator=generator)])[0] == pytest.approx(score, rel=1e-9)


def test_a_new_metric_is_a_function_and_a_row(monkeypatch):
    """One number a set, and one an image; both get intervals, names and defaults like any other."""
    mean = Metric("drift", "shift of the mean", lambda samples, reference: (samples.mean() - reference.mean()).item())
    norm = Metric("norm", "norm", lambda samples: samples.norm(dim=1), "spatial", None, per_image=True, default=True)
    monkeypatch.setattr(table, "METRICS", [*METRICS, mean, norm])
    samples, reference = features(30), features(40, seed=1, shift=2.0)
    found = compute_metrics(samples, reference, ["drift", "norm"], bootstrap=4)
    assert found["drift"]["value"] == pytest.approx((samples.features.mean() - reference.features.mean()).item())
    assert found["norm"]["value"] == pytest.approx(samples.spatial.norm(dim=1).mean().item())
    assert found["drift"]["ci95"] > 0 < found["norm"]["ci95"]
    assert default_metrics("a", Available(samples.parts, True, (), False))[-1] == "norm"


WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("datasets", "transformers", "peft", "efficientnet_lite_pytorch", "sklearn"))
import torch
from dit_hf.evaluation.frechet import frechet_distance
from dit_hf.evaluation.extractors import Features, load_extractor
from dit_hf.evaluation.metrics import compute_metrics
features = torch.arange(36.0).reshape(12, 3).sin()
print(frechet_distance(features + 1, features))
sets = [Features(part, None, None, {"name": "mine"}) for part in (features, features + 1)]
print(compute_metrics(*sets, ["fd_mine", "kid", "precision"])["fd_mine"]["value"])
for use in (lambda: load_extractor("efficientnet-lite0"), lambda: load_extractor("facebook/dinov2-base"),
            lambda: __import__("dit_hf.evaluation.accuracy").evaluation.accuracy.train_probe(features, ["a"] * 12),
            lambda: __import__("dit_hf.evaluation.sources").evaluation.sources.ImageSource("outputs/none")):
    try:
        use()
    except (ImportError, ValueError) as error:
        print(error)
"""


def test_features_are_compared_without_extras():
    """FID of two tensors and the table need no extras; what reads datasets or runs extractors names its own."""
    result = subprocess.run([sys.executable, "-c", WITHOUT], check=True, capture_output=True, text=True)
    *distances, network, vision, probe, sources = result.stdout.splitlines()
    assert [float(distance) for distance in distances] == pytest.approx([3.0, 3.0])
    assert network == "dit_hf.evaluation.features needs efficientnet_lite_pytorch: pip install 'dit_hf[evaluate]'."
    assert vision == "dit_hf.evaluation.extractors needs transformers: pip install 'dit_hf[evaluate]'."
    assert probe == "dit_hf.evaluation.accuracy needs scikit-learn: pip install 'dit_hf[evaluate]'."
    assert sources == "outputs/none is read as a dataset, which needs datasets: pip install 'dit_hf[evaluate]'."
