"""
Started by torchrun in `test_transformer_features.py`: forward passes of tiny models on two processes.

diffusers 0.42 counts devices with `torch.accelerator`, which finds none beside the CPU, and leaves the CPU out of the
devices of tensor parallelism. Both are overridden here; the rest is `enable_parallelism` as it is, on gloo.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import TensorParallelConfig
from torch.distributed.tensor import DTensor


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ARCHITECTURES, DESIGNS, inputs_of, tiny_design

from dit_hf.transformer_dit import DiTTransformer2DModel


def context_parallel(name):
    model = tiny_design(name)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return model


def tensor_parallel_in_memory(name):
    model = tiny_design(name)
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    return model


def forward(model, size):
    """The output, how many tokens the last block of this rank saw, and what this rank holds of split parameters."""
    tokens = []
    model.transformer_blocks[-1].ff.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    split = {name: value for name, value in model.named_parameters() if isinstance(value, DTensor)}
    with torch.no_grad():
        output = model(**inputs_of(model, height=size, width=size)).sample
    shards = {name: (list(value.shape), list(value.to_local().shape)) for name, value in split.items()}
    return {"output": output, "tokens": tokens, "shards": shards}


def attempt(build, size=8):
    """A result, or the error both ranks met."""
    try:
        return forward(build(), size)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(model_dir, output_dir):
    dist.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 1
    tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    results = {}
    for name in DESIGNS | ARCHITECTURES:
        results["context", name] = attempt(lambda: context_parallel(name))  # noqa: B023
        results["tensor", name] = attempt(lambda: tensor_parallel_in_memory(name))  # noqa: B023
    results["context", "odd"] = attempt(lambda: context_parallel("in_context"), size=6)
    config = TensorParallelConfig(tp_degree=2)
    results["tensor", "loaded"] = attempt(
        lambda: DiTTransformer2DModel.from_pretrained(model_dir, parallel_config=config)
    )
    torch.save(results, Path(output_dir) / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
