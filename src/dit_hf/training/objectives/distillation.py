"""Distillation of a velocity model into jumps to the data: the network learns where its own trajectories end.

Shapes: `B` samples, `J` jumps per trajectory, `C` latent channels, `h w` latent size.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ...data.fingerprints import checksum
from ...models import DiTTransformer2DModel
from ...schedulers import SchedulerRecipe, make_scheduler, trained_options
from ..config import WEIGHT
from ..finetuning import drop_interval
from .auxiliary import AuxiliaryLoss
from .discriminator import Discriminator
from .flow import NUM_TRAIN_TIMESTEPS
from .flow_maps import FlowMap, Points
from .times import LogitNormal


# Steps of the teacher's solver, and the jumps that start along its trajectory, at equal distances.
TEACHER_STEPS = 8
JUMPS = 4
# The most noise that a discriminator sees, as a noise level; less is more frequent.
MAX_END_LEVEL = 0.6


@dataclass(frozen=True)
class DistillationObjective(FlowMap):
    """
    Knowledge distillation (https://arxiv.org/abs/2101.02388) from four points of a trajectory. A frozen copy of the
    model samples from noise in 8 guided UniPC steps, and the network u(x, t, 0) learns the jumps from sigma 1, 0.75,
    0.5 and 0.25 of this trajectory to its end: x_0 = x_t - t·u. With the other samples of a batch it learns the
    teacher's velocity, without guidance, so it remains a velocity model for any scheduler and guidance scale.

    Squared errors blur the ends of long jumps. With an `adversarial_weight` a [`Discriminator`] learns to tell them
    from the teacher's samples, and the jumps learn to look like these.

    Args:
        teacher (`DiTTransformer2DModel`): A velocity model, or a flow map, whose velocity is taken; it is copied.
        flow_matching_ratio (`float`, defaults to 0.75):
            Fraction of samples with the velocity as target. The others are trajectories, with four jumps each.
        guidance_scale (`float`, defaults to 1.0): Of the teacher; 1 is no guidance.
        guidance_start (`float`, defaults to 0.0): Noise level from which the teacher is guided.
        guidance_end (`float`, defaults to 1.0): Noise level up to which the teacher is guided.
        shift (`float`, defaults to 1.0): Of the teacher's noise levels, and so of the jumps'.
        adversarial_weight (`float`, defaults to 0.0): Factor of the discriminator's loss; 0 is none.
        time_sampler (`Callable`, defaults to `LogitNormal()`): Draws the times of velocities.
    """

    teacher: DiTTransformer2DModel = field(
        repr=False, compare=False
    )  # a field without a default; the inherited is None
    flow_matching_ratio: float = 0.75
    guidance_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    shift: float = 1.0
    adversarial_weight: float = 0.0
    time_sampler: Callable[[int, torch.Generator], torch.Tensor] = LogitNormal()
    name: ClassVar[str] = "distillation"
    sampler: ClassVar[SchedulerRecipe] = "flow_lcm"
    num_jumps: ClassVar[int] = JUMPS
    # Of the last loss, for the discriminator: which samples are trajectories, and the noisy ends of their jumps.
    ends: list[tuple[torch.Tensor, Points, Points]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        super().__post_init__()
        WEIGHT.check("adversarial_weight", self.adversarial_weight)
        if self.flow_matching_ratio == 1:
            raise ValueError("`flow_matching_ratio` is 1, so that there is nothing to distil; lower it.")
        config = self.teacher.config
        if self.guidance_scale != 1 and (config.class_dropout_prob == 0 or config.guidance_in_weights is True):
            reason = "has no null class" if config.class_dropout_prob == 0 else "has guidance in its weights"
            raise ValueError(
                f"The guidance scale of the target is {self.guidance_scale}, but the model to distil {reason}; pass 1."
            )
        teacher = copy.deepcopy(self.teacher)
        if getattr(teacher, "peft_config", None):
            teacher.fuse_lora()
            teacher.unload_lora()
        if config.interval_embedding:
            teacher = drop_interval(teacher)
            teacher.register_to_config(guidance_in_weights=config.guidance_in_weights is True)
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))

    @property
    def guidance_in_weights(self) -> bool | str:
        """`"jumps"` if the teacher is guided by its scale, which the velocity is not; `True` if by its weights."""
        return "jumps" if self.guidance_scale != 1 else self.teacher.config.guidance_in_weights is True

    @property
    def loss_falls(self) -> bool:
        """Whether the squared error falls: not if the jumps have to look like samples, which may be farther away."""
        return not self.adversarial_weight

    def settings(self) -> dict[str, Any]:
        """All fields, those of guidance under the names of their flags, and the steps; of the teacher a checksum."""
        return {
            "objective": self.name,
            "teacher": checksum(self.teacher)[:16],
            "teacher_steps": TEACHER_STEPS,
            "jumps": JUMPS,
            "shift": float(self.shift),
            "adversarial_weight": float(self.adversarial_weight),
            **({"max_end_level": MAX_END_LEVEL} if self.adversarial_weight else {}),
            "flow_matching_ratio": float(self.flow_matching_ratio),
            "target_guidance_scale": float(self.guidance_scale),
            "target_guidance_start": float(self.guidance_start),
            "target_guidance_end": float(self.guidance_end),
            "time_sampler": str(self.time_sampler),
        }

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t and s of each sample, shape `(B, 2)`: equal for a velocity, 1 and 0 for a trajectory."""
        time = self.time_sampler(count, generator)
        times = torch.stack([time, time], dim=1)
        return torch.where(self.is_velocity(count)[:, None], times, torch.tensor([1.0, 0.0]))

    def draw_sample(
        self, shape: tuple[int, ...], time: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Noise for the ends of a trajectory's jumps, `(J, C, h, w)`, and its level for each, `(J,)`; 0 for others."""
        if not self.adversarial_weight:
            return {}
        level, noise = torch.zeros(JUMPS), torch.zeros(JUMPS, *shape)
        if time[1] < time[0]:
            torch.rand(JUMPS, generator=generator, out=level).square_().mul_(MAX_END_LEVEL)
            torch.randn(noise.shape, generator=generator, out=noise)
        return {"end_level": level, "end_noise": noise}

    def auxiliary_loss(self) -> AuxiliaryLoss | None:
        """A new [`Discriminator`], if it has a weight."""
        return Discriminator(self) if self.adversarial_weight else None

    def loss(self, transformer: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        As [`Objective.loss`]; the values are the mean squared errors to the teacher, of a trajectory's jumps on
        average, the gradients those of the adaptive losses.
        """
        points = self.points(batch)
        is_trajectory = points.until < points.time
        flows, trajectories = (rows.nonzero()[:, 0] for rows in (~is_trajectory, is_trajectory))
        velocities, jumps = points.at(flows), points.at(trajectories)
        if len(flows):
            velocities = replace(velocities, velocity=self.teacher_velocity(velocities, is_guided=False))
        if len(trajectories):
            jumps = self.jumps(jumps)
        rows = Points.cat([velocities, jumps])
        output = self.predict(transformer, rows)
        if self.adversarial_weight:
            noise = {name: batch[name][trajectories] for name in ("end_level", "end_noise")}
            student = self.noisy_ends(jumps, output[len(flows) :], noise)
            self.ends[:] = [(trajectories, student, self.noisy_ends(jumps, jumps.velocity, noise))]
        losses = self.sample_losses(output, {"target": rows.velocity})
        of_flows, of_jumps = losses.split([len(flows), len(losses) - len(flows)])
        of_trajectories = of_jumps.view(JUMPS, len(trajectories)).mean(dim=0)
        result = losses.new_zeros(len(is_trajectory))
        return result.index_copy(0, flows, of_flows).index_copy(0, trajectories, of_trajectories)

    def noisy_ends(self, jumps: Points, velocity: torch.Tensor, batch: dict[str, torch.Tensor]) -> Points:
        """
        Where jumps end, with the noise of `draw_sample`.

        Args:
            jumps (`Points`): J·B, from `jumps`.
            velocity (`torch.Tensor` of shape `(J·B, C, h, w)`): Mean velocity to the end.
            batch (`dict[str, torch.Tensor]`): Of their B samples: `end_level` and `end_noise`.

        Returns:
            `Points`: J·B, with times as a velocity model takes them; their own velocity is unused.
        """
        level, noise = batch["end_level"].T.flatten(), batch["end_noise"].transpose(0, 1).flatten(0, 1)
        ends = jumps.noisy - jumps.time[:, None, None, None] * velocity
        return replace(jumps, noisy=self.add_noise(ends, noise, level), time=level, until=level)

    def jumps(self, start: Points) -> Points:
        """
        Samples with the teacher.

        Args:
            start (`Points`): B of them, pure noise.

        Returns:
            `Points`: J·B, those of the first jump first; `velocity` is the mean velocity to the end.
        """
        scheduler = make_scheduler("flow_unipc", **trained_options("flow_unipc", {"shift": self.shift}))
        scheduler.set_timesteps(TEACHER_STEPS)
        noisy, passed = start.noisy, []
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            passed.append((noisy, torch.full_like(start.time, sigma.item())))
            level = timestep.item() / NUM_TRAIN_TIMESTEPS  # rounded, as the pipeline evaluates it
            is_guided = self.guidance_scale != 1 and self.guidance_start <= level <= self.guidance_end
            time = torch.full_like(start.time, level)
            velocity = self.teacher_velocity(replace(start, noisy=noisy, time=time, until=time), is_guided)
            noisy = scheduler.step(velocity, timestep, noisy, return_dict=False)[0]
        parts = []
        for point, time in passed[:: TEACHER_STEPS // JUMPS]:
            velocity = (point - noisy) / time[:, None, None, None]
            parts.append(replace(start, noisy=point, time=time, until=torch.zeros_like(time), velocity=velocity))
        return Points.cat(parts)

    def predict_teacher(self, points: Points) -> torch.Tensor:
        """The output of the teacher, which has one time; `(B, C, h, w)`."""
        time = self.timestep(points.time)
        output = self.teacher(points.noisy, time, points.label, force_drop_ids=points.drop, return_dict=False)[0]
        return output[:, : points.noisy.shape[1]].float()

    @torch.no_grad()
    def teacher_velocity(self, points: Points, is_guided: bool) -> torch.Tensor:
        """The teacher's velocity at points, `(B, C, h, w)`."""
        if not is_guided:
            return self.predict_teacher(points)
        keep = torch.zeros_like(points.label, dtype=torch.bool) if points.drop is None else points.drop
        both = Points.cat([replace(points, drop=keep), replace(points, drop=torch.ones_like(keep))])
        conditional, unconditional = self.predict_teacher(both).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
