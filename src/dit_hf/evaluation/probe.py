"""Do samples show what was asked for? A linear probe, trained on real images, says.

Shapes: `N` images.
"""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def train_probe(features: torch.Tensor, labels: list[str]):
    """
    A logistic regression on standardised features.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of real images.
        labels (`list[str]`): Their classes.

    Returns:
        `sklearn.pipeline.Pipeline`: with `predict` and `score`.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return probe.fit(features.numpy(), labels)


def right_classes(probe, features: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """
    Which images the probe assigns to the class they were asked for; class accuracy is the mean.

    Args:
        probe: From [`train_probe`].
        features (`torch.Tensor` of shape `(N, D)`): Of the images.
        labels (`list[str]`): The classes asked for.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: 1 or 0.

    Raises:
        ValueError: if the probe does not know a class.
    """
    if unknown := sorted(set(labels) - set(probe.classes_)):
        raise ValueError(f"No training image is of class {unknown[0]!r}; there are {', '.join(probe.classes_)}.")
    return torch.from_numpy(probe.predict(features.numpy()) == labels).double()
