"""Figures of sets of features other than Fréchet distance: Inception Score, KID, precision and recall, memorisation.

Shapes: `N` samples, `M` reference images, `D` feature channels, `K` classes. Features are taken as they are given; all sums
are in double precision.
"""

import torch


# Rows and columns of a matrix over pairs of images that are in memory at once, and in double precision.
BLOCK = 1024


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """
    Inception Score (Salimans et al., https://arxiv.org/abs/1606.03498, eq. 1): exp of the mean divergence of the images'
    class distributions from their mean.

    Args:
        logits (`torch.Tensor` of shape `(N, K)`): Of a classifier.
        splits (`int`, defaults to 10): Contiguous parts, not shuffled, that the score is taken of.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the parts.

    Raises:
        ValueError: if there are fewer images than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"Inception Score in {splits} splits needs as many images; there are {len(logits)}.")
    if not torch.isfinite(logits).all():
        raise ValueError("Logits are not finite.")
    scores = []
    for index in range(splits):
        part = logits[index * len(logits) // splits : (index + 1) * len(logits) // splits].double().log_softmax(dim=1)
        probabilities = part.exp()
        mean = probabilities.mean(dim=0)
        divergence = (probabilities * (part - mean.clamp_min(1e-300).log())).sum(dim=1).mean()
        scores.append(divergence.exp())
    stacked = torch.stack(scores)
    return stacked.mean().item(), stacked.std(correction=0).item()


def kernel_distance(features: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor | None = None) -> float:
    """
    Kernel Inception Distance (Bińkowski et al., https://arxiv.org/abs/1801.01401): the unbiased squared MMD with the cubic
    kernel (x·y / D + 1)³ over all images. It has no bias for few images, where Fréchet distance has a large one.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the reference.
        counts (`torch.Tensor` of shape `(N,)`, *optional*):
            How often each sample counts, in a set redrawn with replacement: an image makes no pair with itself however
            often it was drawn.

    Returns:
        `float`: 0 in the mean for sets of one distribution; may be negative.
    """
    _check(features, reference)
    own = torch.ones(len(features), dtype=torch.float64) if counts is None else counts.double()
    others = torch.ones(len(reference), dtype=torch.float64)
    within = _kernel_mean(features, own, features, own, True)
    within += _kernel_mean(reference, others, reference, others, True)
    return within - 2 * _kernel_mean(features, own, reference, others, False)


def _kernel_mean(first, weights, second, other_weights, of_one_set):
    """Weighted mean of the kernel over all pairs; over pairs of different images if both sets are one."""
    total = norm = 0.0
    for rows, block in _blocks(first):
        for columns, other in _blocks(second):
            kernel = (block @ other.T / first.shape[1] + 1) ** 3
            pairs = weights[rows, None] * other_weights[columns]
            if of_one_set and rows == columns:
                pairs.fill_diagonal_(0)
            total += (pairs * kernel).sum().item()
            norm += pairs.sum().item()
    return total / norm


def precision_recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> dict[str, torch.Tensor]:
    """
    Improved precision and recall (Kynkäänniemi et al., https://arxiv.org/abs/1904.06991), density and coverage (Naeem et
    al., https://arxiv.org/abs/2002.09797), image by image: a figure is the mean of its tensor.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of the reference.
        k (`int`, defaults to 3): An image's ball reaches to its k-th neighbour in its own set.

    Returns:
        `dict[str, torch.Tensor]`: float64; `precision`, of shape `(N,)`, whether a sample is in a ball of the reference;
        `density`, `(N,)`, in how many over k; `recall`, `(M,)`, whether a reference image is in a ball of the samples;
        `coverage`, `(M,)`, whether a sample is in its ball.

    Raises:
        ValueError: if a set has not more than k images.
    """
    _check(features, reference)
    if min(len(features), len(reference)) <= k:
        raise ValueError(
            f"Precision and recall with k = {k} need more than {k} images; there are {len(features)} and {len(reference)}."
        )
    tolerance = _tolerance(features, reference)
    sample_radii, reference_radii = _radii(features, k) + tolerance, _radii(reference, k) + tolerance
    density = torch.zeros(len(features), dtype=torch.float64)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    for rows, block in _blocks(features):
        for columns, other in _blocks(reference):
            distances = _squared_distances(block, other)
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


def nearest_neighbours(features: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The training image that is nearest to each sample, to see whether a model repeats what it was trained on.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        training (`torch.Tensor` of shape `(M, D)`): Of the training images.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances (float64) and indices (int64), shape `(N,)`.
    """
    _check(features, training)
    squares = torch.full((len(features),), float("inf"), dtype=torch.float64)
    indices = torch.zeros(len(features), dtype=torch.int64)
    for rows, block in _blocks(features):
        for columns, other in _blocks(training):
            found = _squared_distances(block, other).min(dim=1)
            nearer = found.values < squares[rows]
            squares[rows] = torch.where(nearer, found.values, squares[rows])
            indices[rows] = torch.where(nearer, found.indices + columns.start, indices[rows])
    squares[squares <= _tolerance(features, training)] = 0  # equal images
    return squares.sqrt(), indices


def _check(samples, reference):
    """At least two images in each set, all finite, and equally many channels."""
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"Features ({name}) have shape {tuple(features.shape)}; at least 2 images are needed.")
        if not torch.isfinite(features).all():
            raise ValueError(f"Features ({name}) are not finite.")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"The samples have {samples.shape[1]} feature channels, the reference {reference.shape[1]}: they come from "
            "different extractors."
        )


def _blocks(features):
    """Parts of a set, in double precision, and where they lie."""
    for start in range(0, len(features), BLOCK):
        yield slice(start, start + BLOCK), features[start : start + BLOCK].double()


def _squared_distances(first, second):
    """By a matrix product, as differences of all pairs would take an hour for 50 thousand images."""
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1) - 2 * first @ second.T
    return squares.clamp_min(0)


def _tolerance(first, second):
    """What rounding leaves of the squared distance of equal images, amply."""
    return 1e-12 * max(block.square().sum(dim=1).max() for part in (first, second) for _, block in _blocks(part))


def _radii(features, k):
    """Squared distance of each image to its k-th neighbour."""
    radii = []
    for _, block in _blocks(features):
        # Of the k + 1 nearest in each part, the k + 1 nearest; the first is the image itself.
        parts = (_squared_distances(block, other) for _, other in _blocks(features))
        nearest = [part.topk(min(k + 1, part.shape[1]), dim=1, largest=False).values for part in parts]
        radii.append(torch.cat(nearest, dim=1).kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)
