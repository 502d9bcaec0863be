"""Training steps: this package's trainer beside the stock model and a plain loop, and with its data beside without."""

import contextlib
import json
import tempfile
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from networks import stock_dit
from safetensors.torch import save_file
from timing import clock, compare
from torch.autograd import DeviceType

from dit_hf import DiTTransformer2DModel
from dit_hf.complexity import count_macs
from dit_hf.data.latents import CachedLatents
from dit_hf.data.shards import FACTS, file_checksum, shard_path, write_index
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import VelocityObjective
from dit_hf.training.prefetch import AHEAD, Prefetcher
from dit_hf.training.trainer import Trainer

from .report import free


# Multiply-adds of a trained image over those of a forward pass, and operations of a multiply-add.
TRAINED_FLOPS = 3 * 2


class OneBatch:
    """Latents of one batch, for a trainer that is given its batches."""

    def __init__(self, shape, count):
        self.labels = torch.arange(count) % 1000
        self.statistics = [0.0] * shape[0], [1.0] * shape[0]
        self.feature_dim = None


def make_batch(batch, size, device, generator):
    """A batch as the trainer's `draw` makes it, on the device."""
    x_start, noise = (torch.randn(batch, 4, size, size, generator=generator).to(device) for _ in range(2))
    numbers = {"time": torch.rand(batch, generator=generator), "drop": torch.rand(batch, generator=generator) < 0.1}
    numbers["label"] = torch.arange(batch) % 1000
    return {"x_start": x_start, "noise": noise} | {name: value.to(device) for name, value in numbers.items()}


def build_trainer(model, latents, batch, folder, **settings):
    """This package's trainer in bfloat16, with AdamW and an average."""
    config = TrainingConfig(folder, batch, max_train_steps=10**6, ema_decay=0.9999, **settings)
    return Trainer(config, model, latents, VelocityObjective(), accelerator=Accelerator(mixed_precision="bf16"))


def our_step(trainer, batch):
    """A step of the trainer on a batch that is on the device; the log is not written."""
    trainer._step(0, batch)
    trainer._unread.clear()


def compile_blocks(model):
    """Blocks compiled one by one, as the trainer compiles them: all are one graph."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.transformer_blocks:
        block.compile(dynamic=False)


class PlainLoop:
    """A step as the original script takes it, in bfloat16: AdamW, an average by parameter, the loss on the host."""

    def __init__(self, model, compiled, fused):
        self.model, self.average = model, deepcopy(model)
        self.fused = fused
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=fused or None)
        if compiled:
            compile_blocks(model)
        self.loss = 0.0

    def step(self, batch):
        """One optimizer step."""
        sigma = batch["time"][:, None, None, None]
        noisy = (1 - sigma) * batch["x_start"] + sigma * batch["noise"]
        labels = torch.where(batch["drop"], 1000, batch["label"])
        with torch.autocast(noisy.device.type, torch.bfloat16):
            output = self.model(noisy, batch["time"] * 1000, class_labels=labels).sample[:, :4]
        loss = F.mse_loss(output.float(), batch["noise"] - batch["x_start"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            if self.fused:
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1e-4)
            else:
                for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    average.mul_(0.9999).add_(weight, alpha=1e-4)
                self.loss = loss.item()


def throughput(preset, size, batch, gemm, device, seconds, beside=True, checkpointing=False) -> dict:
    """
    Images per second of a size, and its fraction of the measured product rate; `beside`: with the stock model and
    plain loops in turn in the same rounds. A batch that does not fit is halved.
    """
    while batch:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return _throughput(preset, size, batch, gemm, device, seconds, beside, checkpointing)
        free()
        batch //= 2
    raise MemoryError(f"{preset} does not fit with one image per step.")


def _throughput(preset, size, batch, gemm, device, seconds, beside, checkpointing):
    given = make_batch(batch, size, device, torch.Generator().manual_seed(0))
    candidates, peaks = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"sample_size": size, "num_classes": 1000, "learn_sigma": False}
        kinds = (("ours", True), ("ours, eager", False)) if beside else (("ours", True),)
        for name, compiled in kinds:
            with device:  # where random weights are drawn at once
                model = DiTTransformer2DModel.from_preset(preset, **options)
            settings = {"compile_blocks": compiled, "gradient_checkpointing": checkpointing}
            trainer = build_trainer(model, OneBatch((4, size, size), batch), batch, f"{folder}/{name}", **settings)
            candidates[name] = partial(our_step, trainer, given)
        for name, compiled, fused in (
            (("stock, compiled, fused optimizer", True, True), ("plain loop, compiled", True, False))
            + (("plain loop", False, False),)
            if beside
            else ()
        ):
            with device:
                model = stock_dit(preset, size).train().to(device)
            candidates[name] = partial(PlainLoop(model, compiled, fused).step, given)
        for name, call in candidates.items():
            clock(call, device)  # with compilation
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - before
        found = compare(candidates, device, seconds, least=3)
    macs = _macs(preset, options)
    rows = {}
    for name, times in found.items():
        rate = batch / times["seconds"]
        rows[name] = {
            "images_per_second": round(rate, 2),
            "share_of_gemm": round(rate * TRAINED_FLOPS * macs / gemm, 4),
            "ms": round(1000 * times["seconds"], 3),
            "ratio": times["ratio"],
            "spread": times["spread"],
            "step_bytes": peaks.get(name),  # beside weights, averages and the optimizer's state
        }
    return {"preset": preset, "latents": size, "batch": batch, "checkpointing": checkpointing, "rows": rows}


# Parts of a kernel's name -> what it does.
KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "wgmma", "cublas"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "fused, bound by memory": ("triton",),
}


def profile(preset, size, batch, device) -> dict:
    """Where the time of three steps goes: seconds of a GPU's kernels by kind, and of the gaps between them."""
    given = make_batch(batch, size, device, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        with device:
            model = DiTTransformer2DModel.from_preset(preset, sample_size=size, num_classes=1000, learn_sigma=False)
        trainer = build_trainer(model, OneBatch((4, size, size), batch), batch, folder)
        step = partial(our_step, trainer, given)
        clock(step, device)
        whole = clock(lambda: [step() for _ in range(3)], device)
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    kinds = dict.fromkeys((*KINDS, "others"), 0.0)
    kernels: Counter = Counter()
    for event in profiler.events():  # kernels alone: operators on the CPU carry the time of their kernels as well
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name] += event.self_device_time_total / 1e6
    for name, taken in kernels.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "others")
        kinds[kind] += taken
    longest = [(name[:120], round(taken, 5)) for name, taken in kernels.most_common(15)]
    return {"seconds": whole, "kinds": kinds, "gaps": whole - sum(kinds.values()), "longest": longest}


def _macs(preset, options):
    with torch.device("meta"):
        return count_macs(DiTTransformer2DModel.from_preset(preset, **options).config)


def write_cache(folder, shards, shard_size, size):
    """A cache of random latents in half precision, as `dit-hf latents` writes it."""
    generator, entries = torch.Generator().manual_seed(0), []
    for number in range(shards):
        shape = (shard_size, 4, size, size)
        tensors = {f"mean{suffix}": torch.randn(shape, generator=generator).half() for suffix in ("", "_flipped")}
        tensors |= {f"std{suffix}": torch.full(shape, 0.1).half() for suffix in ("", "_flipped")}
        tensors["label"] = torch.randint(1000, (shard_size,), generator=generator)
        path = shard_path(folder, number)
        facts = {"fingerprint": "synthetic", "unreadable": []}
        save_file(tensors, path, metadata={FACTS: json.dumps(facts)})
        entries.append({"file": path.name, "count": shard_size, "sha256": file_checksum(path)})
    index = {"fingerprint": "synthetic", "count": shards * shard_size, "unreadable": [], "vae": None, "encoder": None}
    index |= {"classes": [str(number) for number in range(1000)], "shards": entries}
    write_index(folder, index | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})


def data_path(preset, size, batch, shards, shard_size, steps, device) -> dict:
    """Seconds of a step with batches from a cache on the disk, over those of the same step on one batch."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cache").mkdir()
        write_cache(Path(folder, "cache"), shards, shard_size, size)
        options = {"sample_size": size, "num_classes": 1000, "learn_sigma": False}
        with device:
            model = DiTTransformer2DModel.from_preset(preset, **options)
        trainer = build_trainer(model, CachedLatents(f"{folder}/cache"), batch, f"{folder}/run")
        given = {name: values.to(device) for name, values in trainer.draw(0).items()}
        step = partial(our_step, trainer)
        clock(partial(step, given), device)
        pinned = device.type == "cuda"
        ahead = AHEAD * trainer.num_workers

        def with_data(turn):
            """Steps whose batches were not made while nothing was timed."""
            with Prefetcher(trainer.draw, trainer.num_workers, 10**6, pinned) as batches:
                for number in range(ahead):
                    step(batches.take(turn * 1000 + number))
                return clock(lambda: [step(batches.take(turn * 1000 + ahead + k)) for k in range(steps)], device)

        with_data(0)
        ratios = []
        for turn in range(1, 4):
            taken = with_data(turn)
            ratios.append(taken / clock(lambda: [step(given) for _ in range(steps)], device))
    return {
        "preset": preset,
        "batch": batch,
        "workers": trainer.num_workers,
        "ratio": sorted(ratios)[1],
        "ratios": ratios,
    }
