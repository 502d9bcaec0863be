"""Guided sampling of DiT-XL/2 in 50 steps: stock pipeline, ours, compiled, with CUDA graphs, and the presets."""

import contextlib
from functools import partial

import torch
import torch._inductor.config
from diffusers import AutoencoderKL, DiTPipeline
from networks import stock_dit
from timing import clock, compare

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, optimize, restore
from dit_hf.complexity import count_macs


# A guided step computes two rows an image.
ROWS = 2


def tiny_vae():
    """A decoder that costs next to nothing, so that the transformer is what is timed."""
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, sample_size=32, latent_channels=4)


def pipelines(preset, size, device, dtype):
    """The stock pipeline and ours, of random weights, in one precision."""
    torch.manual_seed(0)
    stock = DiTPipeline(stock_dit(preset, size).eval(), tiny_vae(), make_scheduler("ddim"))
    model = DiTTransformer2DModel.from_preset(preset, sample_size=size).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    ours = DiTClassCondPipeline(model, make_scheduler("ddim"), tiny_vae())
    for pipe in (stock, ours):
        pipe.to(device, dtype)
        pipe.set_progress_bar_config(disable=True)
    return stock, ours


def sampling(preset, size, batch, steps, gemm, device, seconds, dtype=torch.bfloat16) -> dict:
    """Images per second, and the share of the measured product rate, of each way to sample one batch."""
    stock, ours = pipelines(preset, size, device, dtype)
    labels = [number % 1000 for number in range(batch)]
    call = {"num_inference_steps": steps, "guidance_scale": 4.0, "generator": None}
    rows = {}

    def run(pipe, **others):
        pipe(labels, **call | others, output_type="np" if pipe is stock else "pt")

    macs = count_macs(ours.transformer.config)

    def record(name, times, taken=steps):
        rate = batch / times["seconds"]
        rows[name] = {
            "images_per_second": round(rate, 3),
            "seconds": times["seconds"],
            "share_of_gemm": round(rate * taken * ROWS * 2 * macs / gemm, 4),
            "ratio": times["ratio"],
            "first_seconds": round(times["first_seconds"], 1),
        }

    with torch.no_grad():
        found = compare({"stock": partial(run, stock), "ours": partial(run, ours)}, device, seconds, least=3)
        for name, times in found.items():
            record(name, times)
        baseline = found["stock"]["seconds"]
        for name, preset_name, graphs in (
            *(("compiled", "exact", False), ("compiled, CUDA graphs", "exact", True)),
            *(("fastest", "fastest", False), ("fastest, CUDA graphs", "fastest", True)),
        ):
            if graphs and device.type != "cuda":
                continue
            patch = torch._inductor.config.patch({"triton.cudagraphs": True}) if graphs else contextlib.nullcontext()
            with patch:
                optimize(ours, preset_name)
                own = {} if preset_name == "exact" else ours.resolve_call()
                taken = own.get("num_inference_steps", steps)
                others = {key: own[key] for key in ("num_inference_steps", "guidance_interval") if key in own}
                first = clock(partial(run, ours, **others), device)
                again = compare({"ours": partial(run, ours, **others)}, device, seconds, least=3)["ours"]
            restore(ours)
            again |= {"ratio": again["seconds"] / baseline, "first_seconds": first}
            record(name, again, taken)
            torch.compiler.reset()
    return {"preset": preset, "batch": batch, "steps": steps, "rows": rows}
