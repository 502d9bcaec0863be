"""Precision, recall (Kynkäänniemi et al., https://arxiv.org/abs/1904.06991), density and coverage (Naeem et al.,
https://arxiv.org/abs/2002.09797).

Shapes: `N` samples, `M` reference images, `D` feature channels.
"""

import torch

from .pairs import blocks, check_pair, squared_distances, tolerance


def precision_recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> dict[str, torch.Tensor]:
    """
    The four metrics image by image; each metric is the mean of its tensor.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the reference.
        k (`int`, defaults to 3): An image's ball reaches to its k-th neighbour in its own set.

    Returns:
        `dict[str, torch.Tensor]`: float64; `precision`, shape `(N,)`, whether a sample is in a ball of the reference;
        `density`, `(N,)`, in how many over k; `recall`, `(M,)`, whether a reference image is in a ball of the samples;
        `coverage`, `(M,)`, whether a sample is in its ball.

    Raises:
        ValueError: if a set does not have more than k images, is not finite, or the sets have different numbers of
            channels.
    """
    check_pair(features, reference)
    if min(len(features), len(reference)) <= k:
        raise ValueError(
            f"Precision and recall with k = {k} need more than {k} images; there are {len(features)} and "
            f"{len(reference)}."
        )
    margin = tolerance(features, reference)
    sample_radii, reference_radii = _radii(features, k) + margin, _radii(reference, k) + margin
    density = torch.zeros(len(features), dtype=torch.float64)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    for rows, block in blocks(features):
        for columns, other in blocks(reference):
            distances = squared_distances(block, other)
            inside = distances <= reference_radii[columns]
            density[rows] += inside.sum(dim=1).double() / k
            covered[columns] |= inside.any(dim=0)
            recalled[columns] |= (distances <= sample_radii[rows, None]).any(dim=0)
    return {
        "precision": (density > 0).double(),
        "recall": recalled.double(),
        "density": density,
        "coverage": covered.double(),
    }


def _radii(features, k):
    """Squared distance of each image to its k-th neighbour."""
    radii = []
    for _, block in blocks(features):
        # Of the k + 1 nearest in each part, the k + 1 nearest; the first is the image itself.
        parts = (squared_distances(block, other) for _, other in blocks(features))
        nearest = [part.topk(min(k + 1, part.shape[1]), dim=1, largest=False).values for part in parts]
        radii.append(torch.cat(nearest, dim=1).kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)
