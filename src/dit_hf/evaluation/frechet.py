"""Fréchet distance of two Gaussians (Heusel et al., https://arxiv.org/abs/1706.08500, eq. 6).

Shapes: `N` images, `D` feature channels.
"""

import warnings

import torch

from .statistics import GaussianStatistics, gaussian


def frechet_distance(
    samples: torch.Tensor | GaussianStatistics, reference: torch.Tensor | GaussianStatistics
) -> float:
    """
    Distance of two sets of features, as that of Gaussians with their means and covariances:
    |m₁ - m₂|² + tr C₁ + tr C₂ - 2 tr (C₁ C₂)^½.

    Of Inception's pooled features it is FID. It falls with the number of images: compare only values of
    sets of equal size.

    Args:
        samples (`torch.Tensor` of shape `(N, D)`, or `GaussianStatistics`): Features of the samples or statistics.
        reference (`torch.Tensor` of shape `(M, D)`, or `GaussianStatistics`): The same of the reference.

    Returns:
        `float`: 0 for equal sets; small is good.

    Raises:
        ValueError: if the numbers of channels differ, a set has fewer than two images, or a feature is not finite.

    Example:

        >>> import torch
        >>> from dit_hf.evaluation.frechet import frechet_distance
        >>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(features + 2, features), 3)  # the means differ by 2 in each of 8 channels
        32.0
    """
    first, second = (part if isinstance(part, GaussianStatistics) else gaussian(part) for part in (samples, reference))
    if first.dim != second.dim:
        raise ValueError(
            f"The samples have {first.dim} feature channels, the reference {second.dim}: they come from different "
            "extractors."
        )
    for name, statistics in (("samples", first), ("reference", second)):
        if statistics.count <= statistics.dim:
            warnings.warn(
                f"{statistics.count} images ({name}) give {statistics.dim} channels a covariance without full rank; "
                "the distance depends on their number. KID does not.",
                stacklevel=2,
            )
    # The trace of (C₁ C₂)^½ is the sum of the singular values of √C₁ √C₂, which needs two symmetric
    # eigen-decompositions, no root of a matrix that is not symmetric, and stays exact where a covariance is singular.
    cross = torch.linalg.svdvals(first.root() @ second.root()).sum()
    shift = (first.mean - second.mean).square().sum()
    return (shift + first.covariance.trace() + second.covariance.trace() - 2 * cross).item()
