"""All settings of a run, and whether a checkpoint has the same."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import check_folder
from ..models import DiTTransformer2DModel
from .checkpointing import checkpoint_to_resume
from .config import DEFAULTS, MAY_CHANGE, TrainingConfig
from .objectives import Objective
from .records import check_fresh_start, check_same_settings, check_written_links


SETTINGS_FILE = "training_config.json"
LOG_FILE = "train_log.jsonl"
# What a run writes beside its checkpoints.
RESULTS = (LOG_FILE, "samples", "ema/ema-*.safetensors", "pipeline", "pytorch_lora_weights.safetensors")


def run_settings(
    config: TrainingConfig,
    transformer: DiTTransformer2DModel,
    objective: Objective,
    accelerator: Accelerator,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """
    All settings of a run, recorded when it starts and compared when it resumes.

    Args:
        config (`TrainingConfig`): The settings.
        transformer (`DiTTransformer2DModel`): Its config counts.
        objective (`Objective`): Its settings count.
        accelerator (`accelerate.Accelerator`): Its mixed precision counts.
        facts (`Mapping`): As for [`Trainer`].

    Returns:
        `dict[str, Any]`
    """
    model = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    computed = {"mixed_precision": accelerator.mixed_precision, "transformer": model}
    return {**facts, **asdict(config), **objective.settings(), **computed}


def check_resume(config: TrainingConfig, settings: Mapping[str, Any]) -> Path | None:
    """
    Checks that the checkpoint which a run would resume from is one of the same run; its content is checked where it is
    loaded.

    Args:
        config (`TrainingConfig`): Names the folder and the checkpoint.
        settings (`Mapping`): From [`run_settings`].

    Returns:
        `Path`: the checkpoint, `None` if there is none.

    Raises:
        ValueError:
            if there is no such checkpoint, it is of a run with other settings, or there is none but results that would
            be overwritten.
    """
    checkpoint = checkpoint_to_resume(check_folder(config.output_dir), config.resume_from_checkpoint)
    check_written_links(config.output_dir, (*RESULTS, SETTINGS_FILE))
    if checkpoint is None:
        check_fresh_start(config.output_dir, RESULTS, SETTINGS_FILE)
    else:
        check_same_settings(checkpoint.parent / SETTINGS_FILE, settings, MAY_CHANGE, DEFAULTS)
    return checkpoint
