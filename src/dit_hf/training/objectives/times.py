"""Distributions of the times that flow matching trains at."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...command_line import real
from ..config import POSITIVE


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
