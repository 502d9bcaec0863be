"""Checkpoints that are whole or absent: written to the side, renamed, then the oldest removed."""

import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..command_line import Range, integer
from ..files import PARTIAL, is_write_error, reading, remove, write_problem
from .guard import WINDOW
from .records import BEFORE_CHECKPOINT
from .running import run_on_main
from .saved_state import (
    MANIFEST,
    STATES,
    accelerate_files,
    check_checkpoint,
    files_of,
    load_states,
    verify_checkpoint,
    weights_only,
    write_manifest,
    write_states,
)


# Set by the configuration alone, of the optimizer and of the trainer's states; a checkpoint must agree.
OPTIMIZER_OPTIONS = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "initial_lr")
CONFIGURED_STATE = (
    *(("ema", key) for key in ("decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power")),
    ("schedule", "base_lrs"),
)
# Beyond all batches that a run could draw.
MAX_DRAWS = 2**48
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    Finished checkpoints, oldest first.

    Args:
        output_dir (`str` or `Path`): The run's folder; it need not exist.

    Returns:
        `list[Path]`: folders named `checkpoint-N`.
    """
    output_dir = Path(output_dir)
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
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


def save_checkpoint(
    accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int | None = None,
    states: Mapping[str, Any] | None = None,
    best: int | None = None,
) -> Path:
    """
    Saves everything the accelerator knows (models, optimizers, RNG) and other states, atomically.

    Args:
        accelerator (`accelerate.Accelerator`): With models and optimizers prepared.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): Number of finished optimizer steps.
        total_limit (`int`, *optional*): Keep this many of the newest checkpoints.
        states (`Mapping[str, Any]`, *optional*): Objects with `state_dict`, by name: averages, schedule …
        best (`int`, *optional*): Step of a checkpoint that is kept beside them.

    Returns:
        `Path`: `output_dir/checkpoint-step`.

    Raises:
        OSError: if it can't be written; the partial checkpoint is removed, and earlier checkpoints are unchanged.
    """
    main = accelerator.is_main_process
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"{PARTIAL}{final.name}")  # one of all processes
    if main:
        remove(partial)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        # Every process takes part: weights may be sharded.
        write_states(partial, {name: state.state_dict() for name, state in (states or {}).items()}, main)
        accelerator.wait_for_everyone()
        names = gather_object(files_of(partial))  # on NFS the main process may not see those of other machines yet
        if main:
            write_manifest(partial, step, names)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
        if not is_write_error(error):
            raise
        remove(partial)
        raise OSError(f"{final} can't be written: {write_problem(error)} ({_before(final)})") from error
    if main:
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(partial, final)
        remove(Path(output_dir) / BEFORE_CHECKPOINT)
        for old in list_checkpoints(output_dir)[:-total_limit] if total_limit is not None else ():
            ours = (old / MANIFEST).exists() or (old / "custom_checkpoint_0.pkl").exists()
            if ours and checkpoint_step(old) != best:
                remove(old)
    accelerator.wait_for_everyone()
    return final


def _before(checkpoint):
    """What is left to resume from when a checkpoint is not."""
    earlier = [
        path for path in list_checkpoints(checkpoint.parent) if checkpoint_step(path) < checkpoint_step(checkpoint)
    ]
    return f"{earlier[-1].name} is whole, the same command resumes from it" if earlier else "there is none before"


def checkpoint_to_resume(output_dir: str | Path, resume_from_checkpoint: str | Path = "latest") -> Path | None:
    """
    The checkpoint that a run resumes from.

    Args:
        output_dir (`str` or `Path`): The run's folder; it need not exist.
        resume_from_checkpoint (`str` or `Path`, defaults to `"latest"`):
            `"latest"`, `"never"`, or a checkpoint of the folder by its path or name.

    Returns:
        `Path`, or `None` for a fresh start.

    Raises:
        ValueError: if there is no such checkpoint in the folder, if there are later ones, which resuming would
            overwrite, or if there are checkpoints and the run may not resume.
    """
    checkpoints = list_checkpoints(output_dir)
    if str(resume_from_checkpoint) == "latest":
        return checkpoints[-1] if checkpoints else None
    names = [path.name for path in checkpoints]
    if str(resume_from_checkpoint) == "never":
        if checkpoints:
            raise ValueError(
                f"{output_dir} holds {', '.join(names)}; resume from the newest with --resume_from_checkpoint latest, "
                "or use a new --output_dir."
            )
        return None
    given = Path(resume_from_checkpoint)
    inside = Path(os.path.realpath(given)).parent == Path(os.path.realpath(output_dir)) or given == Path(given.name)
    if not inside or given.name not in names:
        raise ValueError(
            f"{given} is not a checkpoint of {output_dir}, which holds {', '.join(names) or 'none'}; pass one of "
            "them, or --resume_from_checkpoint latest."
        )
    if later := names[names.index(given.name) + 1 :]:
        raise ValueError(
            f"{output_dir} also holds {', '.join(later)}, which resuming from {given.name} would overwrite; move or "
            "delete what is later, or pass --resume_from_checkpoint latest."
        )
    return checkpoints[-1]


def check_resumable(checkpoint: Path) -> None:
    """
    Checks that a checkpoint can be resumed from, as [`~dit_hf.training.saved_state.check_checkpoint`] does.

    Args:
        checkpoint (`Path`): The checkpoint.

    Raises:
        ValueError: naming the file, and the checkpoint before it.
    """
    try:
        check_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(checkpoint)}") from None


def _way_out(checkpoint):
    names = [path.name for path in list_checkpoints(checkpoint.parent)]
    if checkpoint.name in names[1:]:
        before = names[names.index(checkpoint.name) - 1]
        return f" To resume from {before}, move {checkpoint.name} out of {checkpoint.parent}."
    return f" There is no checkpoint before {checkpoint.name}."


def resume_from(
    accelerator,
    output_dir: str | Path,
    resume_from_checkpoint: str | Path = "latest",
    states: Mapping[str, Any] | None = None,
) -> int:
    """
    Loads a checkpoint, if there is one to resume from.

    Args:
        accelerator (`accelerate.Accelerator`): Prepared as when the checkpoint was saved.
        output_dir (`str` or `Path`): The run's folder.
        resume_from_checkpoint (`str` or `Path`, defaults to `"latest"`): As for [`checkpoint_to_resume`].
        states (`Mapping[str, Any]`, *optional*): As for [`save_checkpoint`].

    Returns:
        `int`: the number of finished steps, 0 for a fresh start.

    Raises:
        ValueError: as [`checkpoint_to_resume`], or if the checkpoint is damaged or holds what does not belong there.
    """
    checkpoint = checkpoint_to_resume(output_dir, resume_from_checkpoint)
    if checkpoint is None:
        return 0
    load_checkpoint(accelerator, checkpoint, states or {})
    return checkpoint_step(checkpoint)


def load_checkpoint(accelerator, checkpoint: Path, states: Mapping[str, Any]) -> None:
    """
    Checks a checkpoint in full, then loads it; nothing is loaded if the check fails.

    Args:
        accelerator (`accelerate.Accelerator`): Prepared as when the checkpoint was saved.
        checkpoint (`Path`): The checkpoint.
        states (`Mapping[str, Any]`): As for [`save_checkpoint`].

    Raises:
        ValueError: naming the file, and the checkpoint before it.
    """

    def check():
        check_checkpoint(checkpoint)
        verify_checkpoint(checkpoint)

    try:
        run_on_main(accelerator, check)
        with weights_only(checkpoint), reading(checkpoint, "checkpoint"), accelerate_files(checkpoint) as folder:
            options = [_options(optimizer) for optimizer in accelerator._optimizers]
            accelerator.load_state(str(folder))
        decided = {(name, key): getattr(states[name], key) for name, key in CONFIGURED_STATE if name in states}
        load_states(checkpoint, states)
        check_states(states, decided, checkpoint)
        steps = states["ema"].optimization_step if "ema" in states else None
        for optimizer, before in zip(accelerator._optimizers, options, strict=True):
            check_optimizer(optimizer, before, steps, checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(checkpoint)}") from None


def _options(optimizer):
    """What the configuration alone decides, of each group of parameters."""
    return [{name: group[name] for name in OPTIMIZER_OPTIONS if name in group} for group in optimizer.param_groups]


def check_optimizer(optimizer, options: list[dict[str, Any]], steps: int | None, checkpoint: Path) -> None:
    """
    Compares what an optimizer has loaded with its parameters, before it takes a step: torch's fused kernels read and
    write moments of the parameters' size, whatever their own is.

    Args:
        optimizer (`torch.optim.Optimizer`): After loading; only AdamW's moments are known.
        options (`list` of `dict`): Of each group of parameters before.
        steps (`int`, *optional*): Those that it has taken, if that is known.
        checkpoint (`Path`): Named in errors.

    Raises:
        ValueError: if an option differs, the learning rate is beyond its peak, or a moment does not fit its parameter.
    """
    for number, (group, own) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        changed = [name for name, value in own.items() if group.get(name) != value]
        if changed:
            raise ValueError(f"The optimizer of {checkpoint} has {changed[0]} of another run in group {number}.")
        rate, peak = group["lr"], own.get("initial_lr", sys.float_info.max)
        if not isinstance(rate, float | int | torch.Tensor) or not 0 <= float(rate) <= peak:
            raise ValueError(
                f"The optimizer of {checkpoint} has the learning rate {rate!r} in group {number}; it must be at least "
                f"0 and at most {peak}."
            )
    if not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.AdamW):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(
                    f"The optimizer of {checkpoint} has {name} of {getattr(value, 'shape', type(value))} for a "
                    f"parameter of {parameter.shape}."
                )
            if name == "step" and steps is not None and float(value) != steps:
                raise ValueError(f"The optimizer of {checkpoint} has step {float(value)}; it must be {steps}.")


def check_states(states: Mapping[str, Any], decided: Mapping[tuple[str, str], Any], checkpoint: Path) -> None:
    """
    Compares what the trainer's states have loaded with what the configuration and the step decide.

    Args:
        states (`Mapping[str, Any]`): After loading: `ema`, `schedule`, `guard` and `profiles`.
        decided (`Mapping`): What the attributes of [`CONFIGURED_STATE`] were before, by state and name.
        checkpoint (`Path`): Named in errors.

    Raises:
        ValueError: naming the file, the key, its value, and what it must be.
    """
    step = checkpoint_step(checkpoint)
    expected: dict[tuple[str, str], Any] = dict(decided)
    if "schedule" in states:
        expected |= {("schedule", "last_epoch"): step, ("schedule", "_step_count"): step + 1}
    if "guard" in states:
        taken, guard = states["ema"].optimization_step, states["guard"]
        # A step that led back to a checkpoint was skipped, and is none of those that were finished.
        most = None if guard.draw_offset else step - taken
        expected |= {
            ("ema", "optimization_step"): integer(0, step),
            ("guard", "skipped"): integer(step - taken, most),
            ("guard", "in_a_row"): integer(0, min(guard.max_in_a_row, guard.skipped)),
            ("guard", "draw_offset"): integer(0, MAX_DRAWS),
            ("guard", "rewound_to"): integer(-1, step),
            ("guard", "rewinds"): integer(0, guard.max_in_a_row),
        }
    if "profiles" in states:
        expected["profiles", "steps"] = states["ema"].optimization_step
    for (name, key), wanted in expected.items():
        value = getattr(states[name], key)
        if (value not in wanted) if isinstance(wanted, Range) else (value != wanted):
            raise ValueError(f"{checkpoint / STATES} has {name}.{key} = {value!r}; it must be {wanted}.")
    if "guard" in states:
        count, recent = min(states["ema"].optimization_step, WINDOW), states["guard"].recent
        if len(recent) != count or not all(map(math.isfinite, recent)):
            raise ValueError(
                f"{checkpoint / STATES} has guard.recent = {len(recent)} losses; it must be {count} finite losses."
            )
