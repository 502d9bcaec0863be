"""REPA-E (https://github.com/End2End-Diffusion/REPA-E): REPA on latents that a batch norm normalises."""

from dataclasses import replace

from .repa import REPA


STATISTICS = "bn."

REPAE = replace(
    REPA,
    name="repae",
    marks=(STATISTICS,),
    training_only=(*REPA.training_only, STATISTICS),
    # With the autoencoder that was trained first, `e2e-vavae`: guidance for times up to 0.75, of steps from 1 to 0.
    recommended_call={"num_inference_steps": 250, "guidance_scale": 2.5, "guidance_interval": (0.25, 1.0)},
)
