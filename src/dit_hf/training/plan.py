"""What a training run would take, before it starts."""

import statistics
import time
from collections.abc import Callable

from ..complexity import count_macs
from ..transformer_dit import DiTTransformer2DModel


def training_plan(transformer: DiTTransformer2DModel, one_step: Callable[[], object], num_steps: int) -> dict:
    """
    Size, compute, memory that is there from the first step, and hours by three timed steps.

    Args:
        transformer (`DiTTransformer2DModel`): The model, with what is not trained frozen.
        one_step (`Callable`): Runs forward and backward of one step.
        num_steps (`int`): Steps of the run.

    Returns:
        `dict`: to print as JSON.
    """
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        one_step()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[1:])  # the first one warms up
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return {
        "parameters (M)": round(transformer.num_parameters() / 1e6, 2),
        "trained (M)": round(trained / 1e6, 2),
        "Gflops a sample, forward": round(count_macs(transformer.config) / 1e9, 3),
        # Weights; gradients, two moments and the average of what is trained; float32.
        "memory without activations (GB)": round(4 * (transformer.num_parameters() + 4 * trained) / 1e9, 3),
        "steps": num_steps,
        "seconds a step, forward and backward": round(step, 3),
        "hours": round(step * num_steps / 3600, 2),
    }
