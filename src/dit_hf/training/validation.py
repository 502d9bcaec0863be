"""Validation during training: averaged weights, sample grids, distances to held-out images, the loss curve."""

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from ..evaluation.extractors import EFFICIENTNET, extract, load_extractor
from ..evaluation.frechet import frechet_distance
from ..evaluation.metrics import METRICS
from ..evaluation.samples import sample_images
from ..files import first_line
from ..hub import BackgroundUploads
from ..seeds import seeded_generator


# What the distance to held-out images is called, in the log and on the card, as `dit-hf metrics` calls it.
DISTANCE = next(metric for metric in METRICS if metric.name == "fd").full_name(EFFICIENTNET)


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


def check_sampling(pipe, **options) -> dict[str, Any]:
    """
    Checks what samples are asked for, before there is one.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        options: For its calls: `guidance_scale`, `num_inference_steps` …

    Returns:
        `dict[str, Any]`: the options, and the pipeline's own for those that are not given.

    Raises:
        ValueError: if the pipeline or its scheduler can't do it.
    """
    pipe.check_components()
    settings = pipe.resolve_call(**options)
    steps = settings["num_inference_steps"]
    scheduler = type(pipe.scheduler)
    try:
        scheduler.from_config(pipe.scheduler.config).set_timesteps(steps)
    except ValueError as error:
        what = f"`num_inference_steps` is {steps}, which {scheduler.__name__} can't take"
        raise ValueError(f"{what}: {first_line(error)}") from None
    return settings


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


class Validation:
    """
    A sample grid and, with held-out images, a Fréchet distance; for `Trainer.train`.

    Args:
        pipe (`DiTClassCondPipeline`): With the transformer that is trained.
        output_dir (`str` or `Path`): Grids go to `samples/step-N.png` in it.
        seed (`int`): Of the noise, the same at every step.
        classes (`int`, defaults to 10): Rows of a grid at most.
        images_per_class (`int`, defaults to 8): Its columns.
        held_out (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Images `(N, 3, H, W)`, uint8, and class ids `(N,)`.
        uploads (`BackgroundUploads`, *optional*): Sends the grids to the Hub.
        is_main_process (`bool`, defaults to `True`): Who writes; all processes have to sample.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …
    """

    def __init__(
        self,
        pipe,
        output_dir: str | Path,
        seed: int,
        classes: int = 10,
        images_per_class: int = 8,
        held_out: tuple[torch.Tensor, torch.Tensor] | None = None,
        uploads: BackgroundUploads | None = None,
        is_main_process: bool = True,
        **options,
    ):
        check_sampling(pipe, **options)
        self.pipe, self.folder, self.seed, self.options = pipe, Path(output_dir) / "samples", seed, options
        self.classes, self.images_per_class = list(pipe.id2label)[:classes], images_per_class
        self.held_out, self.uploads, self.is_main_process = held_out, uploads, is_main_process
        if held_out is not None:
            self.extractor = load_extractor(EFFICIENTNET)

    def __call__(self, step: int) -> dict[str, float]:
        """
        Samples with the pipeline's weights.

        Args:
            step (`int`): Finished steps.

        Returns:
            `dict[str, float]`: `fd_efficientnet_lite0`, if there are held-out images.
        """
        grid = sample_grid(self.pipe, self.classes, self.images_per_class, self.seed, **self.options)
        metrics = {}
        if self.held_out is not None:
            images, labels = self.held_out
            samples = sample_images(self.pipe, labels, self.seed, **self.options)
            seen = [extract(part, self.extractor).features for part in (samples, images)]
            metrics = {DISTANCE: frechet_distance(*seen)}
        if self.is_main_process:
            path = self.folder / f"step-{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
            if self.uploads is not None:
                self.uploads.send(path, f"samples/{path.name}")
        return metrics


def plot_losses(steps: list[int], losses: list[float], path: str | Path) -> None:
    """
    Plots the loss, with its running mean.

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
