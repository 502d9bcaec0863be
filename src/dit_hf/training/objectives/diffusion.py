"""The paper's diffusion: the noise, with a learned variance."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin

from ...schedulers import DIFFUSION, SchedulerRecipe, make_scheduler
from ..config import SNR_GAMMA
from ..losses import diffusion_loss, min_snr_weight
from .base import Objective


@dataclass(frozen=True)
class MinSNR:
    """
    Weights min(SNR, gamma) / SNR of an epsilon loss (Min-SNR, https://arxiv.org/abs/2303.09556); `ValueError` if gamma
    is below 1e-6 or above 1e6.
    """

    gamma: float = 5.0

    def __post_init__(self):
        SNR_GAMMA.check("gamma", self.gamma)

    def __call__(self, timestep: torch.Tensor, diffusion: SchedulerMixin) -> torch.Tensor:
        """Weights of shape `(B,)` for timesteps of shape `(B,)`."""
        return min_snr_weight(timestep, diffusion, self.gamma)


@dataclass(frozen=True)
class EpsilonObjective(Objective):
    """
    The paper's diffusion: the target is the noise, and the variational bound trains a learned variance.

    Args:
        diffusion (`SchedulerMixin`, defaults to the paper's): Adds the noise.
        weight (`MinSNR`, *optional*): Weights of the squared error, by timestep.
    """

    diffusion: SchedulerMixin = field(default_factory=lambda: make_scheduler("ddpm"))
    weight: MinSNR | None = None
    name: ClassVar[str] = "epsilon"
    prediction: ClassVar[str] = "epsilon"
    sampler: ClassVar[SchedulerRecipe] = "ddpm"
    learn_sigma: ClassVar[bool] = True

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps of the diffusion, int64, shape `(B,)`."""
        return torch.randint(0, self.diffusion.config.num_train_timesteps, (count,), generator=generator)

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """As the diffusion's forward process."""
        return self.diffusion.add_noise(x_start, noise, time)

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        """The diffusion's own."""
        return time

    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[`diffusion_loss`], with weights on its squared error if asked for."""
        terms = diffusion_loss(output, batch["x_start"], batch["noise"], batch["time"], self.diffusion)
        if self.weight is None:
            return terms["loss"]
        return self.weight(batch["time"], self.diffusion) * terms["mse"] + terms.get("vb", 0.0)

    def settings(self) -> dict[str, Any]:
        """Bound of the min-SNR weights, and the diffusion."""
        gamma = None if self.weight is None else self.weight.gamma
        diffusion = {name: value for name, value in self.diffusion.config.items() if name in DIFFUSION}
        return {"objective": self.name, "snr_gamma": gamma, "diffusion": diffusion}
