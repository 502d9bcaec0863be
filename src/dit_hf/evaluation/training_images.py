"""What the training images tell of samples: the same metrics of real images, and the nearest image of each sample.

Shapes: `N` samples, `M` training images, `D` feature channels.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .accuracy import check_classes
from .extractors import Features
from .metrics import compute_metrics, find_metrics, too_few_images
from .order import content_order
from .pairs import nearest_neighbours
from .reference import ReferenceStatistics


def evaluate(
    samples: Features,
    reference: Features | None,
    metrics: Sequence[str],
    bootstrap: int = 0,
    seed: int = 0,
    training: Features | None = None,
    statistics: ReferenceStatistics | None = None,
) -> dict[str, Any]:
    """
    Metrics of samples, and with training images the same metrics of real images, for comparison.

    Args:
        samples, reference, metrics, bootstrap, seed, training, statistics: As [`compute_metrics`] takes them.

    Returns:
        `dict[str, Any]`: what [`compute_metrics`] returns; with training images also `training images`, the metrics of
        [`matched_training_images`] and their `count`, `nearest training image`, from [`compare_with_training`], and
        `reference`, the metrics of the reference that need the classes of images, where they are known.

    Raises:
        ValueError: as [`compute_metrics`] does.
    """
    found: dict[str, Any] = dict(compute_metrics(samples, reference, metrics, bootstrap, seed, training, statistics))
    if training is not None:
        rows = dict(zip(metrics, find_metrics(metrics, samples.extractor["name"]), strict=True))
        real = matched_training_images(samples, training, seed)
        few = too_few_images(metrics, samples.extractor["name"], {"samples": len(real.features)})
        unlabelled = [name for name, row in rows.items() if row.labels and not real.labels]
        of_training = [name for name, row in rows.items() if row.against in ("training", "both")]
        plain = [name for name in rows if name not in [*few, *unlabelled, *of_training]]
        found["training images"] = {"count": len(real.features)}
        found["training images"] |= compute_metrics(real, reference, plain, statistics=statistics)
        found["nearest training image"] = compare_with_training(samples, reference, training)
        of_classes = [name for name, row in rows.items() if row.against == "training"]
        if of_classes and reference is not None and reference.labels:
            found["reference"] = compute_metrics(reference, None, of_classes, training=training)
    return found


def matched_training_images(samples: Features, training: Features, seed: int = 0) -> Features:
    """
    As many training images as there are samples, of the same classes where both are known.

    Args:
        samples (`Features`): Of the samples.
        training (`Features`): Of the training images; their order does not matter.
        seed (`int`, defaults to 0): Of the choice.

    Returns:
        `Features`: fewer than the samples where there are not enough training images.

    Raises:
        ValueError: if there are samples of a class without training images.
    """
    order = content_order(training.features, seed)
    if samples.labels is None or training.labels is None:
        return training.select(order[: len(samples.features)])
    check_classes(samples.labels, training.labels, "training")
    wanted, chosen = Counter(samples.labels), []
    for row in order.tolist():
        if wanted[training.labels[row]] > 0:
            wanted[training.labels[row]] -= 1
            chosen.append(row)
    return training.select(torch.tensor(chosen))


def compare_with_training(samples: Features, reference: Features | None, training: Features) -> dict[str, Any]:
    """
    Distances of samples to their nearest training images, beside those of images that the model was not trained on.

    Args:
        samples (`Features`): Of the samples.
        reference (`Features`, *optional*): Of images that the model was not trained on.
        training (`Features`): Of the training images.

    Returns:
        `dict[str, Any]`: `nearest`, the five nearest pairs; `median`, the median distance; and with a reference
        `median of the reference`, and `fraction of suspects`: the fraction of samples that are as near to a training
        image as the nearest hundredth of the reference is, 0.01 for a model that copies nothing.
    """
    distances, indices = nearest_neighbours(samples.features, training.features)
    nearest = distances.argsort(stable=True)[:5].tolist()
    found: dict[str, Any] = {
        "nearest": [{"sample": i, "training": int(indices[i]), "distance": float(distances[i])} for i in nearest],
        "median": distances.median().item(),
    }
    if reference is not None:
        unseen, _ = nearest_neighbours(reference.features, training.features)
        found["median of the reference"] = unseen.median().item()
        found["fraction of suspects"] = (distances <= unseen.quantile(0.01)).double().mean().item()
    return found
