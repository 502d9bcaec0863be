"""What to do when a loss or gradient is not finite, or spikes: skip the step, rewind, or stop with a diagnosis."""

import math
import statistics
from collections.abc import Sequence
from copy import copy

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)

POLICIES = ("skip", "rewind", "stop")
# A spike is this many standard deviations above the mean of the recent losses; fewer than MIN_HISTORY say nothing.
SPIKE_DEVIATIONS = 8.0
MIN_HISTORY = 50
WINDOW = 200
# What a guard keeps beside the recent losses.
COUNTS = ("in_a_row", "skipped", "draw_offset", "rewound_to", "rewinds")
# A run of this many steps tells whether the loss has fallen; a shorter one only whether it has doubled.
LONG_RUN_STEPS = 200
# A difference of losses below this many standard errors is noise.
NOISE_STANDARD_ERRORS = 3.0


class TrainingStopped(ValueError):
    """Training can't continue; the message is the diagnosis."""


class LossGuard:
    """
    Judges every step by its global loss and gradient norm. Its state is part of checkpoints.
    The verdict is computed on the device, where the optimizer needs it; the host may read it some steps later.

    Args:
        policy (`str`, defaults to `"skip"`):
            What a finite spike leads to: `"skip"` skips the step, `"rewind"` returns to the last checkpoint and
            continues with other batches, `"stop"` ends the run. A step that is not finite is always skipped.
        max_in_a_row (`int`, defaults to 10): More bad steps than this one after the other end the run.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where losses are; it needs double precision.

    Raises:
        ValueError: if the policy is unknown, or the number below 1.
    """

    def __init__(self, policy: str = "skip", max_in_a_row: int = 10, device: torch.device | str = "cpu"):
        if max_in_a_row < 1:
            raise ValueError(f"`max_in_a_row` is {max_in_a_row}; it must be at least 1.")
        if policy not in POLICIES:
            raise ValueError(f"The policy is {policy!r}; it must be one of {', '.join(POLICIES)}.")
        self.policy, self.max_in_a_row, self.device = policy, max_in_a_row, device
        self.draw_offset = 0
        self.rewound_to, self.rewinds = -1, 0
        self._set([], in_a_row=0, skipped=0)

    def _set(self, recent, in_a_row, skipped):
        """The state on the device: the recent losses, the newest last, how many they are, and two counts of steps."""
        padded = [0.0] * (WINDOW - len(recent)) + recent
        self._recent = torch.tensor(padded, dtype=torch.float64, device=self.device)
        self._counts = torch.tensor([len(recent), in_a_row, skipped], device=self.device)

    @property
    def recent(self) -> list[float]:
        """Losses of the last steps that were taken, at most 200."""
        return self._recent.tolist()[WINDOW - int(self._counts[0]) :]

    @property
    def in_a_row(self) -> int:
        """Bad steps since the last good one."""
        return int(self._counts[1])

    @property
    def skipped(self) -> int:
        """Steps that were not taken."""
        return int(self._counts[2])

    def _bound(self):
        known = torch.arange(WINDOW, 0, -1, device=self.device) <= self._counts[0]
        mean = (self._recent * known).sum() / self._counts[0]
        variance = ((self._recent - mean).square() * known).sum() / (self._counts[0] - 1)
        return torch.where(self._counts[0] < MIN_HISTORY, math.inf, mean + SPIKE_DEVIATIONS * variance.sqrt())

    @property
    def bound(self) -> float:
        """The loss beyond which a step is a spike; infinite until there is a history."""
        return float(self._bound())

    def measure(self, loss: torch.Tensor, gradient_norm: torch.Tensor) -> torch.Tensor:
        """
        Judges a step without waiting for the device.

        Args:
            loss (`torch.Tensor` of shape `()`): Mean over all processes.
            gradient_norm (`torch.Tensor` of shape `()`): Before clipping.

        Returns:
            `torch.Tensor` of shape `(6,)`, float64: loss, gradient norm, the bound, bad steps in a row, skipped steps,
            and 1 if this step is bad, else 0. [`verdict`] and [`as_of`] take it.
        """
        loss, gradient_norm = (value.to(self.device).double() for value in (loss, gradient_norm))
        bound = self._bound()
        good = loss.isfinite() & gradient_norm.isfinite() & (loss <= bound)
        known, in_a_row, skipped = self._counts
        self._recent = torch.where(good, torch.cat([self._recent[1:], loss[None]]), self._recent)
        in_a_row, skipped = torch.where(good, 0, in_a_row + 1), skipped + ~good
        self._counts = torch.stack([(known + good).clamp(max=WINDOW), in_a_row, skipped])
        return torch.stack([loss, gradient_norm, bound, in_a_row, skipped, ~good])

    def verdict(self, step: int, measured: Sequence[float]) -> str:
        """
        What follows from a step.

        Args:
            step (`int`): Counted from 1.
            measured (`Sequence[float]`): From [`measure`], on the host.

        Returns:
            `str`: `"step"`, `"skip"` or `"rewind"`.

        Raises:
            TrainingStopped: with a diagnosis, if the policy says so or bad steps do not end.
        """
        loss, gradient_norm, bound, in_a_row, _, bad = measured
        if not bad:
            return "step"
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        what = f"loss {loss:.4g} above {bound:.4g}" if finite else f"loss {loss}, gradient norm {gradient_norm}"
        if in_a_row > self.max_in_a_row:
            raise TrainingStopped(
                f"{int(in_a_row)} bad steps in a row, the last at step {step}: {what}. Common causes: a learning rate "
                "that is too high, fp16 where bf16 is needed, latents that are not normalised, a damaged image."
            )
        if finite and self.policy == "stop":
            raise TrainingStopped(f"The loss spiked at step {step}: {what}.")
        return "rewind" if finite and self.policy == "rewind" else "skip"

    def as_of(self, measured: Sequence[float]) -> "LossGuard":
        """A copy with the counts of a step, whatever was measured after it."""
        guard = copy(self)
        counts = [len(self.recent), int(measured[3]), int(measured[4])]
        guard._counts = torch.tensor(counts, device=self.device)
        return guard

    def rewound(self, from_step: int, to_step: int, before: "LossGuard") -> None:
        """
        After a checkpoint was loaded: later steps get other batches than those that led to the spike.

        Args:
            from_step (`int`): The step that spiked.
            to_step (`int`): The checkpoint's.
            before (`LossGuard`): This guard's counts as they were at the spike.

        Raises:
            TrainingStopped: if that has not helped `max_in_a_row` times.
        """
        self.rewound_to, self.rewinds = to_step, before.rewinds + 1 if to_step == before.rewound_to else 1
        if self.rewinds > self.max_in_a_row:
            raise TrainingStopped(
                f"The loss spiked again at step {from_step}, after {before.rewinds} returns to step {to_step} with "
                "other batches; a lower learning rate or longer warm-up may help."
            )
        self.draw_offset = before.draw_offset + from_step - to_step
        self._counts = torch.stack([self._counts[0], *before._counts[1:]])

    def state_dict(self) -> dict:
        """Everything a resumed run needs."""
        return {name: getattr(self, name) for name in COUNTS} | {"recent": self.recent}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned; an older checkpoint has fewer counts."""
        counts = {name: state.get(name, getattr(self, name)) for name in COUNTS}
        recent = [float(loss) for loss in state["recent"]][-WINDOW:]
        self._set(recent, counts.pop("in_a_row"), counts.pop("skipped"))
        for name, value in counts.items():
            setattr(self, name, value)


def check_losses(losses: Sequence[float], must_fall: bool = False) -> None:
    """
    Refuses a run that has made the model worse: whose loss has clearly risen if it had to fall, or doubled if not.
    The medians of its first and its last tenth, at least 5 steps each, are compared; less than
    `NOISE_STANDARD_ERRORS` standard errors is noise, but not ten times the loss. A long run whose loss has not
    fallen gives a warning.

    Args:
        losses (`Sequence[float]`): Of all steps that were taken; fewer than 10 tell nothing.
        must_fall (`bool`, defaults to `False`):
            Whether the weights were random, so that 200 steps must improve them. Good weights may stay as they are.

    Raises:
        TrainingStopped: with both losses.
    """
    window = max(len(losses) // 10, 5)
    if len(losses) < 2 * window:
        return
    (first, first_error), (last, last_error) = _level(losses[:window]), _level(losses[-window:])
    long = len(losses) >= LONG_RUN_STEPS
    noise = NOISE_STANDARD_ERRORS * math.hypot(first_error, last_error)
    bound = min((1 if long and must_fall else 2) * first + noise, 10 * first)  # a loss that leaps looks like noise
    if first > 0 and not last < bound:  # one below 0 has no scale
        raise TrainingStopped(
            f"Training made the model no better: the loss was {first:.4g} in the first steps and is {last:.4g} in the "
            "last ones. The result is not saved; the checkpoints stay. Another learning rate may help, or more steps."
        )
    if long and last >= first:
        logger.warning(f"The loss did not fall: it was {first:.4g} in the first steps and is {last:.4g} in the last.")


def _level(losses):
    """Median of losses and its standard error, both robust against the few large losses that noise has."""
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return median, 1.2533 * deviation / math.sqrt(len(losses))
