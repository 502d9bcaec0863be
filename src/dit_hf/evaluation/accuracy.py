"""Class accuracy: whether samples show the class they were generated for, as judged by real images.

Shapes: `N` samples, `M` real images, `D` feature channels.
"""

from collections.abc import Sequence

import torch

from .pairs import nearest_neighbours


def check_classes(samples: Sequence[str], real: Sequence[str], name: str) -> None:
    """
    Checks that there are real images of every class of the samples, before any metric is computed.

    Args:
        samples (`Sequence[str]`): Classes of the samples.
        real (`Sequence[str]`): Classes of the real images.
        name (`str`): What the real images are: `"training"` or `"reference"`.

    Raises:
        ValueError: naming a class without real images.
    """
    if unknown := sorted(set(samples) - set(real)):
        raise ValueError(f"No {name} image is of class {unknown[0]!r}, which samples are of.")


def class_accuracy(
    features: torch.Tensor, labels: list[str], training: torch.Tensor, training_labels: list[str]
) -> torch.Tensor:
    """
    Trains a probe on real images and applies it to samples; class accuracy is the mean.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        labels (`list[str]`): The classes they were generated for.
        training (`torch.Tensor` of shape `(M, D)`): Of the training images.
        training_labels (`list[str]`): Their classes.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: 1 where the probe predicts the sample's class, else 0.

    Raises:
        ValueError: if a sample's class is none of the training images'.
        ImportError: if scikit-learn is not installed.
    """
    return correct_predictions(train_probe(training, training_labels), features, labels)


def nearest_accuracy(
    features: torch.Tensor, labels: list[str], reference: torch.Tensor, reference_labels: list[str]
) -> torch.Tensor:
    """
    Whether the nearest real image is of the sample's class; the mean is the accuracy of a 1-nearest-neighbour
    classifier, which needs one image of a class and no training.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        labels (`list[str]`): The classes they were generated for.
        reference (`torch.Tensor` of shape `(M, D)`): Of real images.
        reference_labels (`list[str]`): Their classes.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: 1 where the classes agree, else 0.

    Raises:
        ValueError: if a sample's class is none of the real images'.
    """
    check_classes(labels, reference_labels, "reference")
    _, indices = nearest_neighbours(features, reference)
    agrees = [label == reference_labels[index] for label, index in zip(labels, indices.tolist(), strict=True)]
    return torch.tensor(agrees, dtype=torch.float64)


def train_probe(features: torch.Tensor, labels: list[str]):
    """
    A logistic regression on standardised features.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of real images.
        labels (`list[str]`): Their classes.

    Returns:
        `sklearn.pipeline.Pipeline`: with `predict` and `score`.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise ImportError(f"{__name__} needs scikit-learn: pip install 'dit_hf[evaluate]'.") from error
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return probe.fit(features.numpy(), labels)


def correct_predictions(probe, features: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """
    The images whose class the probe predicts.

    Args:
        probe: From [`train_probe`].
        features (`torch.Tensor` of shape `(N, D)`): Of the images.
        labels (`list[str]`): Their classes.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: 1 or 0.

    Raises:
        ValueError: if the probe was not trained on a class.
    """
    if unknown := sorted(set(labels) - set(probe.classes_)):
        raise ValueError(f"No training image is of class {unknown[0]!r}; there are {', '.join(probe.classes_)}.")
    return torch.from_numpy(probe.predict(features.numpy()) == labels).double()
