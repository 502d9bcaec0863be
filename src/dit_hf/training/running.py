"""A run and the machine it runs on: one run a folder, and a clean end when the machine asks for it."""

import fcntl
import os
import signal
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin


@contextmanager
def only_run(output_dir: str | Path):
    """
    Holds a folder for this run; the lock goes with the process, so that a dead run leaves none.

    Args:
        output_dir (`str` or `Path`): Created if it does not exist.

    Raises:
        ValueError: if another run holds it.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = (output_dir / ".lock").read_text() or "unknown"
            raise ValueError(
                f"{output_dir} is in use by another run (process {holder}); wait for it or choose another folder."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class StopRequest:
    """Whether SIGTERM has come, as it does on machines that are taken away, or Ctrl-C; the run then saves and ends."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.requested = True


class DeepSpeedAccelerator(Accelerator):
    """
    ZeRO-1 and 2 of DeepSpeed for an ordinary loop. accelerate's own `backward` takes the step too, before anyone could
    judge the loss, and in every micro-batch.

    Args:
        mixed_precision (`str`, defaults to `"no"`): `"bf16"` is autocast's; weights and their averages are float32.
        options: For `Accelerator`.

    Raises:
        ValueError: if it is another stage, offloads the optimizer, or is fp16.
    """

    def __init__(self, mixed_precision: str = "no", **options):
        plugin = DeepSpeedPlugin()
        if plugin.zero_stage not in (1, 2) or plugin.offload_optimizer_device != "none" or mixed_precision == "fp16":
            raise ValueError("DeepSpeed trains here with ZeRO-1 or 2, without offloading, and not in fp16.")
        plugin.deepspeed_config["torch_autocast"] = {"enabled": mixed_precision == "bf16", "dtype": "bfloat16"}
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed only counts samples with it
        super().__init__(mixed_precision="no", deepspeed_plugin=plugin, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            _set_distributed_type(self, DistributedType.DEEPSPEED)
            self.state.deepspeed_plugins = plugin

    def prepare(self, model, optimizer):
        """DeepSpeed's engine, as the model and as what takes its steps."""
        engine, _ = super().prepare(model, optimizer)
        return engine, engine

    @contextmanager
    def no_sync(self, model):
        """Gradients of this `backward` wait for those of a later one."""
        model.set_gradient_accumulation_boundary(False)
        yield
        model.set_gradient_accumulation_boundary(True)

    def backward(self, loss):
        """Gradients, without a step."""
        self.deepspeed_engine_wrapped.engine.backward(loss)

    def clip_grad_norm_(self, parameters, max_norm):
        """The norm of all gradients; it is the step that clips them."""
        optimizer = self.deepspeed_engine_wrapped.engine.optimizer
        optimizer.clip_grad = max_norm
        return optimizer.scaled_global_norm()


def _set_distributed_type(accelerator, distributed_type):
    PartialState().distributed_type = accelerator.state.distributed_type = distributed_type


def start_accelerator(**options) -> Accelerator:
    """
    An `Accelerator`, with FSDP2 and DeepSpeed on several CPU processes too, where accelerate's own switches are for
    accelerators only.

    Args:
        options: For `Accelerator`.

    Returns:
        `Accelerator`

    Raises:
        ValueError: if accelerate has started several processes that do not know of each other.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    accelerator = (DeepSpeedAccelerator if deepspeed else Accelerator)(**options)
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if world_size != str(accelerator.num_processes):
        raise ValueError(
            f"WORLD_SIZE is {world_size}, but accelerate runs {accelerator.num_processes} process: there are no such "
            "accelerators, and each process would train alone. For CPUs take accelerate_configs/cpu.yaml, or set "
            "ACCELERATE_USE_CPU=true."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        _set_distributed_type(accelerator, DistributedType.FSDP)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator
