"""Checkpoints that are whole or absent: written to the side, renamed, then the oldest removed."""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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

    Raises:
        OSError: if it can't be written; what was written of it is removed, and earlier checkpoints are as they were.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(output_dir)
        before = f"{kept[-1].name} is whole, the same command resumes from it" if kept else "there is none before"
        raise OSError(f"{final} can't be written: {error} ({before})") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


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
    inside = given.resolve().parent == Path(output_dir).resolve() or given == Path(given.name)
    if not inside or given.name not in names:
        raise ValueError(
            f"{given} is no checkpoint of {output_dir}, which holds {', '.join(names) or 'none'}; pass one of them, "
            "or --resume_from_checkpoint latest."
        )
    if later := names[names.index(given.name) + 1 :]:
        raise ValueError(
            f"{output_dir} also holds {', '.join(later)}, which resuming from {given.name} would overwrite; move or "
            "delete what is later, or pass --resume_from_checkpoint latest."
        )
    return checkpoints[-1]


def resume_from(accelerator, output_dir: str | Path, resume_from_checkpoint: str | Path = "latest") -> int:
    """
    Loads a checkpoint, if there is one to resume from.

    Args:
        accelerator (`accelerate.Accelerator`): Prepared as when the checkpoint was saved.
        output_dir (`str` or `Path`): The run's folder.
        resume_from_checkpoint (`str` or `Path`, defaults to `"latest"`): As for [`checkpoint_to_resume`].

    Returns:
        `int`: the number of finished steps, 0 for a fresh start.

    Raises:
        ValueError: as [`checkpoint_to_resume`].
    """
    checkpoint = checkpoint_to_resume(output_dir, resume_from_checkpoint)
    if checkpoint is None:
        return 0
    accelerator.load_state(str(checkpoint))
    return checkpoint_step(checkpoint)


def check_same_settings(
    file: str | Path,
    settings: Mapping[str, Any],
    may_change: Collection[str],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """
    Refuses to resume a run with other settings than it was started with.

    Args:
        file (`str` or `Path`): What [`record_settings`] wrote; it need not exist.
        settings (`Mapping`): All settings; values are compared as JSON.
        may_change (`Collection[str]`): Settings that a resumed run may change, such as the number of steps.
        defaults (`Mapping`, *optional*):
            Values that stand for settings which the record of an older version lacks. A setting that is in neither is
            not compared.

    Raises:
        ValueError: naming the settings that differ.
    """
    file = Path(file)
    if not file.exists():
        return
    before = json.loads(json.dumps(dict(defaults or {}), default=str)) | read_settings(file)
    changed = [
        _describe_change(name, before[name], value)
        for name, value in json.loads(json.dumps(dict(settings), default=str)).items()
        if name not in may_change and name in before and before[name] != value
    ]
    if changed:
        raise ValueError(f"{file.parent} holds a run with other settings: {'; '.join(changed)}. Use a new folder.")


def _describe_change(name, before, value):
    if name == "latents":  # a fingerprint
        return f"the images, or what encodes them, have changed (latents {before[:8]} and {value[:8]})"
    return f"{name} was {before!r} and is {value!r}"


def read_settings(file: str | Path) -> dict[str, Any]:
    """
    Reads what [`record_settings`] wrote.

    Args:
        file (`str` or `Path`): The record.

    Returns:
        `dict`: as this version names settings. Version 0.1 named the total batch size `train_batch_size`, always let
        the decay of its averages rise (`ema_warmup`), and knew no fingerprint of images without a cache.
    """
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    if "total_batch_size" not in settings and "train_batch_size" in settings:
        settings["total_batch_size"] = settings.pop("train_batch_size")
        settings.setdefault("ema_warmup", True)
    return {name: value for name, value in settings.items() if (name, value) != ("latents", None)}


def record_settings(file: str | Path, settings: dict) -> None:
    """
    Writes a run's settings for [`check_same_settings`] of its resumption.

    Args:
        file (`str` or `Path`): Its folder is created if it does not exist.
        settings (`dict`): All settings; what is no JSON is written as text.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"partial-{file.name}")
    partial.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)


def truncate_log(file: str | Path, step: int) -> None:
    """
    Removes the lines of steps after the checkpoint that a run resumes from, as these steps are repeated.

    Args:
        file (`str` or `Path`): JSON lines with a `step` each; it need not exist.
        step (`int`): The checkpoint's step.
    """
    file = Path(file)
    if file.exists():
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        partial = file.with_name(f"partial-{file.name}")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, file)
