"""Fréchet distance of two Gaussians (Heusel et al., https://arxiv.org/abs/1706.08500, eq. 6)."""

import warnings

import torch

from .statistics import GaussianStatistics


def frechet_distance(samples: GaussianStatistics, reference: GaussianStatistics) -> float:
    """
    Distance of two sets of features, as that of Gaussians with their means and covariances:
    |m₁ - m₂|² + tr C₁ + tr C₂ - 2 tr (C₁ C₂)^½.

    It falls with the number of images; compare only figures of equally many.

    Args:
        samples (`GaussianStatistics`): Of the samples.
        reference (`GaussianStatistics`): Of the reference.

    Returns:
        `float`: 0 for equal sets; small is good.

    Raises:
        ValueError: if the numbers of channels differ, or a set has fewer than two images.
    """
    if samples.dim != reference.dim:
        raise ValueError(
            f"The samples have {samples.dim} feature channels, the reference {reference.dim}: they come from different "
            "extractors."
        )
    for name, statistics in (("samples", samples), ("reference", reference)):
        if statistics.count <= statistics.dim:
            warnings.warn(
                f"{statistics.count} images ({name}) give {statistics.dim} channels a covariance without full rank; the "
                "figure depends on their number. KID does not.",
                stacklevel=2,
            )
    # The trace of (C₁ C₂)^½ is the sum of the singular values of √C₁ √C₂, which needs two symmetric eigen-decompositions, no
    # root of a matrix that is not symmetric, and stays exact where a covariance is singular.
    cross = torch.linalg.svdvals(samples.root() @ reference.root()).sum()
    shift = (samples.mean - reference.mean).square().sum()
    return (shift + samples.covariance.trace() + reference.covariance.trace() - 2 * cross).item()
