"""Do samples show what was asked for? A linear probe, trained on real images, says.

Shapes: `N` images.
"""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data.images import to_unit_range
from .features import EfficientNetLite0


def extract_features(images: torch.Tensor, network: EfficientNetLite0, batch_size: int = 64) -> torch.Tensor:
    """
    EfficientNet-Lite0 features of 8-bit images.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        network (`EfficientNetLite0`): The extractor.
        batch_size (`int`, defaults to 64): Images at once.

    Returns:
        `torch.Tensor` of shape `(N, 1280)`
    """
    return torch.cat([network(to_unit_range(batch)) for batch in images.split(batch_size)])


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
