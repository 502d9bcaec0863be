"""Distances of all pairs of images, a block at a time, in double precision.

Shapes: `N` samples, `M` reference images, `D` feature channels.
"""

from collections.abc import Iterator

import torch


# Rows and columns of a matrix over pairs of images that are in memory at once.
BLOCK = 1024


def check_pair(samples: torch.Tensor, reference: torch.Tensor) -> None:
    """
    Checks two sets of features.

    Args:
        samples (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the reference.

    Raises:
        ValueError: if a set has fewer than two images, is not finite, or the sets have different numbers of channels.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"Features ({name}) have shape {tuple(features.shape)}; at least 2 images are needed.")
        if not torch.isfinite(features).all():
            raise ValueError(f"Features ({name}) are not finite.")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"The samples have {samples.shape[1]} feature channels, the reference {reference.shape[1]}: they come "
            "from different extractors."
        )


def blocks(features: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Parts of a set, float64, with their rows."""
    for start in range(0, len(features), BLOCK):
        yield slice(start, start + BLOCK), features[start : start + BLOCK].double()


def squared_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Squared Euclidean distances of all pairs of two blocks, `(n, m)`. They come from a matrix product, as differences
    of all pairs would take an hour for 50 thousand images; [`tolerance`] bounds the rounding error.
    """
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1) - 2 * first @ second.T
    return squares.clamp_min(0)


def tolerance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """An upper bound of what rounding leaves of the squared distance of two equal images."""
    return (
        1e-12
        * torch.stack([block.square().sum(dim=1).max() for part in (first, second) for _, block in blocks(part)]).max()
    )


def nearest_neighbours(features: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The image of another set that is nearest to each sample.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the other set.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances (float64) and indices (int64), shape `(N,)`.

    Raises:
        ValueError: if a set has fewer than two images, is not finite, or the sets have different numbers of channels.
    """
    check_pair(features, reference)
    squares = torch.full((len(features),), float("inf"), dtype=torch.float64)
    indices = torch.zeros(len(features), dtype=torch.int64)
    for rows, block in blocks(features):
        for columns, other in blocks(reference):
            found = squared_distances(block, other).min(dim=1)
            nearer = found.values < squares[rows]
            squares[rows] = torch.where(nearer, found.values, squares[rows])
            indices[rows] = torch.where(nearer, found.indices + columns.start, indices[rows])
    squares[squares <= tolerance(features, reference)] = 0  # equal images
    return squares.sqrt(), indices
