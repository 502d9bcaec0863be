"""The training loop: seeded batches, a guarded optimizer step, averages, checkpoints, validation, resuming to the bit.

Shapes: `B` samples of one process.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.utils import logging
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..models import DiTTransformer2DModel
from .alignment import AlignmentHead, check_alignment
from .batches import SeededBatches, check_batch, draw_batch
from .best import BestCheckpoint
from .checkpointing import list_checkpoints, load_checkpoint, resume_from, save_checkpoint
from .config import TrainingConfig
from .ema import PowerAverages, WeightAverage
from .finetuning import record_guidance
from .guard import LossGuard, TrainingStopped, check_losses
from .objectives import AuxiliaryLoss, Objective
from .optimizer import build_optimizer
from .prefetch import Prefetcher
from .records import append_record, begin, read_losses, record_settings, truncate_log
from .running import StopRequest, lock_folder, run_on_main, start_accelerator
from .settings import LOG_FILE, SETTINGS_FILE, check_resume, run_settings
from .speed import prepare_teacher, speed_up
from .validation import averaged_weights


logger = logging.get_logger(__name__)

# More of the initial weights than this in the final average deserve a warning.
MAX_INITIAL_WEIGHT = 0.05
# Ways to run in which each process has whole weights.
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Trainer:
    """
    Trains a transformer on latents. The result depends on the settings and the seed, not on the number of processes,
    and a resumed run continues to the bit.

    Args:
        config (`TrainingConfig`): The settings.
        transformer (`DiTTransformer2DModel`): What is trained: its parameters that require gradients.
        latents (`CachedLatents` or `EncodedImages`):
            The data: `labels`, `statistics`, `feature_dim` and `read(indices, flipped)`.
        objective (`Objective`): Samples times, makes noisy inputs and computes the loss per sample.
        accelerator (`accelerate.Accelerator`, *optional*): From [`start_accelerator`].
        class_ids (`torch.Tensor` of shape `(classes,)`, int64, *optional*):
            The model's id of each of the data's classes; the same ids if not given.
        alignment (`AlignmentHead`, *optional*): Adds REPA's loss, weighted by `config.proj_coeff`.
        facts (`Mapping`, *optional*):
            What else a resumed run must have in common with this one, as JSON values; `latents` is the fingerprint of
            the data, if the data have no fingerprint.
        notes (`Mapping`, *optional*): What else is recorded with the settings.

    Raises:
        ValueError: if arguments do not fit each other, or the output folder holds a run with other settings.
    """

    def __init__(
        self,
        config: TrainingConfig,
        transformer: DiTTransformer2DModel,
        latents,
        objective: Objective,
        *,
        accelerator: Accelerator | None = None,
        class_ids: torch.Tensor | None = None,
        alignment: AlignmentHead | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ):
        self.config, self.latents, self.objective = config, latents, objective
        self.accelerator = accelerator or start_accelerator()
        self.output_dir = Path(config.output_dir)
        check_batch(config.total_batch_size, self.accelerator.num_processes, config.gradient_accumulation_steps)
        self.has_null_class = transformer.config.class_dropout_prob > 0
        if config.class_dropout_prob > 0 and not self.has_null_class:
            raise ValueError(
                f"`class_dropout_prob` is {config.class_dropout_prob}, but the transformer has no null class; build "
                "it with a positive `class_dropout_prob`, or train with 0."
            )
        if (alignment is not None) != (config.proj_coeff > 0):
            raise ValueError("An alignment head and a positive `proj_coeff` go together; pass both or neither.")
        check_alignment(objective, config.proj_coeff)
        record_guidance(transformer, objective.guidance_in_weights)
        self.class_ids = class_ids
        balanced = latents.labels if config.balance_classes else None
        self.batches = SeededBatches(len(latents.labels), config.total_batch_size, config.seed, balanced)
        facts = {"latents": getattr(latents, "index", {}).get("fingerprint"), **(facts or {})}
        settings = run_settings(config, transformer, objective, self.accelerator, facts)
        check_resume(config, settings)
        initial = 0.0 if config.ema_warmup else config.ema_decay**config.max_train_steps
        if initial > MAX_INITIAL_WEIGHT:
            logger.warning(
                f"With --ema_decay {config.ema_decay} the initial weights are {100 * initial:.0f} % of the average "
                f"after {config.max_train_steps} steps; for a run this short lower it, or pass --ema_warmup."
            )
        if config.lr_scheduler != "constant" and config.lr_warmup_steps >= config.max_train_steps:
            logger.warning(
                f"The learning rate never reaches its peak: --lr_warmup_steps {config.lr_warmup_steps} of "
                f"--max_train_steps {config.max_train_steps}."
            )
        self.settings = {**(notes or {}), **settings}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            self.auxiliary: AuxiliaryLoss | None = objective.auxiliary_loss()
        if alignment is not None:
            if self.auxiliary is not None:
                raise ValueError(f"{objective.name} has an auxiliary loss already; omit the alignment.")
            alignment.weight, self.auxiliary = config.proj_coeff, alignment
        self._prepare(transformer)
        metric = config.metric_for_best_model
        self.best = BestCheckpoint(self.accelerator, self.output_dir, metric, config.greater_is_better)
        self.metrics: dict[str, float] = {}
        self.stopped_by = 0
        # Steps whose losses are still on the device, and when the run started.
        self._unread: list[tuple[int, torch.Tensor, torch.Tensor, dict[str, float]]] = []
        self._started = time.time()

    def _prepare(self, transformer):
        """Wraps what is trained with accelerate, and collects all state for the checkpoints."""
        config, accelerator = self.config, self.accelerator
        transformer.to(accelerator.device).train()
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        speed_up(transformer, config, accelerator.device, accelerator.mixed_precision)
        if self.objective.teacher is not None:
            prepare_teacher(self.objective.teacher, config, accelerator)
        if self.auxiliary is not None:
            self.auxiliary.to(accelerator.device)
        optimizer = build_optimizer(config, transformer, self.auxiliary)
        steps = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
        self.schedule = get_scheduler(config.lr_scheduler, optimizer, **steps)
        self.wrapped, self.optimizer = accelerator.prepare(transformer, optimizer)
        self.modules = [self.wrapped]
        if self.auxiliary is not None:
            self.modules.append(accelerator.prepare(self.auxiliary))
        self.transformer = accelerator.unwrap_model(self.wrapped, keep_torch_compile=False)
        is_cuda = accelerator.device.type == "cuda"  # others may have no double precision
        self.guard = LossGuard(config.on_spike, device=accelerator.device if is_cuda else "cpu")
        self.logging_steps = config.logging_steps or (50 if is_cuda else 1)
        self.num_workers = config.dataloader_num_workers
        if self.num_workers is None:
            self.num_workers = 4 if is_cuda else 1
        # torch's fused AdamW takes no step where its `found_inf` is 1, without telling the host.
        whole = accelerator.distributed_type in UNSHARDED and accelerator.device.type in ("cuda", "cpu")
        self.skips_by_itself = whole and accelerator.scaler is None and not config.use_8bit_adam
        average = {"decay": config.ema_decay, "use_ema_warmup": config.ema_warmup, "power": 0.75}
        self.ema = WeightAverage(self.trainable(), **average)
        self.profiles = PowerAverages(self.trainable()) if config.ema_profiles else None
        self.states = {"ema": self.ema, "schedule": self.schedule, "guard": self.guard}
        if self.profiles is not None:
            self.states["profiles"] = self.profiles

    def trainable(self) -> list[torch.nn.Parameter]:
        """All parameters of the transformer, or the adapters'."""
        return [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]

    @property
    def process_slice(self) -> slice:
        """This process's samples of a batch."""
        count = self.config.total_batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)

    def draw(self, step: int) -> dict[str, torch.Tensor]:
        """This process's samples of a step, counted from 0: a function of the seed and the step."""
        draw = step + self.guard.draw_offset
        settings = (self.config.flip_probability, self.config.class_dropout_prob, step / self.config.max_train_steps)
        batch = draw_batch(self.latents, self.objective, self.batches, draw, self.process_slice, *settings)
        if not self.has_null_class:
            del batch["drop"]
        if self.class_ids is not None:
            batch["label"] = self.class_ids[batch["label"]]
        return batch

    def train(self, validate: Callable[[int], dict[str, float]] | None = None, must_fall: bool = False) -> int:
        """
        Trains until `max_train_steps`, or until SIGTERM, SIGHUP or Ctrl-C; saves a checkpoint in either case.

        Args:
            validate (`Callable`, *optional*):
                Called on every process each `validation_steps` and after the last step, with the number of finished
                steps, while the transformer holds its averaged weights. What it returns goes into the log and
                `self.metrics`.
            must_fall (`bool`, defaults to `False`):
                Whether a loss that has clearly risen is an error, as random weights have to improve.

        Returns:
            `int`: finished steps. If they are fewer than `max_train_steps`, `self.stopped_by` is the signal's number.

        Raises:
            ValueError: if another process trains in the output folder.
            TrainingStopped:
                if the loss does not recover (see [`LossGuard`]) or has doubled, every step was skipped, or the weights
                are not finite.
        """
        config, main = self.config, self.accelerator.is_main_process
        pinned = self.accelerator.device.type == "cuda"
        batches = Prefetcher(self.draw, self.num_workers, config.max_train_steps, pinned)
        with lock_folder(self.output_dir) if main else nullcontext(), StopRequest() as stop, batches:
            step = self._start()
            progress = tqdm(total=config.max_train_steps, initial=step, mininterval=10, disable=not main)
            self._started = time.time()
            while step < config.max_train_steps and not self.stopped_by:
                try:
                    batch = batches.take(step)
                except (ValueError, OSError):
                    self._log(*(self._read_steps()[0] if self._unread else ()))
                    raise
                self._step(step, batch)
                step += 1
                progress.update()
                finished = step == config.max_train_steps
                validated = validate is not None and (step % config.validation_steps == 0 or finished)
                saved = step % config.checkpointing_steps == 0 or finished
                if not (validated or saved or self._is_logged(step, stop)):
                    continue
                records, rewound = self._read_steps()
                if rewound is not None:
                    step = rewound
                    batches.clear()
                    continue
                self.stopped_by = 0 if finished else self._agree_on_stop(stop)
                self._end_step(step, records, validate if validated else None, saved or bool(self.stopped_by))
            if step == config.max_train_steps and not self.stopped_by:
                self._check_result(step, must_fall)
        return step

    def _is_logged(self, step, stop):
        """Whether the host waits for the device after this step; alone, a process ends on a signal at once."""
        return step % self.logging_steps == 0 or (stop.signal and self.accelerator.num_processes == 1)

    def _agree_on_stop(self, stop):
        """The signal that has come to any process, as every process has to leave at the same step."""
        signals = torch.tensor([stop.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(signals).max())

    def _end_step(self, step, records, validate, saved):
        """The log of the steps since the last call, and after the newest of them a validation and a checkpoint."""
        *earlier, record = records
        self._log(*earlier)
        if validate is not None or saved:
            self._check_weights(step)
        if validate is not None:
            record |= self._validate(validate, step, record)
            self.accelerator.print(json.dumps(record))
            try:
                saved = self.best.improves(record) or saved
            except ValueError:
                self._save(step, record)
                raise
        if saved:
            self._save(step, record)
        else:
            self._log(record)

    def _validate(self, validate, step, record):
        """Metrics of the averaged weights; if they can't be had, the steps are saved all the same."""
        try:
            with self.averaged():
                self.metrics = validate(step)
        except Exception:
            if self.accelerator.num_processes == 1:  # others would wait for this one
                self._save(step, record)
            raise
        return self.metrics

    def _save(self, step, record):
        """Writes log and EMA snapshots, then the checkpoint: a resumed run would not write the former again."""
        if self.profiles is not None:
            record["snapshot"] = self.profiles.steps
        self._log(record)
        self._save_profiles()
        limit, best = self.config.checkpoints_total_limit, self.best.step(step)
        save_checkpoint(self.accelerator, self.output_dir, step, limit, self.states, best)

    def _check_weights(self, step):
        """Neither a checkpoint nor a sample is made of weights that are not finite."""
        weights = [*self.trainable(), *self.ema.shadow_params]
        parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        finite = torch.stack([part.detach().isfinite().all() for part in parts]).all().to(self.accelerator.device)
        if not self.accelerator.gather(finite[None]).all():
            kept = list_checkpoints(self.output_dir)
            before = f"{kept[-1].name} is the last checkpoint before it" if kept else "there is no checkpoint before"
            raise TrainingStopped(
                f"The weights are not finite after step {step}; {before}. A lower learning rate may help."
            )

    def _check_result(self, step, must_fall):
        """A run that has trained nothing, or made things worse, is not a success."""
        if self.ema.optimization_step == 0:
            raise TrainingStopped(
                f"Every one of the {step} steps was skipped, as its loss or gradient was not finite: nothing was "
                f"trained. {self.output_dir / LOG_FILE} has the losses."
            )
        if self.objective.loss_falls:
            run_on_main(self.accelerator, lambda: check_losses(read_losses(self.output_dir / LOG_FILE), must_fall))

    def _start(self):
        """Resumes, and records the settings; returns the number of finished steps."""
        step = resume_from(self.accelerator, self.output_dir, self.config.resume_from_checkpoint, self.states)
        if step > self.config.max_train_steps:
            raise ValueError(
                f"{self.output_dir} is at step {step} already, beyond --max_train_steps {self.config.max_train_steps}."
            )
        if step:
            self.accelerator.print(f"Resuming from step {step} of {self.config.max_train_steps} in {self.output_dir}.")
        if self.accelerator.is_main_process:
            truncate_log(self.output_dir / LOG_FILE, step)
            self.best.read()
            PowerAverages.drop_snapshots(self.output_dir / "ema", step)
            record_settings(self.output_dir / SETTINGS_FILE, self.settings)
            begin(self.output_dir, resumed=step > 0)
        self.accelerator.wait_for_everyone()
        return step

    def _step(self, step, batch):
        """One optimizer step, unless the guard finds it bad; nothing here waits for the device that need not."""
        losses = self.backward(batch)
        parameters = [parameter for module in self.modules for parameter in module.parameters()]
        gradient_norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm))
        gradient_norm = gradient_norm.full_tensor() if isinstance(gradient_norm, DTensor) else gradient_norm
        measured = self.guard.measure(losses[0], gradient_norm)
        taken = 1 - measured[-1]
        if self.skips_by_itself:
            self.optimizer.optimizer.found_inf = measured[-1].float()
            self.optimizer.step()
        elif taken:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self._close_scaled_step(float(gradient_norm))
        if self.accelerator.device.type not in ("cuda", "cpu"):
            taken = taken.float().to(self.accelerator.device)
        for average in filter(None, (self.ema, self.profiles)):
            average.step(self.trainable(), taken)
        self.schedule.step()
        self.optimizer.zero_grad()
        facts = {"lr": self.schedule.get_last_lr()[-1], "seconds": round(time.time() - self._started, 2)}
        self._unread.append((step + 1, losses, measured, facts))

    def _read_steps(self):
        """
        Waits for the device, and judges the steps since the last call; returns their records, and the step to go on
        from where the guard has rewound.
        """
        steps, losses, measured, facts = zip(*self._unread, strict=True)
        self._unread = []
        losses, measured = (torch.stack(rows).tolist() for rows in (losses, measured))
        records = []
        for step, (loss, auxiliary), row, others in zip(steps, losses, measured, facts, strict=True):
            record = {"step": step, "loss": loss}
            if self.auxiliary is not None:
                record[self.auxiliary.name] = auxiliary
            try:
                verdict = self.guard.verdict(step, row)
            except TrainingStopped:
                self._log(*records)
                raise
            if verdict != "step":
                samples = self.batches.indices(step - 1 + self.guard.draw_offset).tolist()
                self.accelerator.print(f"{verdict} at step {step}: {record}, samples {samples}")
                others = others | {"skipped": True, "samples": samples}
            if verdict == "rewind" and list_checkpoints(self.output_dir):
                self._log(*records)
                return records, self._rewind(step, self.guard.as_of(row))
            records.append(record | {"grad_norm": row[1]} | others)
        return records, None

    def backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Gradients of the mean loss, in micro-batches.

        Args:
            batch (`dict[str, torch.Tensor]`): This process's samples, from `draw`.

        Returns:
            `torch.Tensor` of shape `(2,)`: the mean over all processes of the loss and of the auxiliary loss.
        """
        accelerator, count = self.accelerator, len(batch["label"])
        micro = count // self.config.gradient_accumulation_steps
        totals = torch.zeros(2, device=accelerator.device)
        for start in range(0, count, micro):
            part = {
                name: values[start : start + micro].to(accelerator.device, non_blocking=True)
                for name, values in batch.items()
            }
            with ExitStack() as unsynced:
                for module in self.modules if start + micro < count else ():
                    unsynced.enter_context(accelerator.no_sync(module))
                loss = self.objective.loss(self.wrapped, part).sum() / count
                totals[0] += loss.detach()
                if self.auxiliary is not None:
                    auxiliary = self.modules[1](part).sum() / count
                    totals[1] += auxiliary.detach()
                    loss = loss + self.auxiliary.weight * auxiliary
                accelerator.backward(loss)
        return accelerator.reduce(totals, "mean")

    def _close_scaled_step(self, gradient_norm):
        """fp16: a skipped step has to be ended all the same; one that overflowed lowers the loss's scale."""
        if math.isfinite(gradient_norm):
            self.accelerator.scaler.update()
        else:
            self.optimizer.step()  # changes no weight

    def _rewind(self, from_step, before):
        """Returns to the last checkpoint, to continue with other batches; its step."""
        self.optimizer.zero_grad()
        step = resume_from(self.accelerator, self.output_dir, states=self.states)
        self.guard.rewound(from_step, step, before)
        if self.accelerator.is_main_process:
            truncate_log(self.output_dir / LOG_FILE, step)
            self.best.read()
        return step

    def _log(self, *records):
        """Lines of the log, and accelerate's trackers."""
        for record in records:
            if self.accelerator.is_main_process:
                append_record(self.output_dir / LOG_FILE, record)
            self.accelerator.log(
                {name: value for name, value in record.items() if name != "step"}, step=record["step"]
            )

    def _save_profiles(self):
        """Snapshots to choose an average from when training is over."""
        if self.profiles is not None:
            names = [name for name, parameter in self.transformer.named_parameters() if parameter.requires_grad]
            self.profiles.save_snapshot(self.output_dir / "ema", names, self.accelerator.is_main_process)

    def load_best_model(self) -> int | None:
        """
        Loads the best checkpoint by `config.metric_for_best_model`. Every process has to call it.

        Returns:
            `int`: its step, `None` if no checkpoint has a value of the metric.
        """
        step = self.best.step()
        if step is not None:
            load_checkpoint(self.accelerator, self.output_dir / f"checkpoint-{step}", self.states)
        return step

    def averaged(self):
        """A context manager: the averaged weights in the transformer, in eval mode."""
        return averaged_weights(self.ema, self.transformer)

    @contextmanager
    def averaged_transformer(self) -> Iterator[DiTTransformer2DModel | None]:
        """
        A context manager: the averaged weights as an ordinary model, also where each process holds a part of them;
        then only the main process gets one. Every process has to enter it.
        """
        with self.averaged():
            if self.accelerator.distributed_type != DistributedType.FSDP:
                yield self.transformer
                return
            weights = self.accelerator.get_state_dict(self.wrapped)
            model = None
            if self.accelerator.is_main_process:
                model = type(self.transformer).from_config(self.transformer.config)
                model.load_state_dict(weights)
            yield model
