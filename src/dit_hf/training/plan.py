"""What a training run would take, before it starts."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import default_collate

from ..complexity import count_macs
from ..models import DiTTransformer2DModel
from .config import TrainingConfig
from .objectives import Objective
from .speed import prepare_teacher


def training_plan(
    transformer: DiTTransformer2DModel, objective: Objective, config: TrainingConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """
    Size, compute, memory that is taken from the first step, and hours by three timed steps on random latents.

    Args:
        transformer (`DiTTransformer2DModel`): The model, with what is not trained frozen.
        objective (`Objective`): Its loss.
        config (`TrainingConfig`): Batch size, micro-batches and number of steps.
        accelerator (`accelerate.Accelerator`): Device and precision.

    Returns:
        `dict`: to print as JSON.
    """
    transformer.to(accelerator.device).train()
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    wrapped = accelerator.prepare(transformer)
    auxiliary = objective.auxiliary_loss()
    weight, head = (0.0, None) if auxiliary is None else (auxiliary.weight, accelerator.prepare(auxiliary))
    if objective.teacher is not None:
        prepare_teacher(objective.teacher, replace(config, compile_blocks=False), accelerator)
    count = config.total_batch_size // accelerator.num_processes // config.gradient_accumulation_steps
    size = transformer.config.sample_size
    latents = torch.randn(2, count, transformer.config.in_channels, size, size)
    batch = {"x_start": latents[0], "noise": latents[1], "time": objective.draw_time(count, torch.Generator())}
    batch |= {"label": torch.zeros(count, dtype=torch.int64), "progress": torch.zeros(count)}
    if transformer.config.class_dropout_prob > 0:
        batch["drop"] = torch.zeros(count, dtype=torch.bool)
    others = [objective.draw_sample(latents.shape[2:], time, torch.Generator()) for time in batch["time"]]
    batch = {name: values.to(accelerator.device) for name, values in {**batch, **default_collate(others)}.items()}
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(config.gradient_accumulation_steps):
            loss = objective.loss(wrapped, batch).mean()
            if head is not None:
                loss = loss + weight * head(batch).mean()
            accelerator.backward(loss)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[1:])  # the first one warms up
    frozen = 0 if objective.teacher is None else sum(part.numel() for part in objective.teacher.parameters())
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    heads = 0 if auxiliary is None else sum(parameter.numel() for parameter in auxiliary.parameters())
    # Weights; gradients, two moments and the average of what is trained; the heads have no average. In float32.
    floats = frozen + transformer.num_parameters() + 4 * trained + 4 * heads
    return {
        "parameters (M)": round(transformer.num_parameters() / 1e6, 2),
        "trained (M)": round(trained / 1e6, 2),
        "Gflops per sample, forward": round(count_macs(transformer.config) / 1e9, 3),
        "memory without activations (GB)": round(4 * floats / 1e9, 3),
        "steps": config.max_train_steps,
        "seconds per step, forward and backward": round(step, 3),
        "hours": round(step * config.max_train_steps / 3600, 2),
    }
