"""Adaptive norms of a whole trajectory computed at once, for pipelines that `optimize` has prepared.

Shapes: `S` steps, `K` classes, `B` rows of a batch, `M` values of `compute_modulation`.
"""

import threading

import torch


# Steps × classes whose modulation is held at a time: 200 MB for XL/2 in float32.
ROWS = 256
# With fewer steps the table costs more time than it saves.
MIN_STEPS = 5


class ModulationTable:
    """
    What `compute_modulation` gives at the steps and classes of one trajectory: many steps in one matrix product, and
    once for images of one class.

    Args:
        pipe (`DiTClassCondPipeline`): Its scheduler has the steps, its transformer regresses the vectors.
    """

    def __init__(self, pipe):
        self.pipe = pipe
        self.schedule = None
        self.classes: list[int] = []
        self.first, self.vectors = 0, torch.empty(0)

    def covers(self, inputs: dict) -> bool:
        """Whether a call's keyword arguments are those of a step of the trajectory that the pipeline is at."""
        if getattr(self.pipe, "_trajectory_thread", None) != threading.get_ident():
            return False  # what was computed with other weights, or mixed classes, is for nobody else
        timestep = inputs.get("timestep")
        if not isinstance(timestep, torch.Tensor) or timestep.ndim != 1 or not (timestep == timestep[0]).all():
            return False
        alone = inputs.get("modulation") is None and inputs.get("force_drop_ids") is None
        schedule = self.pipe.scheduler.timesteps
        if not alone or schedule is None or len(schedule) < MIN_STEPS:
            return False
        return bool((schedule.float() == timestep[0]).any())

    def rows(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """
        Modulation of a batch at one step.

        Args:
            timestep (`torch.Tensor` of shape `(B,)`): The scheduler's timestep, one for all rows.
            class_labels (`torch.Tensor` of shape `(B,)`, int64): Class ids, on the CPU.

        Returns:
            `torch.Tensor` of shape `(B, M)`
        """
        schedule, labels = self.pipe.scheduler.timesteps, class_labels.tolist()
        index = int((schedule.float() == timestep[0]).nonzero()[0])
        # A new trajectory has a new tensor of timesteps, and perhaps other weights or mixed classes.
        is_known = schedule is self.schedule and set(labels) <= set(self.classes)
        if not is_known or not self.first <= index < self.first + len(self.vectors):
            self._compute(schedule, sorted(set(labels) | {self.pipe.transformer.config.num_classes}), index)
        return self.vectors[index - self.first, [self.classes.index(label) for label in labels]]

    def _compute(self, schedule, classes, first):
        self.vectors = torch.empty(0)  # before the next ones are made
        if self.pipe.transformer.config.class_dropout_prob == 0:
            classes = classes[:-1]
        steps = schedule[first : first + max(1, ROWS // len(classes))].float()
        ids = torch.tensor(classes)
        times = {"timestep": steps.repeat_interleave(len(classes))}
        if (ends := self.pipe._interval_ends()) is not None:
            times["r_timestep"] = ends[first : first + len(steps)].float().repeat_interleave(len(classes))
        vectors = self.pipe.transformer.compute_modulation(class_labels=ids.repeat(len(steps)), **times)
        self.schedule, self.classes, self.first = schedule, classes, first
        self.vectors = vectors.unflatten(0, (len(steps), len(classes)))  # (S, K, M)
