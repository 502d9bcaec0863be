"""Distillation of a velocity model into jumps to the data: the network learns where its own trajectories end.

Shapes: `B` samples, `J` jumps per trajectory, `C` latent channels, `h w` latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ...schedulers import SchedulerRecipe, make_scheduler
from ..config import FRACTION, GUIDANCE
from .flow import NUM_TRAIN_TIMESTEPS
from .flow_maps import FlowMap, Points
from .times import LogitNormal


# Steps of the teacher's solver, and after how many of them the next jump starts.
TEACHER_STEPS = 8
STRIDE = 2


@dataclass(frozen=True)
class DistillationObjective(FlowMap):
    """
    Knowledge distillation (https://arxiv.org/abs/2101.02388) from four points of a trajectory. A frozen copy of the
    model samples from noise in 8 guided UniPC steps, and the network u(x, t, 0) learns the jumps from sigma 1, 0.75,
    0.5 and 0.25 of this trajectory to its end: x_0 = x_t - t·u. The other samples of a batch train the velocity on the
    data, so the network remains a velocity model for any scheduler and guidance scale.

    Args:
        teacher (`DiTTransformer2DModel`): A frozen velocity model on the device of the samples; `Trainer` moves it.
        flow_matching_ratio (`float`, defaults to 0.5):
            Fraction of samples that are trained on the velocity. The others are trajectories, with four jumps each.
        guidance_scale (`float`, defaults to 1.0): Of the teacher; 1 is no guidance.
        guidance_start (`float`, defaults to 0.0): Noise level from which the teacher is guided.
        guidance_end (`float`, defaults to 1.0): Noise level up to which the teacher is guided.
        time_sampler (`Callable`, defaults to `LogitNormal()`): Draws the times of velocities.
    """

    teacher: torch.nn.Module = field()
    flow_matching_ratio: float = 0.5
    guidance_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal()
    name: ClassVar[str] = "distillation"
    sampler: ClassVar[SchedulerRecipe] = "flow_lcm"

    def __post_init__(self):
        for name in ("flow_matching_ratio", "guidance_start", "guidance_end"):
            FRACTION.check(name, getattr(self, name))
        GUIDANCE.check("guidance_scale", self.guidance_scale)
        if self.flow_matching_ratio == 1:
            raise ValueError("`flow_matching_ratio` is 1, so that there is nothing to distil; lower it.")

    @property
    def guidance_in_weights(self) -> bool | str:
        """`"jumps"` if the teacher is guided: the velocity is not."""
        return False if self.guidance_scale == 1 else "jumps"

    def settings(self) -> dict[str, Any]:
        """All fields but the teacher, those of guidance under the names of their flags."""
        return {
            "objective": self.name,
            "flow_matching_ratio": self.flow_matching_ratio,
            "target_guidance_scale": self.guidance_scale,
            "target_guidance_start": self.guidance_start,
            "target_guidance_end": self.guidance_end,
            "time_sampler": str(self.time_sampler),
        }

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t and s of each sample, shape `(B, 2)`: equal for a velocity, 1 and 0 for a trajectory."""
        time = self.time_sampler(count, generator)
        times = torch.stack([time, time], dim=1)
        return torch.where(self.is_velocity(count)[:, None], times, torch.tensor([1.0, 0.0]))

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        As [`Objective.loss`]; the values are the mean squared errors of velocities, of a trajectory's jumps on
        average, the gradients those of the adaptive losses.
        """
        points = self.points(batch)
        is_trajectory = points.until < points.time
        velocities, trajectories = (points.at(rows.nonzero()[:, 0]) for rows in (~is_trajectory, is_trajectory))
        jumps = self.jumps(trajectories) if len(trajectories.time) else trajectories
        both = Points.cat([velocities, jumps])
        losses = self.sample_losses(self.predict(transformer, both), {"target": both.velocity})
        of_velocities, of_jumps = losses.split([len(velocities.time), len(jumps.time)])
        of_trajectories = of_jumps.view(TEACHER_STEPS // STRIDE, len(trajectories.time)).mean(dim=0)
        order = torch.cat([(~is_trajectory).nonzero(), is_trajectory.nonzero()])[:, 0]
        return torch.cat([of_velocities, of_trajectories])[order.argsort()]

    @torch.no_grad()
    def jumps(self, start: Points) -> Points:
        """
        Samples with the teacher.

        Args:
            start (`Points`): B of them, pure noise.

        Returns:
            `Points`: J·B, those of the first jump first; `velocity` is the mean velocity to the end.
        """
        scheduler = make_scheduler("flow_unipc")
        scheduler.set_timesteps(TEACHER_STEPS)
        here, passed = start, []
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            passed.append(replace(here, time=torch.full_like(start.time, sigma.item())))
            level = timestep.item() / NUM_TRAIN_TIMESTEPS  # rounded, as the pipeline evaluates it
            time = torch.full_like(start.time, level)
            is_guided = self.guidance_scale != 1 and self.guidance_start <= level <= self.guidance_end
            velocity = self.teacher_velocity(replace(here, time=time, until=time), is_guided)
            noisy = scheduler.step(velocity, timestep, here.noisy, return_dict=False)[0]
            here = replace(here, noisy=noisy.to(start.noisy.dtype))
        return Points.cat([self.jump(part, here.noisy) for part in passed[::STRIDE]])

    def jump(self, start: Points, end: torch.Tensor) -> Points:
        """The jumps from points to the data `(B, C, h, w)`."""
        velocity = (start.noisy - end) / start.time[:, None, None, None]
        return replace(start, until=torch.zeros_like(start.time), velocity=velocity)

    def teacher_velocity(self, points: Points, is_guided: bool) -> torch.Tensor:
        """The teacher's velocity at points, `(B, C, h, w)`."""
        if not is_guided:
            return self.predict(self.teacher, points).float()
        null = replace(points, drop=torch.ones_like(points.label, dtype=torch.bool))
        conditional, unconditional = self.predict(self.teacher, Points.cat([points, null])).float().chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
