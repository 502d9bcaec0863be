"""Settings of a training run, and which of them a resumed run may change."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusers.optimization import SchedulerType

from ..command_line import Range, integer, real
from ..pipeline_dit_class_cond import MAX_GUIDANCE_SCALE
from .guard import POLICIES


# Schedules of diffusers; `piecewise_constant` needs rules that there is no setting for.
SCHEDULES = tuple(schedule.value for schedule in SchedulerType if schedule.value != "piecewise_constant")
# The largest seed that numpy takes, with which accelerate seeds.
MAX_SEED = 2**32 - 1


COUNT = integer(at_least=1)
FRACTION = real(at_least=0, at_most=1)
POSITIVE = real(above=0)
WEIGHT = real(at_least=0, at_most=1000)
# Beyond them single precision overflows, or nothing is learnt.
SNR_GAMMA = real(at_least=1e-6, at_most=1e6)
GUIDANCE = real(at_least=0, at_most=MAX_GUIDANCE_SCALE)
# What may be None.
OPTIONAL = ("checkpoints_total_limit", "logging_steps", "dataloader_num_workers")
RANGES = {
    "total_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "max_train_steps": COUNT,
    "learning_rate": real(at_least=0, at_most=10),
    "layer_decay": real(above=0, at_most=1),
    "lr_warmup_steps": integer(at_least=0),
    "adam_beta2": real(at_least=0, below=1),
    "weight_decay": WEIGHT,
    "max_grad_norm": Range(False, at_least=1e-6, or_infinite=True),
    "ema_decay": real(at_least=0, below=1),
    "class_dropout_prob": FRACTION,
    "flip_probability": FRACTION,
    "proj_coeff": WEIGHT,
    "checkpointing_steps": COUNT,
    "checkpoints_total_limit": COUNT,
    "validation_steps": COUNT,
    "logging_steps": COUNT,
    "dataloader_num_workers": integer(at_least=0, at_most=64),
    "seed": integer(at_least=0, at_most=MAX_SEED),
}


def _may_change(default=MISSING):
    """A field that a resumed run may set to another value."""
    return field(default=default, metadata={"may_change": True})


@dataclass(frozen=True)
class TrainingConfig:
    """
    What [`Trainer`] does with a transformer, latents and an objective. The defaults suit a model of a few million
    parameters trained with flow matching.

    Args:
        output_dir (`str` or `Path`): Checkpoints, log and record of the settings.
        total_batch_size (`int`, defaults to 128): Samples of one optimizer step, over all processes.
        gradient_accumulation_steps (`int`, defaults to 1): Micro-batches that each process splits its samples into.
        gradient_checkpointing (`bool`, defaults to `False`): Less memory for one more forward pass.
        max_train_steps (`int`, defaults to 4000): Optimizer steps of the whole run.
        learning_rate (`float`, defaults to 1e-3): Peak learning rate, at most 10.
        layer_decay (`float`, defaults to 1.0): A block's learning rate over that of the block after it.
        lr_scheduler (`str`, defaults to `"cosine"`): A schedule of `diffusers.optimization.get_scheduler`.
        lr_warmup_steps (`int`, defaults to 100): Steps of linear warm-up.
        adam_beta2 (`float`, defaults to 0.99): AdamW's second beta.
        weight_decay (`float`, defaults to 0.0): AdamW's weight decay, at most 1000.
        use_8bit_adam (`bool`, defaults to `False`): AdamW of bitsandbytes.
        max_grad_norm (`float`, defaults to 1.0): The norm that gradients are clipped to; infinite for none.
        ema_decay (`float`, defaults to 0.999): Decay of the averaged weights, the same in every step.
        ema_warmup (`bool`, defaults to `False`):
            Whether the decay rises to `ema_decay` as 1 - step^(-3/4), which suits runs that are short for their decay.
        ema_profiles (`bool`, defaults to `False`):
            Whether to save snapshots from which an average of any length can be built after training.
        class_dropout_prob (`float`, defaults to 0.1): Fraction of samples whose label is replaced by the null class.
        flip_probability (`float`, defaults to 0.5): Fraction of mirrored images.
        balance_classes (`bool`, defaults to `False`): Samples all classes equally often.
        proj_coeff (`float`, defaults to 0.0): Weight of REPA's alignment loss, at most 1000; 0 is none.
        on_spike (`str`, defaults to `"skip"`): What happens at a spike of the loss; see [`LossGuard`].
        checkpointing_steps (`int`, defaults to 500): Steps between checkpoints.
        checkpoints_total_limit (`int`, *optional*, defaults to 2): Checkpoints that are kept.
        resume_from_checkpoint (`str` or `Path`, defaults to `"latest"`):
            `"latest"` resumes from the newest checkpoint, if there is one; a checkpoint's folder or name is
            accepted if it is the newest one; `"never"` refuses a folder that holds checkpoints.
        validation_steps (`int`, defaults to 500): Steps between calls of the validation.
        metric_for_best_model (`str`, *optional*):
            A name that the validation returns. A step that is better than all checkpoints gets a checkpoint, and the
            best one is kept beside the last `checkpoints_total_limit`.
        greater_is_better (`bool`, defaults to `False`): Direction of `metric_for_best_model`.
        logging_steps (`int`, *optional*):
            Steps between writes of the log, for which the host waits for the device; 1 on a CPU, 50 on a GPU if not
            given. The log has a line for every step all the same.
        dataloader_num_workers (`int`, *optional*):
            Threads that make batches ahead, 1 on a CPU, 4 on a GPU if not given; with 0 the loop makes them itself.
        seed (`int`, defaults to 0): Of the order of samples and of all random numbers.
        compile_blocks (`bool`, *optional*): Whether to compile the blocks; on a CUDA device if not given.
        allow_tf32 (`bool`, *optional*): Whether float32 products may use TF32; on a CUDA device if not given.
        attention_backend (`str`, *optional*): Of diffusers, such as `"_native_cudnn"`; torch chooses if not given.
        float8 (`bool`, defaults to `False`): Whether the blocks multiply in float8, by torchao.

    Raises:
        ValueError: if a number is out of range, or a policy unknown.

    Example:

        >>> from dit_hf.training.config import TrainingConfig
        >>> config = TrainingConfig("outputs/dit", total_batch_size=32, max_train_steps=2000, ema_warmup=True)
        >>> config.learning_rate
        0.001
    """

    output_dir: str | Path = _may_change()
    total_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = _may_change(False)
    max_train_steps: int = _may_change(4000)
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    use_8bit_adam: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    ema_warmup: bool = False
    ema_profiles: bool = False
    class_dropout_prob: float = 0.1
    flip_probability: float = 0.5
    balance_classes: bool = False
    proj_coeff: float = 0.0
    on_spike: str = _may_change("skip")
    checkpointing_steps: int = _may_change(500)
    checkpoints_total_limit: int | None = _may_change(2)
    resume_from_checkpoint: str | Path = _may_change("latest")
    validation_steps: int = _may_change(500)
    metric_for_best_model: str | None = _may_change(None)
    greater_is_better: bool = _may_change(False)
    logging_steps: int | None = _may_change(None)
    dataloader_num_workers: int | None = _may_change(None)
    seed: int = 0
    compile_blocks: bool | None = _may_change(None)
    allow_tf32: bool | None = _may_change(None)
    attention_backend: str | None = _may_change(None)
    float8: bool = False

    def __post_init__(self):
        if "\0" in str(self.output_dir):
            raise ValueError("`output_dir` holds a null byte.")
        for entry in fields(self):
            if entry.type in (bool, "bool") and not isinstance(getattr(self, entry.name), bool):
                raise ValueError(f"`{entry.name}` is {getattr(self, entry.name)!r}; it must be True or False.")
            if entry.type in (bool | None, "bool | None") and getattr(self, entry.name) not in (True, False, None):
                raise ValueError(f"`{entry.name}` is {getattr(self, entry.name)!r}; it must be True, False or None.")
        for name, range_ in RANGES.items():
            value = getattr(self, name)
            if not (value is None and name in OPTIONAL):
                object.__setattr__(self, name, range_.check(name, value))  # it is frozen
        if self.on_spike not in POLICIES:
            raise ValueError(f"`on_spike` is {self.on_spike!r}; it must be one of {', '.join(POLICIES)}.")
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"`lr_scheduler` is {self.lr_scheduler!r}; it must be one of {', '.join(SCHEDULES)}.")


# Settings that a resumed run may change; any other makes it another run.
MAY_CHANGE = tuple(entry.name for entry in fields(TrainingConfig) if entry.metadata.get("may_change"))
# What a setting is that the record of an older run does not have.
DEFAULTS: dict[str, Any] = {
    entry.name: entry.default for entry in fields(TrainingConfig) if entry.default is not MISSING
}
