"""Batches made ahead of the training loop, in background threads."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch


# Batches that are ready or in work, beyond the one that is trained on, for each thread.
AHEAD = 2


class Prefetcher(AbstractContextManager):
    """
    Calls a function of the step ahead of time, for step after step. Results are those of calling it directly; what it
    raises is raised by [`take`]. A context manager, which ends its threads.

    Args:
        draw (`Callable`): Makes the batch of a step, counted from 0; a dictionary of CPU tensors.
        num_workers (`int`): Threads; with 0 a batch is made when it is taken.
        num_steps (`int`): Of the run; no batch is made beyond them.
        pin_memory (`bool`, defaults to `False`): Whether batches are put where a GPU copies from while it computes.
    """

    def __init__(
        self,
        draw: Callable[[int], dict[str, torch.Tensor]],
        num_workers: int,
        num_steps: int,
        pin_memory: bool = False,
    ):
        self.draw, self.num_steps, self.pin_memory = draw, num_steps, pin_memory
        self._ahead = AHEAD * num_workers
        self._pool = ThreadPoolExecutor(num_workers, "batches") if num_workers else None
        self._waiting: deque[tuple[int, Future]] = deque()

    def take(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step; if it is not the one after the last, what was made ahead is dropped."""
        if self._pool is None:
            return self._make(step)
        if self._waiting and self._waiting[0][0] != step:
            self.clear()
        start = self._waiting[-1][0] + 1 if self._waiting else step
        for number in range(start, min(step + 1 + self._ahead, self.num_steps)):
            self._waiting.append((number, self._pool.submit(self._make, number)))
        return self._waiting.popleft()[1].result()

    def clear(self) -> None:
        """Drops what was made ahead."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def _make(self, step):
        batch = self.draw(step)
        return {name: values.pin_memory() for name, values in batch.items()} if self.pin_memory else batch

    def __exit__(self, *_: Any) -> None:
        self.clear()
        if self._pool is not None:
            self._pool.shutdown()
