"""An auxiliary loss with its own trainable parameters, added to the objective's.

Shapes: `B` samples.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn as nn


class AuxiliaryLoss(nn.Module, ABC):
    """
    What [`Trainer`] adds to the objective's loss. It is prepared, optimized and saved with the transformer.

    Attributes:
        name (`str`): Key of the value in the log.
        weight (`float`): Factor of the loss.
    """

    name: ClassVar[str]
    weight: float

    @abstractmethod
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The loss of a micro-batch, after the objective has computed its own.

        Args:
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B,)`
        """
