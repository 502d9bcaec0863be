"""Named figures of a sample set against a reference, with confidence intervals.

Shapes: `N` samples, `M` reference images, `D` feature channels.
"""

from collections.abc import Callable, Sequence

import torch

from ..seeds import seeded_generator
from .extractors import Features
from .frechet import frechet_distance
from .probe import right_classes, train_probe
from .sets import inception_score, kernel_distance, precision_recall
from .statistics import GaussianStatistics


# What a figure is computed from; precision and its like share their distances.
NEIGHBOURS = ("precision", "recall", "density", "coverage")
METRICS = ("fid", "sfid", "is", "kid", *NEIGHBOURS, "accuracy")


def compute_metrics(
    samples: Features,
    reference: Features | dict[str, GaussianStatistics],
    metrics: Sequence[str],
    bootstrap: int = 0,
    seed: int = 0,
    training: Features | None = None,
) -> dict[str, dict[str, float]]:
    """
    Figures of a sample set.

    Args:
        samples (`Features`): Of the samples.
        reference (`Features`, or `dict[str, GaussianStatistics]`):
            Of the reference by the same extractor, or the statistics that ADM's reference files hold, which are enough
            for `fid` and `sfid`.
        metrics (`Sequence[str]`):
            Of `fid`, `sfid`, `is`, `kid`, `precision`, `recall`, `density`, `coverage`, `accuracy`.
        bootstrap (`int`, defaults to 0): Redrawn sets for the confidence intervals; none with 0.
        seed (`int`, defaults to 0): Of the redrawn sets.
        training (`Features`, *optional*): With labels; `accuracy` is that of a linear probe on them.

    Returns:
        `dict[str, dict[str, float]]`: for each metric its `value`, and with a bootstrap `ci95`, half the width of the 95 %
        interval: 1.96 standard deviations over sets of samples redrawn with replacement; for `recall` and `coverage`, means
        over reference images, those are redrawn. `is` has `std` over its splits.

    Raises:
        ValueError: if a metric is unknown, needs what the extractor does not give, or the extractors differ.
    """
    check_metrics(metrics, bootstrap)
    if isinstance(reference, Features) and samples.extractor != reference.extractor:
        raise ValueError(f"The samples were seen by {samples.extractor}, the reference by {reference.extractor}.")
    found: dict[str, dict[str, float]] = {}
    for name, values in _image_by_image(metrics, samples, reference, training).items():
        interval = _interval(lambda rows, values=values: values[rows].mean().item(), len(values), bootstrap, seed)
        found[name] = {"value": values.mean().item()} | interval
    for name in metrics:
        if name not in found:
            figure, count = _figure(name, samples, reference)
            everything = torch.arange(count)
            found[name] = {"value": figure(everything)} | _interval(figure, count, bootstrap, seed)
    if "is" in metrics:
        found["is"]["std"] = inception_score(_given(samples, "logits", "is"))[1]
    return {name: found[name] for name in metrics}


def check_metrics(metrics: Sequence[str], bootstrap: int = 0) -> None:
    """
    What can be told before any image is looked at.

    Args:
        metrics (`Sequence[str]`): Names of metrics.
        bootstrap (`int`, defaults to 0): Redrawn sets.

    Raises:
        ValueError: if a metric is unknown, or one redrawn set is to have a spread.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"There is no metric {unknown[0]!r}; choose of {', '.join(METRICS)}.")
    if bootstrap < 0 or bootstrap == 1:  # one set has no spread
        raise ValueError(f"The bootstrap has {bootstrap} sets; it takes none or at least 2.")


def _image_by_image(metrics, samples, reference, training) -> dict[str, torch.Tensor]:
    """The metrics that are a mean over images: one number an image."""
    values = {}
    if chosen := [name for name in NEIGHBOURS if name in metrics]:
        images = precision_recall(samples.features, _of(reference, "precision").features)
        values = {name: images[name] for name in chosen}
    if "accuracy" in metrics:
        for name, features in (("samples", samples), ("training images", training)):
            if features is None or features.labels is None:
                raise ValueError(f"accuracy needs the classes of the {name}, which are not known.")
        if training.extractor != samples.extractor:
            raise ValueError(f"The samples were seen by {samples.extractor}, training by {training.extractor}.")
        probe = train_probe(training.features, training.labels)
        values["accuracy"] = right_classes(probe, samples.features, samples.labels)
    return values


def _figure(name, samples, reference) -> tuple[Callable[[torch.Tensor], float], int]:
    """A metric as a function of which samples count, and how many there are."""
    if name == "is":
        logits = _given(samples, "logits", name)
        return lambda rows: inception_score(logits[rows])[0], len(logits)
    if name == "kid":
        others = _of(reference, name).features
        count = len(samples.features)
        return lambda rows: kernel_distance(samples.features, others, rows.bincount(minlength=count)), count
    part = "features" if name == "fid" else "spatial"
    tensor = _given(samples, part, name)
    statistics = reference.get(part) if isinstance(reference, dict) else gaussian(_given(reference, part, name))
    if statistics is None:
        raise ValueError(f"The reference has no statistics for {name}.")
    return lambda rows: frechet_distance(gaussian(tensor[rows]), statistics), len(tensor)


def gaussian(features: torch.Tensor) -> GaussianStatistics:
    """
    Statistics of features.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Features.

    Returns:
        `GaussianStatistics`
    """
    statistics = GaussianStatistics(features.shape[1])
    for part in features.split(1024):
        statistics.update(part)
    return statistics


def _interval(figure, count, bootstrap, seed):
    if not bootstrap:
        return {}
    draws = [
        figure(torch.randint(count, (count,), generator=seeded_generator(seed, index))) for index in range(bootstrap)
    ]
    return {"ci95": 1.96 * torch.tensor(draws, dtype=torch.float64).std().item()}


def _given(features, part, name):
    tensor = getattr(features, part)
    if tensor is None:
        raise ValueError(f"{name} needs `{part}`, which the extractor {features.extractor.get('name')} does not give.")
    return tensor


def _of(reference, name):
    if isinstance(reference, dict):
        raise ValueError(f"{name} needs the reference's images or features; a file of statistics is not enough.")
    return reference
