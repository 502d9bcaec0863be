"""A run and the machine it runs on: one run a folder, and a clean end when the machine asks for it."""

import fcntl
import os
import signal
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


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
    with open(output_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{output_dir} is in use by another run; wait for it or choose another folder.") from None
        yield


class StopRequest:
    """Whether SIGTERM has come, as it does on machines that are taken away; the run then saves and ends."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_):
        self.requested = True


def start_accelerator(**options) -> Accelerator:
    """
    An `Accelerator`, with FSDP2 on several CPU processes too, where accelerate's own switch is for accelerators only.

    Args:
        options: For `Accelerator`.

    Returns:
        `Accelerator`
    """
    accelerator = Accelerator(**options)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator
