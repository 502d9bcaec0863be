"""Mean and covariance of features, gathered batch by batch in double precision.

Shapes: `N` images, `D` feature channels.
"""

from dataclasses import dataclass

import torch


@dataclass
class GaussianStatistics:
    """
    Running mean and scatter of features: the memory they take does not depend on the number of images.

    Args:
        dim (`int`): D.
    """

    dim: int

    def __post_init__(self):
        self.count = 0
        self._mean = torch.zeros(self.dim, dtype=torch.float64)
        self._scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        self._root: tuple[int, torch.Tensor] | None = None

    def update(self, features: torch.Tensor) -> "GaussianStatistics":
        """
        Adds a batch.

        Args:
            features (`torch.Tensor` of shape `(N, D)`): Any floating type.

        Returns:
            `GaussianStatistics`: itself.

        Raises:
            ValueError: if the shape is another, or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"Features have shape {tuple(features.shape)}; they must be (images, {self.dim}).")
        features = features.double()
        if not torch.isfinite(features).all():
            bad = (~torch.isfinite(features).all(dim=1)).nonzero()[0].item()
            raise ValueError(f"The features of image {self.count + bad} are not finite.")
        count = len(features)
        if count == 0:
            return self
        mean = features.mean(dim=0)
        centred = features - mean
        shift = mean - self._mean
        total = self.count + count
        # The parallel form of Welford's update: sums of products about the mean, never of raw products.
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total
        return self

    @classmethod
    def from_moments(
        cls, mean: torch.Tensor, covariance: torch.Tensor, count: int | None = None
    ) -> "GaussianStatistics":
        """
        Statistics from a mean and a covariance that were computed elsewhere.

        Args:
            mean (`torch.Tensor` of shape `(D,)`): Mean.
            covariance (`torch.Tensor` of shape `(D, D)`): Covariance.
            count (`int`, *optional*): Number of images; if not given, the covariance's rank plus one.

        Returns:
            `GaussianStatistics`
        """
        statistics = cls(len(mean))
        statistics.count = count or int(torch.linalg.matrix_rank(covariance.double(), hermitian=True)) + 1
        statistics._mean = mean.double()
        statistics._scatter = covariance.double() * (statistics.count - 1)
        return statistics

    def root(self) -> torch.Tensor:
        """The covariance's square root, shape `(D, D)`, float64; computed once."""
        if self._root is None or self._root[0] != self.count:
            self._root = (self.count, symmetric_root(self.covariance))
        return self._root[1]

    @property
    def mean(self) -> torch.Tensor:
        """Mean, shape `(D,)`, float64."""
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance, shape `(D, D)`, float64; `ValueError` with fewer than two images."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images; there are {self.count}.")
        return self._scatter / (self.count - 1)


def check_moments(mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """
    Checks a mean and a covariance that were computed elsewhere, except that the covariance is positive semi-definite,
    which [`symmetric_root`] checks.

    Args:
        mean (`torch.Tensor`): Should be of shape `(D,)`.
        covariance (`torch.Tensor`): Should be of shape `(D, D)`.

    Raises:
        ValueError: if a shape is wrong, a value is not finite, the covariance is not symmetric, or a variance is
            negative.
    """
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"they are of shapes {tuple(mean.shape)} and {tuple(covariance.shape)}, not (D,) and (D, D).")
    if not torch.isfinite(mean).all() or not torch.isfinite(covariance).all():
        raise ValueError("they are not finite.")
    if not _is_symmetric(covariance):
        raise ValueError("the covariance is not symmetric.")
    if (covariance.diagonal() < 0).any():
        raise ValueError("the covariance has a negative variance.")


def _is_symmetric(covariance):
    """Up to rounding."""
    return (covariance - covariance.T).abs().max() <= 1e-8 * covariance.abs().max().clamp_min(1e-300)


def gaussian(features: torch.Tensor) -> GaussianStatistics:
    """
    Statistics of a set of features.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Features.

    Returns:
        `GaussianStatistics`

    Raises:
        ValueError: if they are not of two dimensions, or a feature is not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"Features have shape {tuple(features.shape)}; they must be (images, channels).")
    statistics = GaussianStatistics(features.shape[1])
    for part in features.split(1024):
        statistics.update(part)
    return statistics


def symmetric_root(covariance: torch.Tensor) -> torch.Tensor:
    """
    The square root of a covariance, checked.

    Args:
        covariance (`torch.Tensor` of shape `(D, D)`): Symmetric, without negative eigenvalues.

    Returns:
        `torch.Tensor` of shape `(D, D)`, float64.

    Raises:
        ValueError: if it is not symmetric, has a negative eigenvalue beyond rounding, or its root squared is not it.
    """
    covariance = covariance.double()
    scale = covariance.abs().max().clamp_min(1e-300)
    if not torch.isfinite(covariance).all() or not _is_symmetric(covariance):
        raise ValueError("A covariance is not symmetric, or not finite.")
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues[0] < -1e-6 * eigenvalues[-1].abs():
        raise ValueError(
            f"A covariance has the eigenvalue {eigenvalues[0]:.3g}; the largest is {eigenvalues[-1]:.3g}."
        )
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    residual = ((root @ root - covariance).abs().max() / scale).item()
    if residual > 1e-6:
        raise ValueError(f"The root of a covariance is off by {residual:.2g} of its largest entry.")
    return root
