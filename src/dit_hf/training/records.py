"""What a run records: its settings, its log, and whether the folder is its own."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import LEFTOVER, PARTIAL, check_file, check_links, load_json, read_json, reading, remove, writing


# Exists while a run has no checkpoint yet, so that what it wrote may be written again.
BEFORE_CHECKPOINT = ".before_first_checkpoint"
# More than a log of ten million steps has.
MAX_LOG_BYTES = 2**31


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
    now = json.loads(json.dumps(dict(settings), default=str))
    changed = [name for name in now if name not in may_change and name in before and before[name] != now[name]]
    if len(changed) > 1 and not {"split", "holdout", "resolution"}.isdisjoint(changed):
        changed = [name for name in changed if name != "latents"]  # they follow from these
    if changed:
        parts = "; ".join(_describe_change(name, before[name], now[name]) for name in changed)
        raise ValueError(f"{file.parent} holds a run with other settings: {parts}. Use a new folder.")


def _describe_change(name, before, value):
    if name == "latents":  # a fingerprint
        before, value = (str(fingerprint)[:8] for fingerprint in (before, value))
        return (
            f"the images (by names, sizes and dates of their files), or what encodes them, have changed (latents "
            f"{before} and {value})"
        )
    return f"{name} was {before!r} and is {value!r}"


def read_settings(file: str | Path) -> dict[str, Any]:
    """
    Reads what [`record_settings`] wrote.

    Args:
        file (`str` or `Path`): The record.

    Returns:
        `dict`: as this version names settings. Version 0.1 named the total batch size `train_batch_size`, always let
        the decay of its averages rise (`ema_warmup`), and knew no fingerprint of images without a cache.

    Raises:
        ValueError: if it can't be read.
    """
    settings = read_json(file)
    if "total_batch_size" not in settings and "train_batch_size" in settings:
        settings["total_batch_size"] = settings.pop("train_batch_size")
        settings.setdefault("ema_warmup", True)
    return {name: value for name, value in settings.items() if (name, value) != ("latents", None)}


def record_settings(file: str | Path, settings: dict) -> None:
    """
    Writes a run's settings for [`check_same_settings`] of its resumption.

    Args:
        file (`str` or `Path`): Its folder is created if it does not exist.
        settings (`dict`): All settings; values that are not JSON are written as text.
    """
    with writing(file) as partial:
        partial.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")


def read_log(file: str | Path) -> Iterator[dict[str, Any]]:
    """
    The records of a run's log; an incomplete last line is skipped.

    Args:
        file (`str` or `Path`): JSON lines with a `step` each.

    Yields:
        `dict`

    Raises:
        ValueError: naming a line that is no such record.
    """
    file = check_file(file, MAX_LOG_BYTES)
    with reading(file, "text"):
        lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("}"):
            return
        try:
            record = load_json(line)
        except ValueError:
            record = None
        well_formed = isinstance(record, dict) and {type(record.get("step")), type(record.get("snapshot", 0))} == {int}
        if not well_formed or not isinstance(record.get("loss", 0.0), int | float):
            raise ValueError(f"{file} is damaged: line {number} is not the record of a step; remove that line.")
        yield record


def append_record(file: str | Path, record: Mapping[str, Any]) -> None:
    """
    Adds a record to a run's log.

    Args:
        file (`str` or `Path`): The log.
        record (`Mapping[str, Any]`): With a `step`.

    Raises:
        OSError: if it can't be written.
    """
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        steps = "the same command resumes from the last checkpoint"
        raise OSError(f"{file} can't be written: {error.strerror or error} ({steps})") from error


def read_losses(file: str | Path) -> list[float]:
    """
    The losses of the steps of a run, without skipped steps.

    Args:
        file (`str` or `Path`): The log.

    Returns:
        `list[float]`
    """
    return [record["loss"] for record in read_log(file) if "loss" in record and not record.get("skipped")]


def read_snapshots(file: str | Path) -> list[int]:
    """
    The steps of which a run has kept snapshots of its averages.

    Args:
        file (`str` or `Path`): The log; it need not exist.

    Returns:
        `list[int]`: as their files are numbered; none of a run of a release before 0.3.
    """
    return [record["snapshot"] for record in read_log(file) if "snapshot" in record] if Path(file).exists() else []


def truncate_log(file: str | Path, step: int) -> None:
    """
    Removes the lines of steps after the checkpoint that a run resumes from, as these steps are repeated.

    Args:
        file (`str` or `Path`): JSON lines with a `step` each; it need not exist.
        step (`int`): The checkpoint's step.

    Raises:
        ValueError: if a line is damaged.
    """
    file = Path(file)
    if file.exists():
        kept = [json.dumps(record) for record in read_log(file) if record["step"] <= step]
        with writing(file) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def check_fresh_start(output_dir: str | Path, results: Collection[str], settings_file: str) -> None:
    """
    Refuses to start a run where it would overwrite what is not its own, or what an earlier run has left.

    Args:
        output_dir (`str` or `Path`): The folder, without a checkpoint to resume from; it need not exist.
        results (`Collection[str]`): What the run will write, as patterns.
        settings_file (`str`): Where it will record its settings.

    Raises:
        ValueError: naming what is there.
    """
    output_dir = Path(output_dir)
    if (output_dir / BEFORE_CHECKPOINT).exists():  # killed before its first checkpoint
        return
    found = [path for pattern in results for path in output_dir.glob(pattern) if _holds_something(path)]
    if found:
        names = ", ".join(sorted(path.relative_to(output_dir).as_posix() for path in found))
        raise ValueError(
            f"{output_dir} has no checkpoint to resume from, but holds {names}, which this run would overwrite; "
            "move it away, or choose another --output_dir."
        )
    record = output_dir / settings_file
    if record.exists() and "max_train_steps" not in read_settings(record):
        raise ValueError(f"{record} is not of this package, and would be overwritten; choose another --output_dir.")


def check_written_links(output_dir: str | Path, results: Collection[str]) -> None:
    """
    Refuses links to outside among what a run writes, before it starts: it would write through them.

    Args:
        output_dir (`str` or `Path`): The run's folder; it need not exist.
        results (`Collection[str]`): What the run writes, as patterns.

    Raises:
        ValueError: naming the link and its target.
    """
    output_dir = Path(output_dir)
    written = {pattern.split("/")[0] for pattern in results} | {BEFORE_CHECKPOINT}
    links = [path.relative_to(output_dir) for path in output_dir.rglob("*") if path.is_symlink()]
    own = [link for link in links if link.parts[0] in written or link.parts[0].startswith("checkpoint-")]
    check_links(output_dir, *map(str, own))


def _holds_something(path):
    return not path.is_dir() or any(path.iterdir())


def begin(output_dir: str | Path, resumed: bool) -> None:
    """
    Notes whether a run has a checkpoint, and removes what killed runs left half-written.

    Args:
        output_dir (`str` or `Path`): The run's folder, held by this process alone.
        resumed (`bool`): Whether it resumes from a checkpoint.
    """
    output_dir = Path(output_dir)
    if resumed:
        remove(output_dir / BEFORE_CHECKPOINT)
    else:
        text = "This run has no checkpoint yet. If it is started again, it begins anew.\n"
        (output_dir / BEFORE_CHECKPOINT).write_text(text, encoding="utf-8")
    for folder in (output_dir, output_dir / "ema", output_dir / "samples"):
        for path in folder.glob(f"{PARTIAL}*"):
            if LEFTOVER.fullmatch(path.name):
                remove(path)
