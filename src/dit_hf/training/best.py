"""The best checkpoint of a run, by a metric of its log."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpointing import checkpoint_step, list_checkpoints
from .records import read_log
from .running import run_on_main
from .settings import LOG_FILE


class BestCheckpoint:
    """
    Finds the best checkpoint of a run. What it knows comes from the log, so that it survives a kill.

    Args:
        accelerator (`accelerate.Accelerator`): The processes; the main one decides for all.
        output_dir (`str` or `Path`): The run's folder.
        metric (`str`, *optional*): A name in the log; without one no checkpoint is the best.
        greater_is_better (`bool`, defaults to `False`): Its direction.
    """

    def __init__(self, accelerator, output_dir: str | Path, metric: str | None, greater_is_better: bool = False):
        self.accelerator, self.output_dir, self.metric = accelerator, Path(output_dir), metric
        self.sign = 1 if greater_is_better else -1
        self.values: dict[int, float] = {}

    def read(self) -> None:
        """Takes the values of the log in place of those before; on the main process."""
        self.values = {}
        log = self.output_dir / LOG_FILE
        for record in read_log(log) if self.metric is not None and log.exists() else ():
            self._add(record)

    def _add(self, record):
        """A value that is not finite is never the best."""
        value = record.get(self.metric)
        if isinstance(value, int | float) and math.isfinite(value):
            self.values[record["step"]] = value

    def improves(self, record: Mapping[str, Any]) -> bool:
        """
        Adds a value, and compares it with those of all checkpoints. Every process has to call it.

        Args:
            record (`Mapping[str, Any]`): Of a validated step, as the log has it.

        Returns:
            `bool`: whether it is the best.

        Raises:
            ValueError: if the validation does not compute the metric.
        """
        if self.metric is None:
            return False
        if self.metric not in record:
            raise ValueError(
                f"`metric_for_best_model` is {self.metric!r}, which is not logged; choose from {', '.join(record)}."
            )
        self._add(record)
        return self.step(record["step"]) == record["step"]

    def step(self, *saved: int) -> int | None:
        """
        The step of the best checkpoint, the first of equally good ones. Every process has to call it.

        Args:
            saved (`int`): Steps whose checkpoints are about to be written.

        Returns:
            `int`, or `None` if no checkpoint has a value.
        """

        def find():
            steps = {*map(checkpoint_step, list_checkpoints(self.output_dir)), *saved} & self.values.keys()
            return max(sorted(steps), key=lambda step: self.sign * self.values[step], default=None)

        return run_on_main(self.accelerator, find) if self.metric is not None else None

    def describe(self, step: int) -> str:
        """A line on the best checkpoint; on the main process."""
        return f"Best {self.metric}: {self.values[step]:.6g} at step {step}, kept as checkpoint-{step}."
