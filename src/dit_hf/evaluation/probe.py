"""Do samples show what was asked for? A linear probe, trained on real images, says.

Shapes: `N` images.
"""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def train_probe(features: torch.Tensor, labels: torch.Tensor):
    """
    A logistic regression on standardised features.

    Args:
        features (`torch.Tensor` of shape `(N, 1280)`): Of real images.
        labels (`torch.Tensor` of shape `(N,)`): Their classes.

    Returns:
        `sklearn.pipeline.Pipeline`: with `predict` and `score`.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return probe.fit(features.numpy(), labels.numpy())


def class_agreement(probe, features: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Share of images that the probe assigns to the class they were asked for.

    Args:
        probe: From [`train_probe`].
        features (`torch.Tensor` of shape `(N, 1280)`): Of the images.
        labels (`torch.Tensor` of shape `(N,)`): The classes asked for.

    Returns:
        `float`: 0 to 1.
    """
    return float(probe.score(features.numpy(), labels.numpy()))
