"""Ratio of Fréchet distances (Yang et al., "Representation Fréchet Loss for Visual Generation",
https://arxiv.org/abs/2604.28190), which compares across extractors.

Shapes: `N` samples, `D` feature channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .frechet import frechet_distance
from .statistics import GaussianStatistics


RATIO = "fdr"
# What results must have in common for a mean over their extractors.
SAME = ("samples", "num_samples", "reference", "num_reference", "training", "holdout", "resolution", "sampling")


def frechet_ratio(samples: torch.Tensor, reference: GaussianStatistics, training: GaussianStatistics) -> float:
    """
    FD(samples, training images) / FD(reference, training images), with real images that the model was not trained on
    as the reference: how many times farther from the training images the samples are.

    Args:
        samples (`torch.Tensor` of shape `(N, D)`): Features of the samples.
        reference (`GaussianStatistics`): Of the reference.
        training (`GaussianStatistics`): Of the training images.

    Returns:
        `float`: 1 for samples like the reference; small is good.

    Raises:
        ValueError: if the reference's images are the training images, or as [`frechet_distance`] does.
    """
    unit = frechet_distance(reference, training)
    if unit <= 1e-6 * training.covariance.trace().item():
        raise ValueError(
            "The reference and the training images are the same, so the ratio's denominator is 0; pass images that "
            "the model was not trained on as the reference."
        )
    return frechet_distance(samples, training) / unit


def mean_ratio(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    FDrᵏ, the mean of the ratios that k extractors give for the same samples.

    Args:
        results (`Sequence[Mapping[str, Any]]`): What `dit-hf metrics --output` writes, one for each extractor.

    Returns:
        `dict[str, Any]`: the `mean`, and the ratio of each extractor by its name.

    Raises:
        ValueError: if a result has no ratio, two are of one extractor, or they are of different samples or references.
    """
    ratios: dict[str, Any] = {}
    for result in results:
        recipe = result.get("recipe", {})
        name = recipe.get("extractor", {}).get("name")
        if RATIO not in result or name is None:
            raise ValueError(f"A result has no {RATIO!r}; add it to --metrics and compute it again.")
        if name in ratios:
            raise ValueError(f"Two results are of {name!r}; the mean takes each extractor once.")
        for key in SAME:
            if recipe.get(key) != results[0]["recipe"].get(key):
                raise ValueError(
                    f"The results of {', '.join([*ratios, name])} differ in `{key}`; compute them for the same sets."
                )
        ratios[name] = result[RATIO]["value"]
    return {"mean": sum(ratios.values()) / len(ratios), "extractors": ratios}
