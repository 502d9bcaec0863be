"""Guided sampling of DiT-XL/2 in 50 steps: stock pipeline, ours, compiled, with CUDA graphs, and the presets."""

import contextlib

import torch
import torch._inductor.config
from diffusers import AutoencoderKL, DiTPipeline
from networks import stock_dit
from timing import compare
from torch._dynamo.utils import counters

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, optimize, restore
from dit_hf.complexity import count_macs

from .training import compile_blocks


# A guided step computes two rows per image.
ROWS = 2


def tiny_vae():
    """A decoder that costs next to nothing, so that the transformer is what is timed."""
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, sample_size=32, latent_channels=4)


def pipelines(preset, size, device, dtype):
    """The stock pipeline and ours, of random weights, in one precision."""
    torch.manual_seed(0)
    with device:  # where random weights are drawn at once
        network, vaes = stock_dit(preset, size).eval(), [tiny_vae(), tiny_vae()]
        model = DiTTransformer2DModel.from_preset(preset, sample_size=size).eval()
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    stock = DiTPipeline(network, vaes[0], make_scheduler("ddim"))
    ours = DiTClassCondPipeline(model, make_scheduler("ddim"), vaes[1])
    for pipe in (stock, ours):
        pipe.to(device, dtype)
        pipe.set_progress_bar_config(disable=True)
    return stock, ours


class Sampler:
    """One batch of guided samples, as one of the ways to compute it."""

    def __init__(self, pipe, batch, steps):
        self.pipe, self.labels = pipe, [number % 1000 for number in range(batch)]
        self.call = {"num_inference_steps": steps, "guidance_scale": 4.0}
        self.output_type = "np" if isinstance(pipe, DiTPipeline) else "pt"

    def __call__(self):
        return self.pipe(self.labels, **self.call, output_type=self.output_type)


@contextlib.contextmanager
def compiled_blocks(pipe):
    """Blocks compiled one by one, which takes seconds where the whole network takes a minute."""
    compile_blocks(pipe.transformer)
    yield
    for block in pipe.transformer.transformer_blocks:
        block._compiled_call_impl = None


@contextlib.contextmanager
def fastest(pipe, sampler):
    """Solver, steps and interval of the preset, without its compilation."""
    optimize(pipe, "fastest")
    settings, scheduler = dict(pipe.config.recommended_call), pipe.scheduler
    restore(pipe)
    before, call = pipe.scheduler, sampler.call
    pipe.scheduler, sampler.call = scheduler, call | settings
    yield
    pipe.scheduler, sampler.call = before, call


@contextlib.contextmanager
def cuda_graphs(pipe):
    """The whole network compiled, and its kernels launched as one."""
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        optimize(pipe, "exact")
        yield
    restore(pipe)


def sampling(preset, size, batch, steps, gemm, device, seconds, dtype=torch.bfloat16) -> dict:
    """Images per second, and the fraction of the measured product rate, of each way to sample one batch."""
    stock, ours = pipelines(preset, size, device, dtype)
    sampler = Sampler(ours, batch, steps)
    macs = count_macs(ours.transformer.config)
    rows = {}

    def record(name, times, ratio):
        rate, taken = batch / times["seconds"], sampler.call["num_inference_steps"]
        guided = ROWS if "guidance_interval" not in sampler.call else 1.5  # of the steps, half
        rows[name] = {
            "images_per_second": round(rate, 3),
            "seconds": times["seconds"],
            "share_of_gemm": round(rate * taken * guided * 2 * macs / gemm, 4),
            "ratio": ratio,
            "first_seconds": round(times["first_seconds"], 1),
        }

    def measure(name, *ways):
        with contextlib.ExitStack() as stack:
            for way in ways:
                stack.enter_context(way)
            times = compare({"ours": sampler}, device, seconds, least=3)["ours"]
            record(name, times, times["seconds"] / baseline)
        torch.compiler.reset()

    found = compare({"stock": Sampler(stock, batch, steps), "ours": sampler}, device, seconds, least=3)
    baseline = found["stock"]["seconds"]
    for name, times in found.items():
        record(name, times, times["ratio"])
    measure("compiled blocks", compiled_blocks(ours))
    measure("compiled blocks, fastest", compiled_blocks(ours), fastest(ours, sampler))
    return {"preset": preset, "batch": batch, "steps": steps, "rows": rows}


def graphs(preset, size, batch, steps, device, seconds, dtype=torch.bfloat16) -> dict:
    """The latency with the steps of `fastest`, the whole network compiled and launched as one graph."""
    _, ours = pipelines(preset, size, device, dtype)
    sampler = Sampler(ours, batch, steps)
    with fastest(ours, sampler), cuda_graphs(ours):
        times = compare({"ours": sampler}, device, seconds, least=3)["ours"]
    skips = counters["inductor"]["cudagraph_skips"]
    return {"seconds": times["seconds"], "first_seconds": times["first_seconds"], "cudagraph_skips": skips}
