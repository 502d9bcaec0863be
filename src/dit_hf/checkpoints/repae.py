"""REPA-E (https://github.com/End2End-Diffusion/REPA-E): REPA on latents that a batch norm normalises."""

from dataclasses import replace

import torch

from .repa import REPA


STATISTICS = "bn."


def batch_norm_statistics(weights: dict[str, torch.Tensor], channels: int) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation of the latents, per channel, from the running statistics of the batch norm;
    `ValueError` names the key that is missing or can't be one of these.
    """
    keys = [f"{STATISTICS}{name}" for name in ("running_mean", "running_var")]
    known = {*keys, f"{STATISTICS}num_batches_tracked"}
    if unknown := sorted(key for key in weights if key.startswith(STATISTICS) and key not in known):
        raise ValueError(f"the key {unknown[0]!r} is unknown.")
    for key in keys:
        if key not in weights:
            raise ValueError(f"the key {key!r} is missing.")
        if tuple(weights[key].shape) != (channels,):
            raise ValueError(f"{key!r} has shape {tuple(weights[key].shape)}, where {(channels,)} is needed.")
    mean, variance = (weights[key].double() for key in keys)
    if not (variance > 0).all():
        raise ValueError(f"{keys[1]!r} holds {variance.min().item():.3g}; a variance is above 0.")
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
