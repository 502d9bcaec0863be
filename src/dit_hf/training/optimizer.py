"""The optimizer of a run."""

from typing import Any

import torch

from ..models import DiTTransformer2DModel
from .config import TrainingConfig
from .finetuning import parameter_groups
from .objectives import AuxiliaryLoss


def build_optimizer(
    config: TrainingConfig, transformer: DiTTransformer2DModel, auxiliary: AuxiliaryLoss | None = None
) -> torch.optim.Optimizer:
    """AdamW for what is trained, in 8 bits if asked for."""
    groups = parameter_groups(transformer, config.learning_rate, config.layer_decay)
    if auxiliary is not None:
        groups.append({"params": list(auxiliary.parameters()), "lr": config.learning_rate})
    options: dict[str, Any] = {"betas": (0.9, config.adam_beta2), "weight_decay": config.weight_decay}
    if not config.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.") from None
    return AdamW8bit(groups, **options)
