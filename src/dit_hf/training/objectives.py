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
from .batches import SeededBatches
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
class Shifted:
    """
    Times moved towards the noise, t to a·t / (1 + (a − 1)·t), as flow-matching schedulers do for `shift=a` (Stable
    Diffusion 3, https://arxiv.org/abs/2403.03206, eq. 23); RAE's a is the root of a latent's values over 4096.
    `ValueError` if a is not positive.
    """

    time_sampler: Callable[[int, torch.Generator], torch.Tensor]
    shift: float

    def __post_init__(self):
        POSITIVE.check("shift", self.shift)

    def __call__(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Times of shape `(count,)`."""
        return self.move(self.time_sampler(count, generator))

    def move(self, time: torch.Tensor) -> torch.Tensor:
        """Times of any shape, shifted."""
        return self.shift * time / (1 + (self.shift - 1) * time)

    def __str__(self):
        return f"{self.time_sampler}, shifted by {self.shift}"


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


TIME_SAMPLERS = ("uniform", "logit_normal")


def build_time_sampler(
    default: LogitNormal, time_sampling: str, time_mean: float | None, time_std: float | None, time_shift: float
) -> Callable[[int, torch.Generator], torch.Tensor]:
    """
    The times that the flags name.

    Args:
        default (`LogitNormal`): Of the objective, for what is not given.
        time_sampling (`str`): One of `TIME_SAMPLERS`.
        time_mean (`float`, *optional*): Of the logit.
        time_std (`float`, *optional*): Of the logit.
        time_shift (`float`): 1 for none.

    Returns:
        `Callable`: from a count and a generator to times.

    Raises:
        ValueError: if uniform times are given the mean or deviation of a logit.
    """
    sampler: Callable[[int, torch.Generator], torch.Tensor]
    if time_sampling == "logit_normal":
        mean, std = (
            own if given is None else given for given, own in ((time_mean, default.mean), (time_std, default.std))
        )
        sampler = LogitNormal(mean, std)
    elif time_mean is None and time_std is None:
        sampler = Uniform()
    else:
        raise ValueError("--time_mean and --time_std are of --time_sampling logit_normal; omit them.")
    return sampler if time_shift == 1 else Shifted(sampler, time_shift)


def _build_velocity(scheduler, config, cosine_loss, **times):
    return VelocityObjective(build_time_sampler(VelocityObjective.time_sampler, **times), cosine_loss)


def _build_clamped_velocity(scheduler, config, cosine_loss, **times):
    sampler = build_time_sampler(ClampedVelocityObjective.time_sampler, **times)
    return ClampedVelocityObjective(sampler, cosine_loss, config["t_eps"], config["noise_scale"])


def _build_epsilon(scheduler, config, snr_gamma):
    return EpsilonObjective(scheduler, None if snr_gamma is None else MinSNR(snr_gamma))


@dataclass(frozen=True)
class ObjectiveRow:
    """
    A row of [`OBJECTIVES`]: the class, the models that can be trained on it, the flags it takes, and how it is built
    from a scheduler, the model's config and these flags.
    """

    kind: type[Objective]
    models: tuple[str, ...]
    flags: tuple[str, ...]
    build: Callable[..., Objective]


FLOW_FLAGS = ("time_sampling", "time_mean", "time_std", "time_shift", "cosine_loss")
# A model's objective, if none is asked for, is the first that it can be trained on.
OBJECTIVES = {
    "velocity": ObjectiveRow(
        VelocityObjective, ("DiTTransformer2DModel", "DDTTransformer2DModel"), FLOW_FLAGS, _build_velocity
    ),
    "clamped_velocity": ObjectiveRow(
        ClampedVelocityObjective, ("JiTTransformer2DModel",), FLOW_FLAGS, _build_clamped_velocity
    ),
    "epsilon": ObjectiveRow(EpsilonObjective, ("DiTTransformer2DModel",), ("snr_gamma",), _build_epsilon),
}


def choose_objective(name: str | None, model: str) -> str:
    """
    The objective that a model is trained on.

    Args:
        name (`str`, *optional*): What was asked for, a name of [`OBJECTIVES`].
        model (`str`): The name of the model's class.

    Returns:
        `str`: a name of [`OBJECTIVES`].

    Raises:
        ValueError: if the model can't be trained on it.
    """
    fitting = [objective for objective, row in OBJECTIVES.items() if model in row.models]
    if name is not None and name not in fitting:
        raise ValueError(f"A {model} is not trained with --objective {name}; pass --objective {' or '.join(fitting)}.")
    return name or fitting[0]


def draw_batch(
    latents,
    objective: Objective,
    batches: SeededBatches,
    step: int,
    process_slice: slice,
    flip_probability: float,
    class_dropout_prob: float,
) -> dict[str, torch.Tensor]:
    """
    One process's slice of one step's batch. It does not depend on the number of processes: a sample's mirroring, time
    and dropped label are drawn for the whole batch and then sliced, its noise has a generator of its own.

    Args:
        latents (`CachedLatents` or `EncodedImages`): Where posteriors come from.
        objective (`Objective`): Draws the times.
        batches (`SeededBatches`): The samples of each step, of all processes, and the generators of their draws.
        step (`int`): Counted from 0.
        process_slice (`slice`): The process's B samples.
        flip_probability (`float`): Fraction of mirrored images.
        class_dropout_prob (`float`): Fraction of samples whose label is dropped.

    Returns:
        `dict[str, torch.Tensor]`: `x_start` and `noise` of shape `(B, C, h, w)`; `time`, `label` and `drop` (bool)
        with first dimension B; `features` if the latents have them.
    """
    indices, generator = batches.indices(step), batches.generator(step)
    count = len(indices)
    flipped = torch.rand(count, generator=generator) < flip_probability
    dropped = torch.rand(count, generator=generator) < class_dropout_prob
    time = objective.draw_time(count, generator)
    read = latents.read(indices[process_slice], flipped[process_slice])
    mean = normalise_latents(read.pop("mean"), *latents.statistics)
    std = normalise_latents(read.pop("std"), [0.0], latents.statistics[1])
    noise, draws = torch.empty_like(mean), torch.empty_like(mean)
    for row, place in enumerate(range(*process_slice.indices(count))):
        source = batches.sample_generator(step, place)
        torch.randn(noise[row].shape, generator=source, out=noise[row])
        if std[row].any():  # a deterministic autoencoder has nothing to draw
            torch.randn(draws[row].shape, generator=source, out=draws[row])
        else:
            draws[row] = 0
    batch = {"x_start": mean + std * draws, "noise": noise}
    return read | batch | {"time": time[process_slice], "drop": dropped[process_slice]}
