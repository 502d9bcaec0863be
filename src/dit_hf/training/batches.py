"""Batches and random draws that depend on (seed, step) alone, whatever the number of processes."""

from threading import Lock

import torch

from ..seeds import seeded_generator


class SeededBatches:
    """
    Shuffled epochs as a function of the step, so that resuming needs no state.

    Args:
        num_samples (`int`): Size of the dataset.
        batch_size (`int`): Samples of one optimizer step, over all processes.
        seed (`int`, defaults to 0): Seed of the order and of all draws.
        labels (`torch.Tensor`, *optional*): Classes of the samples, shape `(num_samples,)`, int64. If given, an epoch
            draws with replacement so that every class is equally likely, however few samples it has.

    Raises:
        ValueError: if a batch is larger than the dataset.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0, labels: torch.Tensor | None = None):
        if not 1 <= batch_size <= num_samples:
            raise ValueError(
                f"A batch of {batch_size} can't be drawn from {num_samples} samples; lower the batch size."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = num_samples // batch_size
        self._weights = None if labels is None else 1 / labels.bincount()[labels].double()
        # Batches are made ahead by several threads, some of which may be in the next epoch.
        self._orders: dict[int, torch.Tensor] = {}
        self._lock = Lock()

    def __getstate__(self):
        return {**vars(self), "_lock": None, "_orders": {}}

    def __setstate__(self, state):
        vars(self).update(state, _lock=Lock())

    def indices(self, step: int) -> torch.Tensor:
        """
        The samples of one step; an epoch's incomplete last batch is dropped.

        Args:
            step (`int`): Counted from 0.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, int64.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        with self._lock:
            if epoch not in self._orders:
                self._orders = {key: order for key, order in self._orders.items() if abs(key - epoch) == 1}
                self._orders[epoch] = self._draw_order(seeded_generator(self.seed, epoch, 1))
            order = self._orders[epoch]
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def _draw_order(self, generator):
        if self._weights is None:
            return torch.randperm(self.num_samples, generator=generator)
        return torch.multinomial(self._weights, self.num_samples, replacement=True, generator=generator)

    def generator(self, step: int) -> torch.Generator:
        """
        A CPU generator for those draws of one step that are a number per sample: draw for the whole batch, then take
        this process's slice.

        Args:
            step (`int`): Counted from 0.

        Returns:
            `torch.Generator`
        """
        return seeded_generator(self.seed, step, 0)

    def sample_generator(self, step: int, place: int) -> torch.Generator:
        """
        A CPU generator for the noise of one sample of a step, so that a process draws that of its own samples alone.

        Args:
            step (`int`): Counted from 0.
            place (`int`): Of the sample in the whole batch, from 0.

        Returns:
            `torch.Generator`
        """
        return seeded_generator(self.seed, step, 2, place)


def check_batch(total_batch_size: int, num_processes: int, gradient_accumulation_steps: int) -> None:
    """Checks that processes and micro-batches split a batch evenly; `ValueError` if not."""
    if total_batch_size % (num_processes * gradient_accumulation_steps):
        raise ValueError(
            f"--total_batch_size {total_batch_size} can't be split evenly over {num_processes} processes with "
            f"--gradient_accumulation_steps {gradient_accumulation_steps}."
        )
