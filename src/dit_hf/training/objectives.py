"""One step's random choices and its loss, for the diffusion of the paper and for flow matching.

Shapes: `B` samples, `C` latent channels, `h w` latent size.
"""

from dataclasses import dataclass, field

import torch
from diffusers import SchedulerMixin

from ..data.latents import normalise_latents
from ..schedulers import make_scheduler
from .losses import diffusion_loss, min_snr_weight, velocity_loss


# Of flow matching: sigma 1 is this timestep.
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Objective:
    """
    What a transformer learns to predict, and at which times.

    Args:
        prediction (`str`, defaults to `"velocity"`): `"velocity"` of flow matching, or `"epsilon"` of the paper.
        time_sampling (`str`, defaults to `"logit_normal"`): Of flow matching's sigma; or `"uniform"`.
        snr_gamma (`float`, *optional*): Bound of min-SNR weights for epsilon.
        cosine_loss (`bool`, defaults to `False`): Whether velocity's direction counts as well.
        diffusion (`SchedulerMixin`, defaults to the paper's): That adds epsilon's noise.
    """

    prediction: str = "velocity"
    time_sampling: str = "logit_normal"
    snr_gamma: float | None = None
    cosine_loss: bool = False
    diffusion: SchedulerMixin = field(default_factory=lambda: make_scheduler("ddpm"))

    def draw_time(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """
        Times of `count` samples.

        Args:
            count (`int`): B.
            generator (`torch.Generator`): On the CPU.

        Returns:
            `torch.Tensor` of shape `(B,)`: timesteps of the diffusion (int64) for epsilon, sigma in [0, 1] for velocity.
        """
        if self.prediction == "epsilon":
            return torch.randint(0, self.diffusion.config.num_train_timesteps, (count,), generator=generator)
        if self.time_sampling == "uniform":
            return torch.rand(count, generator=generator)
        return torch.randn(count, generator=generator).sigmoid()

    def loss(self, transformer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The loss of each sample.

        Args:
            transformer (`DiTTransformer2DModel`): Possibly wrapped.
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B,)`
        """
        x_start, noise, time = batch["x_start"], batch["noise"], batch["time"]
        if self.prediction == "epsilon":
            noisy, timestep = self.diffusion.add_noise(x_start, noise, time), time
        else:
            sigma = time[:, None, None, None]
            noisy, timestep = (1 - sigma) * x_start + sigma * noise, time * NUM_TRAIN_TIMESTEPS
        # Without `drop`, which a model without null class takes not, nothing is dropped either.
        output = transformer(noisy, timestep, batch["label"], force_drop_ids=batch.get("drop"), return_dict=False)[0]
        if self.prediction == "velocity":
            terms = velocity_loss(output, x_start, noise)
            return terms["loss"] + terms["cosine"] if self.cosine_loss else terms["loss"]
        terms = diffusion_loss(output, x_start, noise, time, self.diffusion)
        if self.snr_gamma is None:
            return terms["loss"]
        return min_snr_weight(time, self.diffusion, self.snr_gamma) * terms["mse"] + terms.get("vb", 0.0)


def draw_batch(
    latents,
    objective: Objective,
    indices: torch.Tensor,
    generator: torch.Generator,
    share: slice,
    flip_probability: float,
    class_dropout_prob: float,
) -> dict[str, torch.Tensor]:
    """
    A process's share of one step. All choices are drawn for the whole batch, so that they do not depend on the share.

    Args:
        latents (`CachedLatents` or `EncodedImages`): Where posteriors come from.
        objective (`Objective`): Draws the times.
        indices (`torch.Tensor` of shape `(batch,)`, int64): The step's samples, of all processes.
        generator (`torch.Generator`): The step's, on the CPU.
        share (`slice`): Of the batch; B samples.
        flip_probability (`float`): Share of mirrored images.
        class_dropout_prob (`float`): Share of samples whose label is dropped.

    Returns:
        `dict[str, torch.Tensor]`: `x_start` and `noise` of shape `(B, C, h, w)`; `time` and `label` of shape `(B,)`; `drop`
        `(B,)` if labels are dropped at all; `features` if there are.
    """
    count = len(indices)
    flipped = torch.rand(count, generator=generator) < flip_probability
    dropped = torch.rand(count, generator=generator) < class_dropout_prob
    time = objective.draw_time(count, generator)
    read = latents.read(indices[share], flipped[share])
    mean = normalise_latents(read.pop("mean"), *latents.statistics)
    std = normalise_latents(read.pop("std"), [0.0], latents.statistics[1])
    draws = torch.randn((2, count, *mean.shape[1:]), generator=generator)[:, share]
    batch = read | {"x_start": mean + std * draws[0], "noise": draws[1], "time": time[share]}
    return batch | ({"drop": dropped[share]} if class_dropout_prob > 0 else {})
