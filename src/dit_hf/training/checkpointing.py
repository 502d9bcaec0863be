"""Checkpoints that are whole or absent: written to the side, renamed, then the oldest removed."""

import os
import re
import shutil
from pathlib import Path


CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    Finished checkpoints, oldest first.

    Args:
        output_dir (`str` or `Path`): The run's folder; it need not exist.

    Returns:
        `list[Path]`: folders named `checkpoint-N`.
    """
    output_dir = Path(output_dir)
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """
    The step after which a checkpoint was written.

    Args:
        path (`Path`): A folder named `checkpoint-N`.

    Returns:
        `int`: N.
    """
    return int(path.name.removeprefix("checkpoint-"))


def save_checkpoint(accelerator, output_dir: str | Path, step: int, total_limit: int | None = None) -> Path:
    """
    Saves everything the accelerator knows (models, optimizers, schedulers, registered objects, RNG) atomically.

    Args:
        accelerator (`accelerate.Accelerator`): With all that must survive prepared or registered.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): Number of finished optimizer steps.
        total_limit (`int`, *optional*): Keep this many of the newest checkpoints.

    Returns:
        `Path`: `output_dir/checkpoint-step`.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def resume_from(accelerator, output_dir: str | Path) -> int:
    """
    Loads the newest checkpoint, if there is one.

    Args:
        accelerator (`accelerate.Accelerator`): Prepared as when the checkpoint was saved.
        output_dir (`str` or `Path`): The run's folder.

    Returns:
        `int`: the number of finished steps, 0 for a fresh start.
    """
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    return checkpoint_step(checkpoints[-1])
