"""Class-conditional Diffusion Transformers for diffusers."""

# diffusers names a component's library after its module and looks for these two base classes in it.
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from ._version import __version__
from .mixing import mix_classes
from .optimization import optimize, restore
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
    "mix_classes",
    "optimize",
    "restore",
]

# Then saved folders name the library `dit_hf`, and a repository that does so is not taken for a mistake.
LOADABLE_CLASSES.setdefault(__name__, LOADABLE_CLASSES["diffusers"])
