"""A run and the machine it runs on: one run per folder, a clean end on a signal, and the accelerator."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, PrecisionType, broadcast_object_list
from filelock import FileLock, Timeout

from ..files import check_file, check_folder, first_line


# Variables by which `accelerate launch` and `torchrun` tell a process what it is.
ENVIRONMENT = re.compile(r"(ACCELERATE|FSDP|MASTER|TORCHELASTIC)_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)")
# What ends a run after it is saved; SIGHUP is that of a terminal that is closed.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


@contextmanager
def lock_folder(output_dir: str | Path) -> Iterator[None]:
    """
    Locks a folder for this process. The operating system releases the lock when the process ends, however it ends.

    Args:
        output_dir (`str` or `Path`): Created if it does not exist.

    Raises:
        ValueError: if another process holds it.
    """
    output_dir = check_folder(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    holder = output_dir / ".lock_holder"  # beside the lock, which other processes can't read on Windows
    for path in (output_dir / ".lock", holder):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, through which another file would be overwritten; remove it.")
        if path.exists():
            check_file(path)
    try:
        # A singleton, so that a command and the trainer that it calls can both hold the folder.
        lock = FileLock(output_dir / ".lock", timeout=0, is_singleton=True).acquire()
    except Timeout:
        process = holder.read_text(encoding="utf-8", errors="replace")[:20] if holder.exists() else "unknown"
        raise ValueError(
            f"{output_dir} is in use by another run (process {process}); wait for it or choose another folder."
        ) from None
    with lock:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield


class StopRequest:
    """
    Whether SIGTERM, SIGHUP or Ctrl-C has come, so that a run can save and end. A context manager, which restores the
    signal handlers; a second Ctrl-C interrupts at once. Outside the main thread, where Python allows none, it does
    nothing.

    Attributes:
        signal (`int`): Number of the signal that came, 0 if none.
    """

    def __init__(self):
        self.signal = 0
        self._previous = {}
        self._terminals = []

    def __enter__(self):
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number, _):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if number == getattr(signal, "SIGHUP", None):  # a terminal that is gone fails what is printed
            silent = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(silent, terminal)
            os.close(silent)


class DeepSpeedAccelerator(Accelerator):
    """
    ZeRO-1 and 2 of DeepSpeed for an ordinary loop. accelerate's own `backward` also takes the optimizer step, before
    the loss can be judged, and in every micro-batch.

    Args:
        mixed_precision (`str`, defaults to `"no"`): `"bf16"` is autocast's; weights and their averages are float32.
        options: For `Accelerator`.

    Raises:
        ValueError: if it is another stage, offloads the optimizer, or is fp16.
    """

    def __init__(self, mixed_precision: str | None = "no", **options):
        plugin = DeepSpeedPlugin()
        if plugin.zero_stage not in (1, 2) or plugin.offload_optimizer_device != "none" or mixed_precision == "fp16":
            raise ValueError("DeepSpeed trains here with ZeRO-1 or 2, without offloading, and not in fp16.")
        plugin.deepspeed_config["torch_autocast"] = {"enabled": mixed_precision == "bf16", "dtype": "bfloat16"}
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed only counts samples with it
        super().__init__(mixed_precision="no", deepspeed_plugin=plugin, **options)

    def prepare(self, model, optimizer):
        """DeepSpeed's engine, as the model and as what takes its steps."""
        self.engine, _ = super().prepare(model, optimizer)
        return self.engine, self.engine

    @contextmanager
    def no_sync(self, model):
        """Gradients of this `backward` wait for those of a later one."""
        model.set_gradient_accumulation_boundary(False)
        yield
        model.set_gradient_accumulation_boundary(True)

    def backward(self, loss):
        """Gradients, without a step."""
        self.engine.backward(loss)

    def clip_grad_norm_(self, parameters, max_norm):
        """The norm of all gradients; the step clips them."""
        self.engine.optimizer.clip_grad = max_norm
        return self.engine.optimizer.scaled_global_norm()


def run_on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """
    Runs a function on the main process alone; its result is returned, or its error raised, on every process.

    Args:
        accelerator (`accelerate.Accelerator`): The processes, all of which have to call this.
        function (`Callable`): Takes no arguments.

    Returns:
        What the function returns, on every process.

    Raises:
        ValueError, OSError: of the function.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    found, refused = outcome
    if refused is not None:
        raise refused
    return found


def local_share(accelerator: Accelerator) -> tuple[int, int]:
    """This process's index on its machine, and the number of processes there; 0 and 1 where no launcher tells it."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return (accelerator.local_process_index, count) if 1 < count <= accelerator.num_processes else (0, 1)


def start_accelerator(**options) -> Accelerator:
    """
    An `Accelerator` for the environment that `accelerate launch` or `torchrun` set up.

    Args:
        options: For `Accelerator`.

    Returns:
        `Accelerator`

    Raises:
        ValueError: if accelerate can't use the options or the environment variables, or has started several processes
            that do not know of each other.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    try:
        accelerator = (DeepSpeedAccelerator if deepspeed else Accelerator)(**options)
        PrecisionType(accelerator.mixed_precision)
    except Exception as error:
        variables = ", ".join(name for name in sorted(os.environ) if ENVIRONMENT.fullmatch(name))
        seen = f" Of the environment it reads {variables}." if variables else ""
        raise ValueError(f"accelerate can't start: {first_line(error)}.{seen}") from error
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if world_size != str(accelerator.num_processes):
        raise ValueError(
            f"WORLD_SIZE is {world_size}, but accelerate runs {accelerator.num_processes} process: there are no such "
            "accelerators, and each process would train alone. For CPUs use accelerate_configs/cpu.yaml, or set "
            "ACCELERATE_USE_CPU=true."
        )
    return accelerator
