"""Ratio of Fréchet distances (Yang et al., "Representation Fréchet Loss for Visual Generation",
https://arxiv.org/abs/2604.28190), which compares across extractors.

Shapes: `N` samples, `D` feature channels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import read_json
from .frechet import frechet_distance
from .statistics import GaussianStatistics


RATIO = "fdr"
# What results must have in common for a mean over their extractors.
SAME = ("samples", "reference", "training", "split", "holdout", "resolution", "sampling")


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


def check_same_sets(recipes: Sequence[Mapping[str, Any]]) -> None:
    """
    Checks that results are of the same sets and of different extractors.

    Args:
        recipes (`Sequence[Mapping[str, Any]]`): Of the results.

    Raises:
        ValueError: naming the first difference.
    """
    names = [recipe["extractor"]["name"] for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"Results of {', '.join(names)}; a mean ratio takes each extractor once.")
    for key in SAME:
        if len({json.dumps(recipe.get(key), sort_keys=True) for recipe in recipes}) > 1:
            raise ValueError(f"Results of {', '.join(names)} differ in `{key}`; compute them for the same sets.")


def mean_ratio(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    FDrᵏ, the mean of the ratios that k extractors give for the same samples.

    Args:
        results (`Sequence[Mapping[str, Any]]`): What `dit-hf metrics --output` writes, one for each extractor.

    Returns:
        `dict[str, Any]`: the `mean`, and the ratio of each extractor by its name.

    Raises:
        ValueError: if two results are of one extractor, or they are of different sets.
    """
    check_same_sets([result["recipe"] for result in results])
    ratios = {result["recipe"]["extractor"]["name"]: result[RATIO]["value"] for result in results}
    return {"mean": sum(ratios.values()) / len(ratios), "extractors": ratios}


def read_ratio(path: str | Path) -> dict[str, Any]:
    """
    A result with a ratio.

    Args:
        path (`str` or `Path`): What `dit-hf metrics --output` wrote.

    Returns:
        `dict[str, Any]`

    Raises:
        ValueError: if the file is damaged or has no ratio.
    """
    result = read_json(path)
    ratio, recipe = result.get(RATIO), result.get("recipe")
    extractor = recipe.get("extractor") if isinstance(recipe, dict) else None
    has_name = isinstance(extractor, dict) and isinstance(extractor.get("name"), str)
    if not has_name or not isinstance(ratio, dict) or not isinstance(ratio.get("value"), float):
        raise ValueError(f"{path} is not a result with {RATIO!r}; compute it again with {RATIO} among --metrics.")
    return result
