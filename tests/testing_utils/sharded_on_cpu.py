"""
A training script with FSDP2 or DeepSpeed on several CPU processes, where accelerate's own switches are for
accelerators only: `torchrun sharded_on_cpu.py SCRIPT [flags]`. The rest is accelerate as it is, on gloo.
"""

import os
import runpy
import sys

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


INIT = Accelerator.__init__


def init_sharded(self, *args, **options):
    """`Accelerator.__init__`, then the distributed type that the environment asks for."""
    INIT(self, *args, **options)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    kind = DistributedType.DEEPSPEED if deepspeed else DistributedType.FSDP
    PartialState().distributed_type = self.state.distributed_type = kind
    if deepspeed:
        self.state.deepspeed_plugins = options["deepspeed_plugin"]
    else:
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()


if __name__ == "__main__":
    Accelerator.__init__ = init_sharded
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
