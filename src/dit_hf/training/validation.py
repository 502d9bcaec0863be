"""Looking at a model while it is trained: averaged weights, sample grids, the curve of losses."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from ..seeds import seeded_generator


@contextmanager
def averaged_weights(ema, transformer):
    """
    The averaged weights in the model's place, in eval mode, until the block ends.

    Args:
        ema (`diffusers.training_utils.EMAModel`): Of the model's trainable parameters.
        transformer (`DiTTransformer2DModel`): The model.
    """
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    ema.store(parameters)
    ema.copy_to(parameters)
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()
        ema.restore(parameters)


def sample_grid(pipe, classes: list[int], columns: int, seed: int, **options):
    """
    One row a class, from the same noise every time.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        classes (`list[int]`): Class ids, the rows.
        columns (`int`): Images a class.
        seed (`int`): Image i depends on (seed, i) alone.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …

    Returns:
        `PIL.Image.Image`
    """
    generators = [seeded_generator(seed, index) for index in range(len(classes) * columns)]
    images = pipe(classes, num_images_per_label=columns, generator=generators, **options).images
    return make_image_grid(images, rows=len(classes), cols=columns)


def plot_losses(steps: list[int], losses: list[float], path: str | Path) -> None:
    """
    Draws the loss, with its running mean.

    Args:
        steps (`list[int]`): The steps.
        losses (`list[float]`): Their losses.
        path (`str` or `Path`): The PNG to write.
    """
    from matplotlib.figure import Figure

    finite = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    steps, losses = [step for step, _ in finite], [loss for _, loss in finite]
    window = max(len(losses) // 50, 1)
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    means = (sums[window:] - sums[:-window]) / window
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    axes.plot(steps, losses, linewidth=0.4, alpha=0.4)
    axes.plot(steps[window - 1 :], means.tolist(), label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
