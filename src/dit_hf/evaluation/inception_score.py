"""Inception Score (Salimans et al., https://arxiv.org/abs/1606.03498, eq. 1).

Shapes: `N` samples, `K` classes.
"""

import torch

from .order import content_order


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """
    exp of the mean divergence of the images' class distributions from their mean, averaged over splits.

    The images are shuffled by a fixed seed and their content first, so that the score does not depend on their order:
    samples sorted by class would have splits of few classes, and a score that is far too low.

    Args:
        logits (`torch.Tensor` of shape `(N, K)`): Of a classifier.
        splits (`int`, defaults to 10): Parts of equal size that the score is computed of.
        seed (`int`, defaults to 0): Seed of the shuffle.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the splits.

    Raises:
        ValueError: if there are fewer images than splits, or the logits are not finite.
    """
    if len(logits) < splits:
        raise ValueError(f"Inception Score in {splits} splits needs as many images; there are {len(logits)}.")
    if not torch.isfinite(logits).all():
        raise ValueError("Logits are not finite.")
    logits = logits[content_order(logits, seed)]
    scores = []
    for index in range(splits):
        part = logits[index * len(logits) // splits : (index + 1) * len(logits) // splits].double().log_softmax(dim=1)
        probabilities = part.exp()
        mean = probabilities.mean(dim=0)
        divergence = (probabilities * (part - mean.clamp_min(1e-300).log())).sum(dim=1).mean()
        scores.append(divergence.exp())
    stacked = torch.stack(scores)
    return stacked.mean().item(), stacked.std(correction=0).item()
