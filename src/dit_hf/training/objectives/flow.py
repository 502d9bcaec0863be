"""Flow matching: the velocity on the straight path from data to noise, and JiT's form of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...schedulers import SchedulerRecipe
from ..config import POSITIVE
from ..losses import velocity_loss
from .base import Objective
from .times import LogitNormal


# The timestep that the transformer is given for sigma = 1.
NUM_TRAIN_TIMESTEPS = 1000


class StraightPath(Objective):
    """Noisy inputs on the straight path from data (sigma 0) to noise (sigma 1), as diffusers' flow matching has it."""

    prediction: ClassVar[str] = "velocity"

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) · data + sigma · noise."""
        sigma = time[:, None, None, None]
        return (1 - sigma) * x_start + sigma * noise

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        """1000 · sigma, as diffusers' flow matching schedulers count."""
        return time * NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True)
class VelocityObjective(StraightPath):
    """
    Flow matching on the straight path from data to noise: the target is noise - data.

    Args:
        time_sampler (`Callable`, defaults to `LogitNormal()`): Draws sigma in [0, 1] from a count and a generator.
        cosine_loss (`bool`, defaults to `False`): Adds LightningDiT's direction loss.
    """

    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal()
    cosine_loss: bool = False
    name: ClassVar[str] = "velocity"
    sampler: ClassVar[SchedulerRecipe] = "flow_euler"

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Sigma of each sample, shape `(B,)`."""
        return self.time_sampler(count, generator)

    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[`velocity_loss`], with the direction loss if asked for."""
        terms = velocity_loss(output, batch["x_start"], batch["noise"])
        return terms["loss"] + terms["cosine"] if self.cosine_loss else terms["loss"]

    def settings(self) -> dict[str, Any]:
        """Time sampling and direction loss."""
        return {
            "objective": self.name,
            "time_sampling": str(self.time_sampler),
            "cosine_loss": self.cosine_loss,
        }


@dataclass(frozen=True)
class ClampedVelocityObjective(VelocityObjective):
    """
    JiT's loss (https://arxiv.org/abs/2511.13720), for a model that computes its velocity from a predicted image: the
    target is (noisy - data) / max(sigma, t_eps), as in `JiTTransformer2DModel`.

    Args:
        time_sampler (`Callable`, defaults to `LogitNormal(0.8, 0.8)`): As [`VelocityObjective`] takes it.
        cosine_loss (`bool`, defaults to `False`): As [`VelocityObjective`] takes it.
        t_eps (`float`, defaults to 0.05): The model's.
        noise_scale (`float`, defaults to 1.0): The model's; standard deviation of the noise.
    """

    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal(0.8, 0.8)
    t_eps: float = 0.05
    noise_scale: float = 1.0
    name: ClassVar[str] = "clamped_velocity"

    def __post_init__(self):
        POSITIVE.check("t_eps", self.t_eps)
        POSITIVE.check("noise_scale", self.noise_scale)

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) · data + sigma · noise_scale · noise."""
        return super().add_noise(x_start, self.noise_scale * noise, time)

    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[`velocity_loss`] of a target that is smaller where sigma is below the clamp."""
        shrink = (batch["time"] / batch["time"].clamp(min=self.t_eps))[:, None, None, None]
        scaled = {"x_start": shrink * batch["x_start"], "noise": shrink * self.noise_scale * batch["noise"]}
        return super().sample_losses(output, batch | scaled)

    def settings(self) -> dict[str, Any]:
        """As of [`VelocityObjective`], with the clamp and the scale of the noise."""
        return super().settings() | {"t_eps": self.t_eps, "noise_scale": self.noise_scale}
