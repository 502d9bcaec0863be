"""Class-conditional Diffusion Transformers for diffusers."""

# diffusers names a component's library after its module and looks for these two base classes in it.
from diffusers import ModelMixin, SchedulerMixin

from ._version import __version__
from .pipeline_dit_class_cond import DiTClassCondPipeline
from .schedulers import make_scheduler
from .transformer_dit import DiTTransformer2DModel


__all__ = [
    "DiTClassCondPipeline",
    "DiTTransformer2DModel",
    "ModelMixin",
    "SchedulerMixin",
    "__version__",
    "make_scheduler",
]

# Saved folders then name the library `dit_hf`, whatever file a class moves to.
for _cls in (DiTClassCondPipeline, DiTTransformer2DModel):
    _cls.__module__ = __name__
