"""Named figures of a sample set against a reference, with confidence intervals.

Shapes: `N` samples, `M` reference images, `D` feature channels.
"""

from collections.abc import Callable, Sequence

import torch

from ..seeds import seeded_generator
from .extractors import Features
from .frechet import frechet_distance
from .sets import inception_score, kernel_distance, precision_recall
from .statistics import GaussianStatistics


# What a figure is computed from; precision and its like share their distances.
NEIGHBOURS = ("precision", "recall", "density", "coverage")
METRICS = ("fid", "sfid", "is", "kid", *NEIGHBOURS)


def compute_metrics(
    samples: Features,
    reference: Features | dict[str, GaussianStatistics],
    metrics: Sequence[str],
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """
    Figures of a sample set.

    Args:
        samples (`Features`): Of the samples.
        reference (`Features`, or `dict[str, GaussianStatistics]`):
            Of the reference by the same extractor, or the statistics that ADM's reference files hold, which are enough
            for `fid` and `sfid`.
        metrics (`Sequence[str]`): Of `fid`, `sfid`, `is`, `kid`, `precision`, `recall`, `density`, `coverage`.
        bootstrap (`int`, defaults to 0): Redrawn sets for the confidence intervals; none with 0.
        seed (`int`, defaults to 0): Of the redrawn sets.

    Returns:
        `dict[str, dict[str, float]]`: for each metric its `value`, and with a bootstrap `ci95`, half the width of the 95 %
        interval: 1.96 standard deviations over sets redrawn with replacement. `is` has `std` over its splits.

    Raises:
        ValueError: if a metric is unknown, needs what the extractor does not give, or the extractors differ.
    """
    check_metrics(metrics, bootstrap)
    if isinstance(reference, Features) and samples.extractor != reference.extractor:
        raise ValueError(f"The samples were seen by {samples.extractor}, the reference by {reference.extractor}.")
    found: dict[str, dict[str, float]] = {}
    if chosen := [name for name in NEIGHBOURS if name in metrics]:
        images = precision_recall(samples.features, _of(reference, "precision").features)
        for name in chosen:
            values = images[name]
            found[name] = {"value": values.mean().item()}
            found[name] |= _interval(
                lambda rows, values=values: values[rows].mean().item(), len(values), bootstrap, seed
            )
    for name in metrics:
        if name not in NEIGHBOURS:
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
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"The bootstrap has {bootstrap} sets; it takes none or at least 2.")


def _figure(name, samples, reference) -> tuple[Callable[[torch.Tensor], float], int]:
    """A metric as a function of which samples count, and how many there are."""
    if name == "is":
        logits = _given(samples, "logits", name)
        return lambda rows: inception_score(logits[rows])[0], len(logits)
    if name == "kid":
        others = _of(reference, name).features
        return lambda rows: kernel_distance(samples.features[rows], others), len(samples.features)
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
