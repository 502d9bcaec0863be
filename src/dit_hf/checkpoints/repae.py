"""REPA-E (https://github.com/End2End-Diffusion/REPA-E): REPA on latents that a batch norm normalises."""

from dataclasses import replace

import torch

from .repa import REPA


STATISTICS = "bn."


def batch_norm_statistics(weights: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents, per channel, from the running statistics of the batch norm."""
    mean, variance = (weights[f"{STATISTICS}{name}"].double() for name in ("running_mean", "running_var"))
    return mean.tolist(), variance.sqrt().tolist()


REPAE = replace(
    REPA,
    name="repae",
    marks=(STATISTICS,),
    training_only=(*REPA.training_only, STATISTICS),
    latents_statistics=batch_norm_statistics,
    # With the autoencoder that was trained first, `e2e-vavae`: guidance for times up to 0.75, of steps from 1 to 0.
    recommended_call={"num_inference_steps": 250, "guidance_scale": 2.5, "guidance_interval": (0.25, 1.0)},
)
