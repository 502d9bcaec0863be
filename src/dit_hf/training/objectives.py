"""Training objectives: what a transformer learns to predict, at which times, and how one step's samples are drawn.

An objective is an object with the interface of [`Objective`]. A new one is a subclass and, to be chosen by a flag, a
row of [`OBJECTIVES`]; `Trainer` takes any instance.

Shapes: `B` samples, `C` latent channels, `h w` latent size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin

from ..command_line import real
from ..data.latents import normalise_latents
from ..schedulers import DIFFUSION, SchedulerRecipe, make_scheduler
from .config import POSITIVE, SNR_GAMMA
from .losses import diffusion_loss, min_snr_weight, velocity_loss


# The timestep that the transformer is given for sigma = 1.
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Uniform:
    """Times uniform in [0, 1) (SiT, https://arxiv.org/abs/2401.08740)."""

    def __call__(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Times of shape `(count,)`."""
        return torch.rand(count, generator=generator)

    def __str__(self):
        return "uniform"


@dataclass(frozen=True)
class LogitNormal:
    """
    Times whose logit is normal (Stable Diffusion 3, https://arxiv.org/abs/2403.03206, eq. 19); `ValueError` if its
    mean is not finite, or its deviation not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        real().check("mean", self.mean)
        POSITIVE.check("std", self.std)

    def __call__(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Times of shape `(count,)`."""
        return (self.mean + self.std * torch.randn(count, generator=generator)).sigmoid()

    def __str__(self):
        return "logit_normal" if self == LogitNormal() else f"logit_normal({self.mean}, {self.std})"


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


class Objective(ABC):
    """
    What a transformer is trained on. Subclasses define the four methods; `loss` is their composition and may be
    overridden when one forward pass is not enough.

    Attributes:
        name (`str`): Recorded with the run and on the model card.
        prediction (`str`): What the sampler takes the output for, as `dit_hf.schedulers.trained_prediction` names it.
        sampler (`str`): Recipe of `make_scheduler` that samples a model trained with this objective.
        learn_sigma (`bool`): Whether a new model also predicts its variance.
    """

    name: ClassVar[str]
    prediction: ClassVar[str]
    sampler: ClassVar[SchedulerRecipe]
    learn_sigma: ClassVar[bool] = False

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
        """What makes a run with this objective the same run when it is resumed, as JSON values."""
        return {"objective": self.name}


@dataclass(frozen=True)
class VelocityObjective(Objective):
    """
    Flow matching on the straight path from data to noise: the target is noise - data.

    Args:
        time_sampler (`Callable`, defaults to `LogitNormal()`): Draws sigma in [0, 1] from a count and a generator.
        cosine_loss (`bool`, defaults to `False`): Adds LightningDiT's direction loss.
    """

    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal()
    cosine_loss: bool = False
    name: ClassVar[str] = "velocity"
    prediction: ClassVar[str] = "velocity"
    sampler: ClassVar[SchedulerRecipe] = "flow_euler"

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Sigma of each sample, shape `(B,)`."""
        return self.time_sampler(count, generator)

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) · data + sigma · noise."""
        sigma = time[:, None, None, None]
        return (1 - sigma) * x_start + sigma * noise

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        """1000 · sigma, as diffusers' flow matching schedulers count."""
        return time * NUM_TRAIN_TIMESTEPS

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


TIME_SAMPLERS = {"uniform": Uniform, "logit_normal": LogitNormal}


@dataclass(frozen=True)
class ObjectiveRow:
    """A row of [`OBJECTIVES`]: the class, the flags it takes, and how it is built from a scheduler and these flags."""

    kind: type[Objective]
    flags: tuple[str, ...]
    build: Callable[..., Objective]


OBJECTIVES = {
    "velocity": ObjectiveRow(
        VelocityObjective,
        ("time_sampling", "cosine_loss"),
        lambda scheduler, time_sampling, cosine_loss: VelocityObjective(TIME_SAMPLERS[time_sampling](), cosine_loss),
    ),
    "epsilon": ObjectiveRow(
        EpsilonObjective,
        ("snr_gamma",),
        lambda scheduler, snr_gamma: EpsilonObjective(scheduler, None if snr_gamma is None else MinSNR(snr_gamma)),
    ),
}


def draw_batch(
    latents,
    objective: Objective,
    indices: torch.Tensor,
    generator: torch.Generator,
    process_slice: slice,
    flip_probability: float,
    class_dropout_prob: float,
) -> dict[str, torch.Tensor]:
    """
    One process's slice of one step's batch. Random choices are drawn for the whole batch and then sliced, so that they
    do not depend on the number of processes.

    Args:
        latents (`CachedLatents` or `EncodedImages`): Where posteriors come from.
        objective (`Objective`): Draws the times.
        indices (`torch.Tensor` of shape `(batch,)`, int64): The step's samples, of all processes.
        generator (`torch.Generator`): The step's, on the CPU.
        process_slice (`slice`): The process's B samples.
        flip_probability (`float`): Fraction of mirrored images.
        class_dropout_prob (`float`): Fraction of samples whose label is dropped.

    Returns:
        `dict[str, torch.Tensor]`: `x_start` and `noise` of shape `(B, C, h, w)`; `time`, `label` and `drop` (bool)
        with first dimension B; `features` if the latents have them.
    """
    count = len(indices)
    flipped = torch.rand(count, generator=generator) < flip_probability
    dropped = torch.rand(count, generator=generator) < class_dropout_prob
    time = objective.draw_time(count, generator)
    read = latents.read(indices[process_slice], flipped[process_slice])
    mean = normalise_latents(read.pop("mean"), *latents.statistics)
    std = normalise_latents(read.pop("std"), [0.0], latents.statistics[1])
    draws = torch.randn((2, count, *mean.shape[1:]), generator=generator)[:, process_slice]
    batch = {"x_start": mean + std * draws[0], "noise": draws[1]}
    return read | batch | {"time": time[process_slice], "drop": dropped[process_slice]}
