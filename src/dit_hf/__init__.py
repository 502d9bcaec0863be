"""Class-conditional Diffusion Transformers for diffusers."""

import importlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    # diffusers names a component's library after its module, and looks for these two base classes in it.
    from diffusers import ModelMixin, SchedulerMixin

    from .mixing import mix_classes
    from .models import DDTTransformer2DModel, DiTTransformer2DModel, JiTTransformer2DModel
    from .optimization import optimize, restore
    from .pipeline import DiTClassCondPipeline
    from .schedulers import make_scheduler
    from .scheduling_flow_match_sde import FlowMatchSDEScheduler
    from .scheduling_flow_match_truncated_euler import FlowMatchTruncatedEulerScheduler

# Public name -> its module, imported when the name is used first.
_MODULES = {
    "DDTTransformer2DModel": ".models",
    "DiTClassCondPipeline": ".pipeline",
    "DiTTransformer2DModel": ".models",
    "FlowMatchSDEScheduler": ".scheduling_flow_match_sde",
    "FlowMatchTruncatedEulerScheduler": ".scheduling_flow_match_truncated_euler",
    "JiTTransformer2DModel": ".models",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "make_scheduler": ".schedulers",
    "mix_classes": ".mixing",
    "optimize": ".optimization",
    "restore": ".optimization",
}

_lock = threading.RLock()

__all__ = [
    "DDTTransformer2DModel",
    "DiTClassCondPipeline",
    "DiTTransformer2DModel",
    "FlowMatchSDEScheduler",
    "FlowMatchTruncatedEulerScheduler",
    "JiTTransformer2DModel",
    "ModelMixin",
    "SchedulerMixin",
    "__version__",
    "make_scheduler",
    "mix_classes",
    "optimize",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _lock:  # or two threads would restore each other's level
        if name in globals():
            return globals()[name]
        # Libraries that diffusers finds installed warn of each other while it is imported, on every import anew.
        disabled = logging.root.manager.disable
        logging.disable(max(disabled, logging.WARNING))
        try:
            value = getattr(importlib.import_module(_MODULES[name], __name__), name)
        finally:
            logging.disable(disabled)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(globals() | dict.fromkeys(__all__))
