"""The entry for `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipelines/dit_class_cond")`."""

from dit_hf import DiTClassCondPipeline


__all__ = ["DiTClassCondPipeline"]
