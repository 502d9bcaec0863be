"""Objectives of flow maps, which sample in a few steps: what they have in common, MeanFlow and SoFlow.

The network u(x, t, r) takes two times, t for the noisy input and r <= t for where it goes: x_r = x_t - (t - r)·u. With
r = t it is the velocity. A part of the samples is trained on the velocity, which MeanFlow's and SoFlow's targets need.
Classifier-free guidance is put into the targets, so sampling needs none.

Shapes: `B` samples, `C` latent channels, `h w` latent size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.models.attention_dispatch import attention_backend

from ...schedulers import SchedulerRecipe
from ..config import FRACTION, GUIDANCE
from ..losses import adaptive_loss, with_value
from .flow import StraightPath
from .times import LogitNormal


# The smallest distance between two times of SoFlow's consistency loss.
MIN_INTERVAL = 1e-4
EPS = 0.01
# What is guided: all targets, or those of intervals, where the velocity stays as it is.
GUIDED = ("all", "jumps")


@contextmanager
def forward_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside of it a model can be differentiated in forward mode: fused attention and compiled blocks can't be."""
    processors: list[Any] = [getattr(module, "processor", None) for module in model.modules()]
    chosen = [part for part in processors if getattr(part, "_attention_backend", None) is not None]
    backends = [processor._attention_backend for processor in chosen]
    try:
        for processor in chosen:
            processor._attention_backend = None
        with attention_backend("_native_math"), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for processor, backend in zip(chosen, backends, strict=True):
            processor._attention_backend = backend


@dataclass(frozen=True)
class Points:
    """
    Noisy samples, where they go, and the direction in which they leave.

    Args:
        noisy (`torch.Tensor` of shape `(B, C, h, w)`): x_t.
        time (`torch.Tensor` of shape `(B,)`): t.
        until (`torch.Tensor` of shape `(B,)`): r, at most t.
        velocity (`torch.Tensor` of shape `(B, C, h, w)`): dx/dt.
        label (`torch.Tensor` of shape `(B,)`, int64): Class ids.
        drop (`torch.Tensor` of shape `(B,)`, *optional*): Whose labels are dropped.
    """

    noisy: torch.Tensor
    time: torch.Tensor
    until: torch.Tensor
    velocity: torch.Tensor
    label: torch.Tensor
    drop: torch.Tensor | None

    def at(self, rows: torch.Tensor) -> "Points":
        """The points of some rows."""
        drop = None if self.drop is None else self.drop[rows]
        times = self.time[rows], self.until[rows]
        return Points(self.noisy[rows], *times, self.velocity[rows], self.label[rows], drop)

    @classmethod
    def cat(cls, parts: Sequence["Points"]) -> "Points":
        """All points of several batches, one batch after the other."""
        columns: dict[str, Any] = {entry.name: [getattr(part, entry.name) for part in parts] for entry in fields(cls)}
        for name, column in columns.items():
            columns[name] = None if all(part is None for part in column) else torch.cat(column)
        return cls(**columns)


class FlowMap(StraightPath):
    """What all objectives of flow maps have in common: velocities and jumps are rows of one batch."""

    flow_matching_ratio: float
    guidance_scale: float
    guidance_start: float
    guidance_end: float
    # Arguments of a new model: its times are not multiplied by 1000, as derivatives by time would be.
    transformer_config: ClassVar[dict[str, Any]] = {"interval_embedding": True, "timestep_scale": 0.001}
    num_jumps: ClassVar[int] = 1

    def __post_init__(self):
        for name in ("flow_matching_ratio", "guidance_start", "guidance_end"):
            FRACTION.check(name, getattr(self, name))
        GUIDANCE.check("guidance_scale", self.guidance_scale)
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"`guidance_start` is {self.guidance_start}, which must be less than `guidance_end`, "
                f"{self.guidance_end}, or nothing is guided."
            )

    def is_velocity(self, count: int) -> torch.Tensor:
        """Which places of a batch are trained on the velocity: evenly spread, so each slice has as many. `(count,)`"""
        places = torch.arange(count + 1, dtype=torch.float64)
        # A product of decimals may miss a whole number by its rounding.
        return (places * self.flow_matching_ratio + 1e-6).floor().diff() > 0

    def predict(self, transformer: Callable[..., Any], points: Points) -> torch.Tensor:
        """u at the points, `(B, C, h, w)`; without the variance of a SiT."""
        times = {"r_timestep": self.timestep(points.until), "force_drop_ids": points.drop}
        output = transformer(points.noisy, self.timestep(points.time), points.label, **times, return_dict=False)[0]
        return output[:, : points.noisy.shape[1]]

    def points(self, batch: dict[str, torch.Tensor]) -> Points:
        """The points of a batch; they leave in the direction of their sample."""
        time, until = batch["time"].unbind(dim=1)
        noisy = self.add_noise(batch["x_start"], batch["noise"], time)
        return Points(noisy, time, until, batch["noise"] - batch["x_start"], batch["label"], batch.get("drop"))

    def sample_losses(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The adaptively weighted squared error to `target`, the mean over a sample's values."""
        error = (output - batch["target"]).square().flatten(1).mean(dim=1)
        return with_value(adaptive_loss(error, EPS, 1.0), error)


@dataclass(frozen=True)
class FlowMapObjective(FlowMap):
    """
    What MeanFlow and SoFlow have in common.

    Args:
        flow_matching_ratio (`float`, defaults to 0.75): Fraction of samples that are trained on the velocity, r = t.
        guidance_scale (`float`, defaults to 1.0): Effective scale of the guidance in the targets; 1 is none.
        guidance_mix (`float`, defaults to 1.0):
            Weight of the sample's velocity in the target; the rest is the network's for its label. Less than 1 lowers
            the target's variance.
        guidance_start (`float`, defaults to 0.0): Noise level from which targets are guided.
        guidance_end (`float`, defaults to 1.0): Noise level up to which targets are guided.
        guided (`str`, defaults to `"all"`):
            `"all"` guides the velocity as well. `"jumps"` guides samples with r < t alone: the network remains a
            velocity model, for any scheduler and guidance scale, and learns the jumps of its own guided samples.
    """

    flow_matching_ratio: float = 0.75
    guidance_scale: float = 1.0
    guidance_mix: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guided: str = "all"

    def __post_init__(self):
        super().__post_init__()
        FRACTION.check("guidance_mix", self.guidance_mix)
        if self.guided not in GUIDED:
            raise ValueError(f"`guided` is {self.guided!r}; it must be {' or '.join(GUIDED)}.")
        if self.flow_matching_ratio == 1 and self.guided == "jumps":
            raise ValueError('`flow_matching_ratio` is 1, so that there are no jumps for `guided="jumps"`; lower it.')
        if self.guidance_mix == 0 and self.guided == "all":
            raise ValueError(
                "`guidance_mix` is 0, so that the velocity would be its own target; pass a larger one, or "
                '`guided="jumps"`.'
            )

    @property
    def guidance_in_weights(self) -> bool | str:
        """Whether targets are guided, so that sampling must not guide again; `"jumps"` if only those are."""
        if self.guidance_scale == 1:
            return False
        return True if self.guided == "all" else self.guided

    def settings(self) -> dict[str, Any]:
        """All fields, those of guidance under the names of their flags; distributions of times by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {"objective": self.name} | {
            f"target_{name}" if name.startswith("guid") else name: float(value)
            if isinstance(value, (int, float))
            else str(value)
            for name, value in values.items()
        }

    def scale(self, time: torch.Tensor) -> torch.Tensor:
        """The effective scale of the guidance at a noise level, `(B,)`."""
        is_guided = (time >= self.guidance_start) & (time <= self.guidance_end)
        return torch.where(is_guided, self.guidance_scale, 1.0)

    def guidance(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights in the target of the sample's velocity, and of the network's with and without label, `(B,)` each."""
        scale, mix = self.scale(time), self.guidance_mix
        if self.guided == "jumps":
            return mix * scale, (1 - mix) * scale, 1 - scale
        # The network's own velocity is guided already.
        return mix * scale, torch.full_like(time, 1 - mix), mix * (1 - scale)

    @torch.no_grad()
    def guide(self, transformer: Callable[..., Any], points: Points, rows: torch.Tensor) -> Points:
        """
        Gives points the direction of the guided path; without a label they keep their own.

        Args:
            transformer (`DiTTransformer2DModel`): The network; its present weights, without gradient.
            points (`Points`): Of a batch.
            rows (`torch.Tensor` of shape `(R,)`, int64): Which of them jump, r < t.

        Returns:
            `Points`
        """
        is_plain = self.guidance_scale == 1 and (self.guided == "all" or self.guidance_mix == 1)
        if is_plain or (self.guided == "jumps" and len(rows) == 0):
            return points
        part = points.at(rows) if self.guided == "jumps" else points
        if part.drop is None:
            raise ValueError("Guided targets need the null class; train a model that has one.")
        of_sample, of_label, of_null = (weight[:, None, None, None] for weight in self.guidance(part.time))
        here = replace(part, until=part.time)
        null = self.predict(transformer, replace(here, drop=torch.ones_like(part.drop)))
        guided = of_sample * part.velocity + of_null * null
        if self.guidance_mix < 1:
            guided += of_label * self.predict(transformer, here)
        guided = torch.where(part.drop.bool()[:, None, None, None], part.velocity, guided)
        if part is not points:
            guided = points.velocity.index_copy(0, rows, guided.to(points.velocity.dtype))
        return replace(points, velocity=guided)


@dataclass(frozen=True)
class MeanFlowObjective(FlowMapObjective):
    """
    MeanFlow (https://arxiv.org/abs/2505.13447): the mean velocity over [r, t], by its identity
    u = v - (t - r)·du/dt, where du/dt is a forward-mode derivative along (v, dr = 0, dt = 1). With ω and κ of the
    paper, `guidance_scale` is ω/(1 - κ) and `guidance_mix` is 1 - κ.

    Args:
        flow_matching_ratio (`float`, defaults to 0.75): This and the following as of [`FlowMapObjective`].
        guidance_scale (`float`, defaults to 1.0): Likewise.
        guidance_mix (`float`, defaults to 1.0): Likewise.
        guidance_start (`float`, defaults to 0.0): Likewise.
        guidance_end (`float`, defaults to 1.0): Likewise.
        guided (`str`, defaults to `"all"`): Likewise.
        time_sampler (`Callable`, defaults to `LogitNormal(-0.4, 1.0)`): Draws two times, the larger of which is t.
        power (`float`, defaults to 1.0): Power of the adaptive weight.
    """

    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal(-0.4, 1.0)
    power: float = 1.0
    name: ClassVar[str] = "meanflow"
    forward_mode: ClassVar[bool] = True
    sampler: ClassVar[SchedulerRecipe] = "flow_map"

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t and r of each sample, shape `(B, 2)`."""
        drawn = self.time_sampler(2 * count, generator).view(count, 2)
        time, until = drawn.amax(dim=1), drawn.amin(dim=1)
        return torch.stack([time, torch.where(self.is_velocity(count), time, until)], dim=1)

    def guidance(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of [`FlowMapObjective`], but where the velocity is not guided, it is the sample's alone."""
        weights = super().guidance(time)
        if self.guided == "jumps":
            return weights
        is_guided = self.scale(time) != 1
        of_sample, of_label, of_null = weights
        return torch.where(is_guided, of_sample, 1.0), is_guided * of_label, is_guided * of_null

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """As [`Objective.loss`]; the value is the mean squared error, the gradient that of the adaptive loss."""
        points = self.points(batch)
        output = self.predict(transformer, points)
        rows = (points.until < points.time).nonzero()[:, 0]  # the others need no derivative
        points = self.guide(transformer, points, rows)
        target = points.velocity
        if len(rows):
            part = points.at(rows)
            change = (part.time - part.until)[:, None, None, None] * self.total_derivative(transformer, part)
            target = target.index_add(0, rows, change.to(target.dtype), alpha=-1)
        return self.sample_losses(output, batch | {"target": target})

    @torch.no_grad()
    def total_derivative(self, transformer: Callable[..., Any], points: Points) -> torch.Tensor:
        """du/dt along the path, `(B, C, h, w)`, by one forward-mode pass of the bare model without compiled blocks."""
        model = extract_model_from_parallel(transformer)

        def mean_velocity(noisy, time):
            return self.predict(model, replace(points, noisy=noisy, time=time))

        with forward_mode(model):
            inputs, direction = (points.noisy, points.time), (points.velocity, torch.ones_like(points.time))
            return torch.func.jvp(mean_velocity, inputs, direction)[1]

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
        flow_matching_ratio (`float`, defaults to 0.75): This and the following as of [`FlowMapObjective`].
        guidance_scale (`float`, defaults to 1.0): Likewise.
        guidance_mix (`float`, defaults to 1.0): Likewise.
        guidance_start (`float`, defaults to 0.0): Likewise.
        guidance_end (`float`, defaults to 1.0): Likewise, but beyond it the scale falls smoothly to 1.
        guided (`str`, defaults to `"all"`): Likewise.
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
    loss_falls = False  # the rate of change is of an ever shorter distance
    sampler: ClassVar[SchedulerRecipe] = "flow_lcm"

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t and s of each sample, shape `(B, 2)`."""
        velocity_time = self.velocity_time_sampler(count, generator)
        time = self.time_sampler(count, generator).clamp(min=MIN_INTERVAL)
        until = self.until_time_sampler(count, generator).minimum(time - MIN_INTERVAL)
        is_velocity = self.is_velocity(count)
        times = (torch.where(is_velocity, velocity_time, drawn) for drawn in (time, until))
        return torch.stack([*times], dim=1)

    def scale(self, time: torch.Tensor) -> torch.Tensor:
        """As of [`FlowMapObjective`], but beyond `guidance_end` it falls smoothly to 1."""
        past = ((1 - time) / (1 - self.guidance_end or 1.0)).clamp(0, 1 - 1e-6)
        decay = torch.where(time <= self.guidance_end, 1.0, 1 - torch.exp(-0.025 * past / (1 - past)))
        return torch.where(time >= self.guidance_start, 1 + decay * (self.guidance_scale - 1), 1.0)

    def step(self, progress: torch.Tensor) -> torch.Tensor:
        """Distance of the two points, as a fraction of the interval, when so much of the training is done."""
        return self.first_step * (self.last_step / self.first_step) ** progress

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        As [`Objective.loss`]; the values are the mean squared error of a velocity and the mean squared rate of change
        of a solution, the gradients those of the adaptive losses.
        """
        points = self.points(batch)
        output = self.predict(transformer, points)
        rows = (points.until < points.time).nonzero()[:, 0]
        points = self.guide(transformer, points, rows)
        losses = self.sample_losses(output, batch | {"target": points.velocity})
        if len(rows) == 0:
            return losses
        change = self.rate_of_change(transformer, points.at(rows), output[rows], self.step(batch["progress"][rows]))
        squared = change.square().flatten(1).mean(dim=1)
        # d(solution)/d(output) = -(t - s): the gradient is that of half the weighted squared rate of change, times
        # distance / (t - s).
        product = -(output[rows] * change).flatten(1).mean(dim=1)
        consistency = with_value(product * (squared + EPS).pow(-self.power), squared)
        return losses.index_copy(0, rows, consistency.to(losses.dtype))

    @torch.no_grad()
    def rate_of_change(
        self, transformer: Callable[..., Any], points: Points, output: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        """Difference of the solutions from the points and from nearer ones, over their distance, `(B, C, h, w)`."""
        nearer = (points.time - step * (points.time - points.until)).minimum(points.time - MIN_INTERVAL)
        distance, rest, whole = (
            times[:, None, None, None]
            for times in (points.time - nearer, nearer - points.until, points.time - points.until)
        )
        moved = replace(points, noisy=points.noisy - distance * points.velocity, time=nearer)
        solution = moved.noisy - rest * self.predict(transformer, moved)
        return (points.noisy - whole * output - solution) / distance
