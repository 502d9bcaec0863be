"""The table of metrics, and their computation with confidence intervals.

A new metric is a file with a function of features, and a row of `METRICS`.

Shapes: `N` samples, `M` reference or training images, `D` feature channels.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..seeds import seeded_generator
from .accuracy import class_accuracy, nearest_accuracy
from .extractors import INCEPTION, Features
from .frechet import frechet_distance
from .frechet_ratio import RATIO, frechet_ratio
from .inception_score import inception_score
from .kernel_distance import kernel_distance
from .monge_distance import DIRECTIONS, SEED, monge_distance
from .order import content_order
from .precision_recall import precision_recall
from .reference import ReferenceStatistics
from .statistics import gaussian


@dataclass(frozen=True)
class Metric:
    """
    A row of the table of metrics.

    Args:
        name (`str`): Its name on the command line, in results and on model cards.
        title (`str`): Its name as text.
        compute (`Callable`):
            Takes what the metric needs of the samples, then the same of what they are compared `against`: each a
            tensor `(images, channels)`, followed by the list of class names if `labels`. For `against="statistics"`
            the second is a `GaussianStatistics`, for `against="both"` the second and the third are. Returns a number,
            or a number and its standard deviation, or with `per_image` a tensor of one number per image, or a
            dictionary of such tensors by `name`: it is then called once for all rows that have it.
        needs (`str`, defaults to `"features"`):
            The field of `Features` it is computed from: `"features"`, `"spatial"` or `"logits"`.
        against (`str`, *optional*):
            `"reference"`, the reference's images, `"statistics"`, for which their mean and covariance are enough,
            `"training"`, the training images, `"both"`, the statistics of the reference and of the training images,
            or None.
        higher_is_better (`bool`, defaults to `True`): Direction.
        per_image (`bool`, defaults to `False`): Whether the metric is the mean of one number per image.
        labels (`bool`, defaults to `False`): Whether it needs the images' classes.
        default (`bool`, defaults to `False`): Whether the command computes it unless others are named.
        inception_name (`str`, *optional*):
            For metrics whose published values are those of Inception's features: what they are called. With another
            extractor they are called `{name}_{extractor}`.
        redrawn (`bool`, defaults to `False`): Whether `compute` takes `counts`, how often each sample was redrawn.
        settings (`str`, *optional*): What else the value depends on; part of the recipe.
        at_least (`int`, defaults to 2): Images that it needs of every set.
    """

    name: str
    title: str
    compute: Callable[..., Any]
    needs: str = "features"
    against: str | None = "reference"
    higher_is_better: bool = True
    per_image: bool = False
    labels: bool = False
    default: bool = False
    inception_name: str | None = None
    redrawn: bool = False
    settings: str | None = None
    at_least: int = 2

    def full_name(self, extractor: str) -> str:
        """Its name with an extractor: `fid` of Inception's features, `fd_dinov2_base` of `facebook/dinov2-base`'s."""
        if self.inception_name is None:
            return self.name
        if extractor == INCEPTION:
            return self.inception_name
        return f"{self.name}_{re.sub(r'[^0-9a-z]+', '_', Path(extractor).name.lower()).strip('_')}"


SPLITS = "10 splits of the images, shuffled by their content and seed 0"
BALLS = "k = 3"
# fmt: off
METRICS = [
    Metric("fd", "Fréchet distance", frechet_distance, against="statistics", higher_is_better=False, default=True,
           inception_name="fid"),
    Metric("sfd", "spatial Fréchet distance", frechet_distance, "spatial", "statistics", higher_is_better=False,
           default=True, inception_name="sfid"),
    Metric("is", "Inception Score", inception_score, "logits", None, default=True, settings=SPLITS,
           at_least=10),
    Metric("kid", "KID", kernel_distance, higher_is_better=False, default=True, redrawn=True,
           settings="cubic kernel, unbiased, all images"),
    Metric("precision", "precision", precision_recall, per_image=True, default=True, settings=BALLS, at_least=4),
    Metric("recall", "recall", precision_recall, per_image=True, default=True, settings=BALLS, at_least=4),
    Metric("density", "density", precision_recall, per_image=True, settings=BALLS, at_least=4),
    Metric("coverage", "coverage", precision_recall, per_image=True, settings=BALLS, at_least=4),
    Metric("mind", "Monge Inception Distance", monge_distance, higher_is_better=False, inception_name="mind",
           settings=f"{DIRECTIONS} directions of seed {SEED}, all images"),
    Metric(RATIO, "Fréchet distance ratio", frechet_ratio, against="both", higher_is_better=False,
           settings="FD(samples, training) / FD(reference, training)"),
    Metric("accuracy", "class accuracy of a linear probe", class_accuracy, against="training", per_image=True,
           labels=True, at_least=1),
    Metric("nearest_accuracy", "class accuracy of the nearest reference image", nearest_accuracy, per_image=True,
           labels=True),
]
# fmt: on


@dataclass(frozen=True)
class Available:
    """
    What there is to compute metrics of.

    Args:
        parts (`Collection[str]`): What the extractor gives: `"features"`, `"spatial"`, `"logits"`.
        reference (`bool`): Whether there are reference images.
        statistics (`Collection[str]`): The parts whose statistics the reference has.
        training (`bool`): Whether there are training images.
    """

    parts: Collection[str]
    reference: bool
    statistics: Collection[str]
    training: bool

    def missing(self, metric: Metric) -> str | None:
        """What a metric needs and there is not; None if there is all."""
        if metric.needs not in self.parts:
            return f"`{metric.needs}`, which the extractor does not give"
        if metric.against in ("training", "both") and not self.training:
            return "training images (--training)"
        if metric.against == "reference" and not self.reference:
            return "the reference's images or features; statistics are not enough"
        if metric.against in ("statistics", "both") and not self.reference and metric.needs not in self.statistics:
            return f"statistics of `{metric.needs}`, which the reference does not have"
        return None


def default_metrics(extractor: str, available: Available) -> list[str]:
    """
    What the command computes unless metrics are named.

    Args:
        extractor (`str`): Name of the extractor.
        available (`Available`): What there is to compute them of.

    Returns:
        `list[str]`: names of metrics.
    """
    return [row.full_name(extractor) for row in METRICS if row.default and available.missing(row) is None]


def full_names(names: Sequence[str], extractor: str) -> list[str]:
    """Names of metrics as results have them: `fd` becomes `fd_efficientnet_lite0`, for Inception's features `fid`."""
    short = {metric.name: metric.full_name(extractor) for metric in METRICS}
    return [short.get(name, name) for name in names]


def find_metrics(names: Sequence[str], extractor: str) -> list[Metric]:
    """
    Rows of the table by name.

    Args:
        names (`Sequence[str]`): Names of metrics.
        extractor (`str`): Name of the extractor whose features they are computed of.

    Returns:
        `list[Metric]`

    Raises:
        ValueError: if there is no such metric, or its name is that of another extractor's features.
    """
    rows = {metric.full_name(extractor): metric for metric in METRICS}
    of_inception = {metric.inception_name: metric for metric in METRICS}
    for name in names:
        if name not in rows and name in of_inception:
            metric = of_inception[name]
            raise ValueError(
                f"{name!r} is the {metric.title} of Inception's features; of {extractor!r} it is called "
                f"{metric.full_name(extractor)!r}."
            )
        if name not in rows:
            raise ValueError(f"There is no metric {name!r}; with {extractor!r} choose from {', '.join(rows)}.")
    return [rows[name] for name in names]


def check_metrics(names: Sequence[str], extractor: str, available: Available, bootstrap: int = 0) -> list[Metric]:
    """
    Checks that metrics can be computed, before any image is read.

    Args:
        names (`Sequence[str]`): Names of metrics.
        extractor (`str`): Name of the extractor.
        available (`Available`): What there is to compute them of.
        bootstrap (`int`, defaults to 0): Number of redrawn sets.

    Returns:
        `list[Metric]`: their rows.

    Raises:
        ValueError: if a metric is unknown or needs what there is not, or the number of redrawn sets is 1 or negative.
    """
    if bootstrap < 0 or bootstrap == 1:  # one set has no spread
        raise ValueError(f"The bootstrap has {bootstrap} sets; it takes none or at least 2.")
    rows = find_metrics(names, extractor)
    for name, metric in zip(names, rows, strict=True):
        if missing := available.missing(metric):
            raise ValueError(f"{name} needs {missing}.")
    return rows


def too_few_images(names: Sequence[str], extractor: str, counts: Mapping[str, int]) -> dict[str, str]:
    """
    Metrics that need more images than there are.

    Args:
        names (`Sequence[str]`): Names of metrics.
        extractor (`str`): Name of the extractor.
        counts (`Mapping[str, int]`): Images by set: `"samples"`, and where there are any `"reference"`.

    Returns:
        `dict[str, str]`: by name the reason.
    """
    reasons = {}
    for name, metric in zip(names, find_metrics(names, extractor), strict=True):
        sets = ("samples",) if metric.against in (None, "training") else ("samples", "reference")
        for set_ in sets:
            if counts.get(set_, metric.at_least) < metric.at_least:
                reasons[name] = f"needs at least {metric.at_least} images; there are {counts[set_]} ({set_})"
    return reasons


def compute_metrics(
    samples: Features,
    reference: Features | None,
    metrics: Sequence[str],
    bootstrap: int = 0,
    seed: int = 0,
    training: Features | None = None,
    statistics: ReferenceStatistics | None = None,
) -> dict[str, dict[str, float]]:
    """
    Metrics of a set of samples. They do not depend on the order of the images in any of the sets.

    Args:
        samples (`Features`): Of the samples.
        reference (`Features`, *optional*): Of the reference, by the same extractor.
        metrics (`Sequence[str]`): Names from `METRICS`, such as `"fid"` or `"fd_efficientnet_lite0"`, `"precision"`.
        bootstrap (`int`, defaults to 0): Redrawn sets for the confidence intervals; none with 0.
        seed (`int`, defaults to 0): Of the redrawn sets.
        training (`Features`, *optional*):
            Of the training images. `accuracy` also needs their labels, and trains a linear probe on them.
        statistics (`ReferenceStatistics`, *optional*):
            Of the reference, as ADM's reference files hold them; Fréchet distances take them rather than `reference`.

    Returns:
        `dict[str, dict[str, float]]`: for each metric its `value`, and with a bootstrap `ci95`, half the width of the
        95 % interval: 1.96 standard deviations over sets of samples redrawn with replacement; for `recall` and
        `coverage`, means over reference images, those are redrawn. Inception Score has `std` over its splits.

    Raises:
        ValueError: if a metric is unknown or needs what is not given, or the sets differ in extractor or image size.
    """
    extractor = samples.extractor["name"]
    parts = {} if statistics is None else statistics.parts
    available = Available(samples.parts, reference is not None, tuple(parts), training is not None)
    rows = check_metrics(metrics, extractor, available, bootstrap)
    for name, other in (("reference", reference), ("reference's statistics", statistics), ("training", training)):
        if other is not None:
            check_same_size(samples.image_size, name, other.image_size)
            if not other.is_of(samples.extractor):
                raise ValueError(f"The samples' features are of {samples.extractor}, the {name} of {other.extractor}.")
    named = {"samples": samples, "reference": reference, "training": training}
    # Each metric takes the part it needs in this order: whole copies of the sets would double the memory.
    sets = {name: (images, content_order(images.features)) for name, images in named.items() if images is not None}
    results: dict[str, dict[str, float]] = {}
    computed: dict[Any, Any] = {}
    for name, metric in zip(metrics, rows, strict=True):
        own = _arguments(name, metric, *sets["samples"])
        others = _others(name, metric, sets, parts)
        results[name] = _measure(metric, own, others, computed, bootstrap, seed)
    return results


def check_same_size(samples: tuple[int, int] | None, name: str, other: tuple[int, int] | None) -> None:
    """
    Refuses to compare images of different sizes: the extractor's resize would blur the one set and not the other.

    Args:
        samples (`tuple[int, int]`, *optional*): Height and width of the samples; None where they are not known.
        name (`str`): The other set, for the message.
        other (`tuple[int, int]`, *optional*): Its height and width.

    Raises:
        ValueError: if they differ.
    """
    if samples and other and samples != other:
        raise ValueError(
            f"The sets have images of different sizes, {samples[0]}×{samples[1]} pixels (samples) and {other[0]}×"
            f"{other[1]} ({name}); pass --resolution to crop both as training does."
        )


def _arguments(name, metric, images, order):
    """What a metric takes of a set of images, in the given order."""
    if metric.labels and images.labels is None:
        raise ValueError(f"{name} needs the class of every image of the samples and of the {metric.against}.")
    if metric.needs not in images.parts:
        raise ValueError(f"{name} needs `{metric.needs}` of every set; one has only {', '.join(images.parts)}.")
    arguments = [getattr(images, metric.needs)[order]]
    return [*arguments, [images.labels[row] for row in order.tolist()]] if metric.labels else arguments


def _others(name, metric, sets, statistics):
    """What a metric compares the samples against; the reference's own statistics rather than those of its images."""
    if metric.against is None:
        return []
    if metric.against not in ("statistics", "both"):
        return _arguments(name, metric, *sets[metric.against])
    first = statistics.get(metric.needs) or gaussian(*_arguments(name, metric, *sets["reference"]))
    if metric.against == "statistics":
        return [first]
    return [first, gaussian(*_arguments(name, metric, *sets["training"]))]


def _measure(metric, own, others, computed, bootstrap, seed):
    """A metric's value and interval; `computed` keeps what one function gives for several rows."""
    if metric.per_image:
        key = metric.compute, metric.needs, metric.against
        if key not in computed:
            computed[key] = metric.compute(*own, *others)
        values = computed[key][metric.name] if isinstance(computed[key], dict) else computed[key]
        found, count = {"value": values.mean().item()}, len(values)
    else:
        value = metric.compute(*own, *others)
        found = dict(zip(("value", "std"), value, strict=True)) if isinstance(value, tuple) else {"value": value}
        count = len(own[0])

    def redraw(index):
        rows = torch.randint(count, (count,), generator=seeded_generator(seed, index))
        if metric.per_image:
            return values[rows].mean().item()
        if metric.redrawn:
            return metric.compute(*own, *others, counts=rows.bincount(minlength=count))
        drawn = [part[rows] if isinstance(part, torch.Tensor) else [part[row] for row in rows] for part in own]
        value = metric.compute(*drawn, *others)
        return value[0] if isinstance(value, tuple) else value

    if bootstrap:
        draws = torch.tensor([redraw(index) for index in range(bootstrap)], dtype=torch.float64)
        found["ci95"] = 1.96 * draws.std().item()
    return found
