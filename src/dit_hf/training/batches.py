"""Batches and random numbers that depend on (seed, step) alone, whatever the number of processes."""

from threading import Lock

import torch
from torch.utils.data import default_collate

from ..data.latents import normalise_latents
from ..seeds import seeded_generator
from .objectives import Objective


class SeededBatches:
    """
    Shuffled epochs as a function of the step, so that resuming needs no state.

    Args:
        num_samples (`int`): Size of the dataset.
        batch_size (`int`): Samples of one optimizer step, over all processes.
        seed (`int`, defaults to 0): Seed of the order and of all random numbers.
        labels (`torch.Tensor`, *optional*): Classes of the samples, shape `(num_samples,)`, int64. If given, an epoch
            draws with replacement so that every class is equally likely, however few samples it has.

    Raises:
        ValueError: if a batch is larger than the dataset.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0, labels: torch.Tensor | None = None):
        if not 1 <= batch_size <= num_samples:
            raise ValueError(
                f"A batch of {batch_size} can't be sampled from {num_samples} samples; the batch size must be 1 to "
                f"{num_samples}."
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
        A CPU generator for the noise of one sample of a step, so that a process generates only that of its samples.

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


def draw_batch(
    latents,
    objective: Objective,
    batches: SeededBatches,
    step: int,
    process_slice: slice,
    flip_probability: float,
    class_dropout_prob: float,
    progress: float = 0.0,
) -> dict[str, torch.Tensor]:
    """
    One process's slice of one step's batch. It does not depend on the number of processes: a sample's mirroring, time
    and dropped label are sampled for the whole batch and then sliced; its noise has a separate generator.

    Args:
        latents (`CachedLatents` or `EncodedImages`): Where posteriors come from.
        objective (`Objective`): Samples the times.
        batches (`SeededBatches`): The samples of each step, of all processes, and their random generators.
        step (`int`): Counted from 0.
        process_slice (`slice`): The process's B samples.
        flip_probability (`float`): Fraction of mirrored images.
        class_dropout_prob (`float`): Fraction of samples whose label is dropped.
        progress (`float`, defaults to 0.0): Finished steps over all steps of the run, for schedules of an objective.

    Returns:
        `dict[str, torch.Tensor]`: `x_start` and `noise` of shape `(B, C, h, w)`; `time`, `label`, `drop` (bool)
        and `progress` with first dimension B; `features` if the latents have them; whatever else the objective draws.
    """
    indices, generator = batches.indices(step), batches.generator(step)
    count = len(indices)
    flipped = torch.rand(count, generator=generator) < flip_probability
    dropped = torch.rand(count, generator=generator) < class_dropout_prob
    time = objective.draw_time(count, generator)
    read = latents.read(indices[process_slice], flipped[process_slice])
    mean = normalise_latents(read.pop("mean"), *latents.statistics)
    std = normalise_latents(read.pop("std"), [0.0], latents.statistics[1])
    noise, posterior_noise = torch.empty_like(mean), torch.empty_like(mean)
    others = []
    for row, place in enumerate(range(*process_slice.indices(count))):
        source = batches.sample_generator(step, place)
        torch.randn(noise[row].shape, generator=source, out=noise[row])
        if std[row].any():  # a deterministic autoencoder has nothing to draw
            torch.randn(posterior_noise[row].shape, generator=source, out=posterior_noise[row])
        else:
            posterior_noise[row] = 0
        others.append(objective.draw_sample(mean.shape[1:], time[place], source))
    batch = {"x_start": mean + std * posterior_noise, "noise": noise, **default_collate(others)}
    batch |= {"time": time[process_slice], "drop": dropped[process_slice]}
    return read | batch | {"progress": torch.full((len(mean),), progress)}
