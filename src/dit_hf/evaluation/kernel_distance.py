"""Kernel Inception Distance (Bińkowski et al., https://arxiv.org/abs/1801.01401).

Shapes: `N` samples, `M` reference images, `D` feature channels.
"""

import torch

from .pairs import blocks, check_pair


def kernel_distance(features: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor | None = None) -> float:
    """
    The unbiased squared MMD with the cubic kernel (x·y / D + 1)³ over all images. It has no bias for few images, where
    Fréchet distance has a large one.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the reference.
        counts (`torch.Tensor` of shape `(N,)`, *optional*):
            How often each sample counts, in a set redrawn with replacement: an image makes no pair with itself however
            often it was drawn.

    Returns:
        `float`: 0 in the mean for sets of one distribution; may be negative.

    Raises:
        ValueError: if a set has fewer than two images, is not finite, or the sets have different numbers of channels.
    """
    check_pair(features, reference)
    own = torch.ones(len(features), dtype=torch.float64) if counts is None else counts.double()
    others = torch.ones(len(reference), dtype=torch.float64)
    within = _kernel_mean(features, own, features, own, same_set=True)
    within += _kernel_mean(reference, others, reference, others, same_set=True)
    return within - 2 * _kernel_mean(features, own, reference, others, same_set=False)


def _kernel_mean(first, weights, second, other_weights, same_set):
    """Weighted mean of the kernel over all pairs; over pairs of different images if both sets are the same."""
    total = norm = 0.0
    for rows, block in blocks(first):
        for columns, other in blocks(second):
            kernel = (block @ other.T / first.shape[1] + 1) ** 3
            pairs = weights[rows, None] * other_weights[columns]
            if same_set and rows == columns:
                pairs.fill_diagonal_(0)
            total += (pairs * kernel).sum().item()
            norm += pairs.sum().item()
    return total / norm
