"""The entry for `DiffusionPipeline.from_pretrained(..., custom_pipeline=..., trust_remote_code=True)`."""

from dit_hf import DiTClassCondPipeline


__all__ = ["DiTClassCondPipeline"]
