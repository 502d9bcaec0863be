"""Objectives of flow maps, which sample in one or two steps: MeanFlow and SoFlow.

The network u(x, t, r) takes two times, t for the noisy input and r <= t for where it goes: x_r = x_t - (t - r)·u. With
r = t it is the velocity. Both objectives train a part of the samples on the velocity, so the targets of the others are
right, and put classifier-free guidance into the target, so sampling needs none.

Shapes: `B` samples, `C` latent channels, `h w` latent size.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.models.attention_dispatch import attention_backend

from ...command_line import real
from ...schedulers import SchedulerRecipe
from ..config import FRACTION, GUIDANCE
from ..losses import adaptive_loss, with_value
from .flow import StraightPath
from .times import LogitNormal


# The smallest distance between two times of SoFlow's consistency loss.
MIN_INTERVAL = 1e-4
EPS = 0.01
MIX = real(above=0, at_most=1)


@dataclass(frozen=True)
class FlowMapObjective(StraightPath):
    """
    What MeanFlow and SoFlow have in common.

    Args:
        flow_matching_ratio (`float`, defaults to 0.75): Fraction of samples that are trained on the velocity, r = t.
        guidance_scale (`float`, defaults to 1.0): Effective scale of the guidance in the targets; 1 is none.
        guidance_mix (`float`, defaults to 1.0):
            Weight of the guided velocity of the sample in the target; the rest is the network's own velocity. Less
            than 1 lowers the target's variance.
        guidance_end (`float`, defaults to 1.0): Noise level up to which targets are guided.
    """

    flow_matching_ratio: float = 0.75
    guidance_scale: float = 1.0
    guidance_mix: float = 1.0
    guidance_end: float = 1.0
    # Arguments of a new model: its times are not multiplied by 1000, as derivatives by time would be.
    transformer_config: ClassVar[dict[str, Any]] = {"interval_embedding": True, "timestep_scale": 0.001}
    few_steps: ClassVar[bool] = True

    def __post_init__(self):
        FRACTION.check("flow_matching_ratio", self.flow_matching_ratio)
        GUIDANCE.check("guidance_scale", self.guidance_scale)
        MIX.check("guidance_mix", self.guidance_mix)
        FRACTION.check("guidance_end", self.guidance_end)

    @property
    def guidance_in_weights(self) -> bool:
        """Whether targets are guided, so that sampling must not guide again."""
        return self.guidance_scale != 1

    def settings(self) -> dict[str, Any]:
        """All fields; distributions of times by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {"objective": self.name} | {
            name: value if isinstance(value, float) else str(value) for name, value in values.items()
        }

    def is_velocity(self, count: int) -> torch.Tensor:
        """Which places of a batch are trained on the velocity: evenly spread, so each slice has as many. `(count,)`"""
        places = torch.arange(count + 1, dtype=torch.float64)
        # A product of decimals may miss a whole number by its rounding.
        return (places * self.flow_matching_ratio + 1e-6).floor().diff() > 0

    @abstractmethod
    def guidance(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights in the target of the sample's velocity, and of the network's with and without label, `(B,)` each."""

    def predict(
        self, transformer: Callable[..., Any], noisy, time, until, label, drop: torch.Tensor | None
    ) -> torch.Tensor:
        """u(noisy, time, until), `(B, C, h, w)`, for times of shape `(B,)`; without the variance of a SiT."""
        times = {"r_timestep": self.timestep(until), "force_drop_ids": drop}
        output = transformer(noisy, self.timestep(time), label, **times, return_dict=False)[0]
        return output[:, : noisy.shape[1]]

    @torch.no_grad()
    def target_velocity(
        self, transformer: Callable[..., Any], noisy: torch.Tensor, time: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """
        The guided velocity, and for samples without label their own.

        Args:
            transformer (`DiTTransformer2DModel`): The network; its present weights, without gradient.
            noisy (`torch.Tensor` of shape `(B, C, h, w)`): Inputs.
            time (`torch.Tensor` of shape `(B,)`): Their noise levels.
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`
        """
        velocity = batch["noise"] - batch["x_start"]
        if self.guidance_scale == 1:
            return velocity
        of_sample, of_label, of_null = (weight[:, None, None, None] for weight in self.guidance(time))
        dropped = batch["drop"].bool()
        null = self.predict(transformer, noisy, time, time, batch["label"], torch.ones_like(dropped))
        guided = of_sample * velocity + of_null * null
        if self.guidance_mix < 1:
            guided += of_label * self.predict(transformer, noisy, time, time, batch["label"], dropped)
        return torch.where(dropped[:, None, None, None], velocity, guided)


@dataclass(frozen=True)
class MeanFlowObjective(FlowMapObjective):
    """
    MeanFlow (https://arxiv.org/abs/2505.13447): the mean velocity over [r, t], by its identity
    u = v - (t - r)·du/dt, where du/dt is a forward-mode derivative along (v, dr = 0, dt = 1). With ω and κ of the
    paper, `guidance_scale` is ω/(1 - κ) and `guidance_mix` is 1 - κ.

    Args:
        flow_matching_ratio (`float`, defaults to 0.75): As of [`FlowMapObjective`].
        guidance_scale (`float`, defaults to 1.0): As of [`FlowMapObjective`].
        guidance_mix (`float`, defaults to 1.0): As of [`FlowMapObjective`].
        guidance_end (`float`, defaults to 1.0): The velocity of noisier samples is not guided.
        time_sampler (`Callable`, defaults to `LogitNormal(-0.4, 1.0)`): Draws two times, the larger of which is t.
        power (`float`, defaults to 1.0): Power of the adaptive weight.
    """

    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal(-0.4, 1.0)
    power: float = 1.0
    name: ClassVar[str] = "meanflow"
    sampler: ClassVar[SchedulerRecipe] = "flow_map"

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t and r of each sample, shape `(B, 2)`."""
        drawn = self.time_sampler(2 * count, generator).view(count, 2)
        time, until = drawn.amax(dim=1), drawn.amin(dim=1)
        return torch.stack([time, torch.where(self.is_velocity(count), time, until)], dim=1)

    def guidance(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ω, κ and 1 - ω - κ up to `guidance_end`; beyond it the velocity alone."""
        is_guided = time <= self.guidance_end
        of_sample = torch.where(is_guided, self.guidance_mix * self.guidance_scale, 1.0)
        of_label = torch.where(is_guided, 1 - self.guidance_mix, 0.0)
        return of_sample, of_label, 1 - of_sample - of_label

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """As [`Objective.loss`]; the value is the mean squared error, the gradient that of the adaptive loss."""
        time, until = batch["time"].unbind(dim=1)
        noisy, drop = self.add_noise(batch["x_start"], batch["noise"], time), batch.get("drop")
        output = self.predict(transformer, noisy, time, until, batch["label"], drop)
        target = self.target_velocity(transformer, noisy, time, batch)
        rows = (until < time).nonzero()[:, 0]  # the others need no derivative
        if len(rows):
            parts = (noisy, time, until, target, batch["label"], drop)
            derivative = self.total_derivative(transformer, *(None if part is None else part[rows] for part in parts))
            interval = (time - until)[rows, None, None, None]
            target = target.index_add(0, rows, interval * derivative.to(target.dtype), alpha=-1)
        return self.sample_losses(output, batch | {"target": target})

    @torch.no_grad()
    def total_derivative(self, transformer, noisy, time, until, velocity, label, drop) -> torch.Tensor:
        """du/dt along the path, `(B, C, h, w)`, by one forward-mode pass of the bare model without compiled blocks."""
        model = extract_model_from_parallel(transformer)

        def mean_velocity(noisy, time):
            return self.predict(model, noisy, time, until, label, drop)

        # Fused attention has no forward mode.
        with attention_backend("_native_math"), torch.compiler.set_stance("force_eager"):
            return torch.func.jvp(mean_velocity, (noisy, time), (velocity, torch.ones_like(time)))[1]

    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The adaptively weighted squared error to `target`, summed over a sample's values."""
        error = (output - batch["target"]).square().flatten(1)
        return with_value(adaptive_loss(error.sum(dim=1), EPS, self.power), error.mean(dim=1))


@dataclass(frozen=True)
class SoFlowObjective(FlowMapObjective):
    """
    SoFlow (https://arxiv.org/abs/2512.15657): the solution f(x_t, t, s) = x_t - (t - s)·u is the same from a point
    nearer to s on the path. The distance to this point falls during training, from `first_step` to `last_step` of the
    interval. It needs no forward-mode derivative.

    Args:
        flow_matching_ratio (`float`, defaults to 0.75): As of [`FlowMapObjective`].
        guidance_scale (`float`, defaults to 1.0): As of [`FlowMapObjective`].
        guidance_mix (`float`, defaults to 1.0): As of [`FlowMapObjective`].
        guidance_end (`float`, defaults to 1.0): Beyond it the scale of the guidance falls to 1.
        velocity_time_sampler (`Callable`, defaults to `LogitNormal(-0.2, 1.0)`): Draws t of velocities.
        time_sampler (`Callable`, defaults to `LogitNormal(0.2, 0.8)`): Draws t of solutions.
        until_time_sampler (`Callable`, defaults to `LogitNormal(-1.0, 0.8)`): Draws s, which is capped at t.
        first_step (`float`, defaults to 0.1): Fraction of the interval at the first step of the training.
        last_step (`float`, defaults to 0.002): At the last one.
        power (`float`, defaults to 1.0): Power of the adaptive weight of solutions.
    """

    velocity_time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal(-0.2, 1.0)
    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal(0.2, 0.8)
    until_time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal(-1.0, 0.8)
    first_step: float = 0.1
    last_step: float = 0.002
    power: float = 1.0
    name: ClassVar[str] = "soflow"
    sampler: ClassVar[SchedulerRecipe] = "flow_lcm"

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t and s of each sample, shape `(B, 2)`."""
        velocity_time = self.velocity_time_sampler(count, generator)
        time = self.time_sampler(count, generator).clamp(min=MIN_INTERVAL)
        until = self.until_time_sampler(count, generator).minimum(time - MIN_INTERVAL)
        is_velocity = self.is_velocity(count)
        times = (torch.where(is_velocity, velocity_time, drawn) for drawn in (time, until))
        return torch.stack([*times], dim=1)

    def guidance(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As MeanFlow's, but beyond `guidance_end` the scale falls smoothly to 1, and the mixture stays."""
        past = ((1 - time) / (1 - self.guidance_end or 1.0)).clamp(0, 1 - 1e-6)
        decay = torch.where(time <= self.guidance_end, 1.0, 1 - torch.exp(-0.025 * past / (1 - past)))
        of_null = self.guidance_mix * (1 - self.guidance_scale) * decay
        return self.guidance_mix - of_null, torch.full_like(time, 1 - self.guidance_mix), of_null

    def step(self, progress: torch.Tensor) -> torch.Tensor:
        """Distance of the two points, as a fraction of the interval, when so much of the training is done."""
        return self.first_step * (self.last_step / self.first_step) ** progress

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        As [`Objective.loss`]; the values are the mean squared error of a velocity and the mean squared rate of change
        of a solution, the gradients those of the adaptive losses.
        """
        time, until = batch["time"].unbind(dim=1)
        noisy, drop = self.add_noise(batch["x_start"], batch["noise"], time), batch.get("drop")
        output = self.predict(transformer, noisy, time, until, batch["label"], drop)
        velocity = self.target_velocity(transformer, noisy, time, batch)
        losses = self.sample_losses(output, batch | {"target": velocity})
        rows = (until < time).nonzero()[:, 0]
        if len(rows) == 0:
            return losses
        parts = (output, noisy, time, until, velocity, batch["label"], drop, batch["progress"])
        change = self.rate_of_change(transformer, *(None if part is None else part[rows] for part in parts))
        squared = change.square().flatten(1).mean(dim=1)
        # The solution changes against the output, so this has the gradient of half the weighted squared rate of
        # change, over the part of the interval that is left.
        product = -(output[rows] * change).flatten(1).mean(dim=1)
        consistency = with_value(product * (squared + EPS).pow(-self.power), squared)
        return losses.index_put((rows,), consistency)

    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The adaptively weighted squared error to `target`, the mean over a sample's values."""
        error = (output - batch["target"]).square().flatten(1).mean(dim=1)
        return with_value(adaptive_loss(error, EPS, 1.0), error)

    @torch.no_grad()
    def rate_of_change(self, transformer, output, noisy, time, until, velocity, label, drop, progress) -> torch.Tensor:
        """Difference of the solutions from `time` and from a nearer point, over their distance, `(B, C, h, w)`."""
        nearer = (time - self.step(progress) * (time - until)).minimum(time - MIN_INTERVAL)
        distance, rest, whole = (times[:, None, None, None] for times in (time - nearer, nearer - until, time - until))
        point = noisy - distance * velocity
        solution = point - rest * self.predict(transformer, point, nearer, until, label, drop)
        return (noisy - whole * output - solution) / distance
