"""The interface of a training objective.

Shapes: `B` samples, `C` latent channels, `h w` latent size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ...models import DiTTransformer2DModel
from ...schedulers import SchedulerRecipe
from .auxiliary import AuxiliaryLoss


class Objective(ABC):
    """
    What a transformer is trained on. Subclasses define the four methods; `loss` is their composition and may be
    overridden when one forward pass is not enough.

    Attributes:
        name (`str`): Recorded with the run and on the model card.
        prediction (`str`): What the sampler takes the output for, as `dit_hf.schedulers.trained_prediction` names it.
        sampler (`str`): Recipe of `make_scheduler` that samples a model trained with this objective.
        learn_sigma (`bool`): Whether a new model also predicts its variance.
        transformer_config (`dict`): Other arguments of a new model.
        num_jumps (`int`): Recommended steps with a sampler that takes jumps; 0 for a model without them.
        teacher (`DiTTransformer2DModel`, *optional*): A frozen network that the loss evaluates.
        forward_mode (`bool`): Whether the loss takes a forward-mode derivative of the model.
    """

    name: ClassVar[str]
    prediction: ClassVar[str]
    sampler: ClassVar[SchedulerRecipe]
    learn_sigma: ClassVar[bool] = False
    transformer_config: ClassVar[dict[str, Any]] = {}
    num_jumps: ClassVar[int] = 0
    teacher: DiTTransformer2DModel | None = None
    forward_mode: ClassVar[bool] = False

    @property
    def loss_falls(self) -> bool:
        """Whether the value of the loss falls as the model learns."""
        return True

    @property
    def guidance_in_weights(self) -> bool | str:
        """Whether targets are guided, so that sampling must not guide again."""
        return False

    @abstractmethod
    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """
        Draws the times of `count` samples.

        Args:
            count (`int`): B.
            generator (`torch.Generator`): On the CPU.

        Returns:
            `torch.Tensor` whose first dimension is B.
        """

    def draw_sample(
        self, shape: tuple[int, ...], time: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """
        Draws further random inputs of one sample's loss.

        Args:
            shape (`tuple[int, ...]`): Of its latents, `(C, h, w)`.
            time (`torch.Tensor`): The sample's row of `draw_time`.
            generator (`torch.Generator`): On the CPU.

        Returns:
            `dict[str, torch.Tensor]`: for the batch, which stacks those of all samples.
        """
        return {}

    def auxiliary_loss(self) -> AuxiliaryLoss | None:
        """A new auxiliary loss that belongs to the objective, if there is one."""
        return None

    @abstractmethod
    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """
        Makes the noisy input.

        Args:
            x_start (`torch.Tensor` of shape `(B, C, h, w)`): Clean latents of unit variance.
            noise (`torch.Tensor` of shape `(B, C, h, w)`): Gaussian noise.
            time (`torch.Tensor`): From `draw_time`.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`
        """

    @abstractmethod
    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        """The timestep that the transformer is called with, for a time from `draw_time`."""

    @abstractmethod
    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Compares the transformer's output with its target.

        Args:
            output (`torch.Tensor`): Of the transformer.
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B,)`: one loss per sample.
        """

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The loss per sample of one forward pass.

        Args:
            transformer (`DiTTransformer2DModel`): Possibly wrapped for distributed training.
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`]; without `drop`, no label is dropped by the caller.

        Returns:
            `torch.Tensor` of shape `(B,)`
        """
        noisy = self.add_noise(batch["x_start"], batch["noise"], batch["time"])
        options = {"force_drop_ids": batch.get("drop"), "return_dict": False}
        output = transformer(noisy, self.timestep(batch["time"]), batch["label"], **options)[0]
        return self.sample_losses(output, batch)

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values: recorded when a run starts, compared when it resumes."""
        return {"objective": self.name}
