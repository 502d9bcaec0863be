"""Fréchet distance of two Gaussians (Heusel et al., https://arxiv.org/abs/1706.08500, eq. 6).

Shapes: `N` images, `D` feature channels.
"""

import warnings

import torch

from .statistics import GaussianStatistics


def frechet_distance(samples: GaussianStatistics, reference: GaussianStatistics) -> float:
    """
    Distance of two sets of features, as that of Gaussians with their means and covariances.

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
    return gaussian_distance(samples.mean, samples.covariance, reference.mean, reference.covariance)


def gaussian_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """
    |m₁ - m₂|² + tr C₁ + tr C₂ - 2 tr (C₁ C₂)^½.

    The last trace is the sum of the singular values of √C₁ √C₂, which needs two symmetric eigen-decompositions, no root of
    a matrix that is not symmetric, and stays exact where a covariance is singular.

    Args:
        mean (`torch.Tensor` of shape `(D,)`): m₁.
        covariance (`torch.Tensor` of shape `(D, D)`): C₁.
        other_mean (`torch.Tensor` of shape `(D,)`): m₂.
        other_covariance (`torch.Tensor` of shape `(D, D)`): C₂.

    Returns:
        `float`

    Raises:
        ValueError: if a covariance is not one: not symmetric, or with a negative eigenvalue beyond rounding.
    """
    root, other_root = symmetric_root(covariance), symmetric_root(other_covariance)
    cross = torch.linalg.svdvals(root @ other_root).sum()
    shift = (mean.double() - other_mean.double()).square().sum()
    return (shift + covariance.double().trace() + other_covariance.double().trace() - 2 * cross).item()


def symmetric_root(covariance: torch.Tensor) -> torch.Tensor:
    """
    The square root of a covariance, checked.

    Args:
        covariance (`torch.Tensor` of shape `(D, D)`): Symmetric, without negative eigenvalues.

    Returns:
        `torch.Tensor` of shape `(D, D)`, float64.

    Raises:
        ValueError: if it is not symmetric, has a negative eigenvalue beyond rounding, or its root squared is not it.
    """
    covariance = covariance.double()
    scale = covariance.abs().max().clamp_min(1e-300)
    if not torch.isfinite(covariance).all() or (covariance - covariance.T).abs().max() > 1e-8 * scale:
        raise ValueError("A covariance is not symmetric, or not finite.")
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues[0] < -1e-6 * eigenvalues[-1].abs():
        raise ValueError(
            f"A covariance has the eigenvalue {eigenvalues[0]:.3g}; the largest is {eigenvalues[-1]:.3g}."
        )
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    residual = ((root @ root - covariance).abs().max() / scale).item()
    if residual > 1e-6:
        raise ValueError(f"The root of a covariance is off by {residual:.2g} of its largest entry.")
    return root
