"""Fréchet distance of two image sets on EfficientNet-Lite0 features.

Shapes: `N` images, `H W` pixels.
"""

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from ..data.images import to_unit_range
from .features import FEATURE_DIM, EfficientNetLite0


class _Features(torch.nn.Module):
    """What torchmetrics expects of an extractor: uint8 images in, features out, their number as an attribute."""

    num_features = FEATURE_DIM

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(to_unit_range(images))


def frechet_distance(
    images: torch.Tensor, reference: torch.Tensor, network: EfficientNetLite0, batch_size: int = 64
) -> float:
    """
    Fréchet distance (Heusel et al., https://arxiv.org/abs/1706.08500, eq. 6) on EfficientNet-Lite0 features.

    It depends on the number of images and on the network's resolution; report both with the figure.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        reference (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        network (`EfficientNetLite0`): The extractor.
        batch_size (`int`, defaults to 64): Images at once.

    Returns:
        `float`: 0 for equal sets; small is good.
    """
    metric = FrechetInceptionDistance(_Features(network))
    for tensor, real in ((reference, True), (images, False)):
        for batch in tensor.split(batch_size):
            metric.update(batch, real=real)
    return float(metric.compute())
