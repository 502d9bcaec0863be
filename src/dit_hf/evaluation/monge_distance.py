"""Monge Inception Distance (Berthet et al., https://arxiv.org/abs/2605.06797): a sliced Wasserstein distance.

Shapes: `N` samples, `M` reference images, `D` feature channels, `P` directions, `L` levels of the two quantile
functions.
"""

import torch

from .pairs import blocks, check_pair


# torch-fidelity's defaults; the same directions give the same distance.
DIRECTIONS, SEED = 1000, 2020
# Directions whose projections are in memory at once.
DIRECTIONS_PER_CHUNK = 50


def monge_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """
    3 D times the mean, over random directions, of the squared Wasserstein-2 distance of the projected sets. The factor
    brings it to the scale of a Fréchet distance, and it sees more than means and covariances.

    It falls with the number of images: compare only values of sets of equal size. torch-fidelity drops images of the
    larger set; here all count. For sets of equal size the two agree.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the reference.

    Returns:
        `float`: 0 for equal sets; small is good.

    Raises:
        ValueError: if a set has fewer than two images, is not finite, or the sets have different numbers of channels.

    Example:

        >>> import torch
        >>> from dit_hf.evaluation.monge_distance import monge_distance
        >>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> 90 < monge_distance(features + 2, features) < 102  # 3 · |shift|² = 96 for all directions
        True
    """
    check_pair(features, reference)
    rows, other_rows, weights = _coupling(len(features), len(reference))
    total = 0.0
    for directions in _directions(features.shape[1]).split(DIRECTIONS_PER_CHUNK):
        first, second = _sorted_projections(features, directions), _sorted_projections(reference, directions)
        total += (weights @ (first[rows] - second[other_rows]).square()).sum().item()
    return 3 * features.shape[1] * total / DIRECTIONS


def _directions(dim):
    """Unit vectors `(P, D)`, float64 of the float32 values that torch-fidelity draws."""
    directions = torch.randn(DIRECTIONS, dim, generator=torch.Generator().manual_seed(SEED))
    return (directions / directions.norm(dim=1, keepdim=True)).double()


def _sorted_projections(features, directions):
    """Order statistics `(N, P)` along each direction."""
    return torch.cat([block @ directions.T for _, block in blocks(features)]).sort(dim=0).values


def _coupling(count, other_count):
    """The optimal coupling of two sorted sets: ranks in each `(L,)`, and the mass `(L,)` that moves between them."""
    # Levels where one of the quantile functions jumps, in whole units of 1 / (N M).
    steps = torch.cat([torch.arange(1, count + 1) * other_count, torch.arange(1, other_count + 1) * count]).unique()
    mass = steps.diff(prepend=steps.new_zeros(1)).double() / (count * other_count)
    return (steps - 1) // other_count, (steps - 1) // count, mass
