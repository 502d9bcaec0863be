"""Validation during training: averaged weights, sample grids, metrics against held-out images, the loss curve.

Shapes: `N` held-out images, `H W` pixels.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from ..evaluation.extractors import EFFICIENTNET, EfficientNetExtractor, Features, extract, load_extractor
from ..evaluation.metrics import METRICS, Available, Metric, compute_metrics, too_few_images
from ..evaluation.reference import ReferenceStatistics
from ..evaluation.samples import sample_images
from ..evaluation.statistics import gaussian
from ..files import first_line
from ..hub import BackgroundUploads
from ..seeds import seeded_generator


# Metrics of samples and held-out images; those that need training images are for `dit-hf metrics`.
HELD_OUT_METRICS = {
    metric.name: metric
    for metric in METRICS
    if Available(EfficientNetExtractor.parts, True, (), False).missing(metric) is None
}


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
    One row per class, from the same noise at every call.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        classes (`list[int]`): Class ids, the rows.
        columns (`int`): Images per class.
        seed (`int`): Image i depends on (seed, i) alone.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …

    Returns:
        `PIL.Image.Image`
    """
    generators = [seeded_generator(seed, index) for index in range(len(classes) * columns)]
    images = pipe(classes, num_images_per_label=columns, generator=generators, **options).images
    return make_image_grid(images, rows=len(classes), cols=columns)


def validation_metrics(names: Sequence[str]) -> list[Metric]:
    """
    Rows of the table of metrics that a validation can compute.

    Args:
        names (`Sequence[str]`): Names in [`HELD_OUT_METRICS`], such as `"fd"`, `"kid"`, `"precision"`.

    Returns:
        `list[Metric]`

    Raises:
        ValueError: if a name is none of them.
    """
    for name in names:
        if name not in HELD_OUT_METRICS:
            raise ValueError(
                f"{name!r} is not a metric of the validation, which has samples and held-out images; choose from "
                f"{', '.join(HELD_OUT_METRICS)}."
            )
    return [HELD_OUT_METRICS[name] for name in names]


class HeldOutMetrics:
    """
    Metrics against held-out images, by EfficientNet-Lite0's features. Those of the held-out images are extracted once.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        labels (`torch.Tensor` of shape `(N,)`, int64): Their class ids, of which the samples must be.
        metrics (`Sequence[str]`, defaults to `("fd",)`): As for [`validation_metrics`].

    Raises:
        ValueError: if there is no such metric, or it needs more images.
        ImportError: if the network is not installed.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, metrics: Sequence[str] = ("fd",)):
        rows = validation_metrics(metrics)
        self.labels, self.names = labels, [row.full_name(EFFICIENTNET) for row in rows]
        few = too_few_images(self.names, EFFICIENTNET, dict.fromkeys(("samples", "reference"), len(images)))
        if few:
            name, reason = next(iter(few.items()))
            raise ValueError(f"{name} {reason}; hold out more images.")
        with torch.random.fork_rng(devices=()):  # the network draws weights before it loads its own
            self.extractor = load_extractor(EFFICIENTNET)
        self.reference = self._features(images)
        of_statistics = {row.needs for row in rows if row.against == "statistics"}
        parts = {part: gaussian(getattr(self.reference, part)) for part in of_statistics}
        self.statistics = ReferenceStatistics(parts, self.reference.extractor, self.reference.image_size, True)

    def _features(self, images: torch.Tensor) -> Features:
        return replace(extract(images, self.extractor), labels=[str(label) for label in self.labels.tolist()])

    def measure(self, samples: torch.Tensor) -> dict[str, float]:
        """
        The metrics of samples.

        Args:
            samples (`torch.Tensor` of shape `(N, 3, H, W)`): uint8, one of each label.

        Returns:
            `dict[str, float]`: by the names of `dit-hf metrics`: `fd_efficientnet_lite0`, `kid` …
        """
        seen = self._features(samples)
        found = compute_metrics(seen, self.reference, self.names, statistics=self.statistics)
        return {name: result["value"] for name, result in found.items()}


def grid_path(output_dir: str | Path, step: int) -> Path:
    """The sample grid of a step."""
    return Path(output_dir) / "samples" / f"step-{step:06d}.png"


class Validation:
    """
    A sample grid and, with held-out images, metrics; for `Trainer.train`.

    Args:
        pipe (`DiTClassCondPipeline`): With the transformer that is trained.
        output_dir (`str` or `Path`): Grids go to `samples/step-N.png` in it.
        seed (`int`): Of the noise, the same at every step.
        classes (`int`, defaults to 10): Rows of a grid at most.
        images_per_class (`int`, defaults to 8): Its columns.
        held_out (`HeldOutMetrics`, *optional*): The metrics, of one sample for each held-out image.
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
        held_out: HeldOutMetrics | None = None,
        uploads: BackgroundUploads | None = None,
        is_main_process: bool = True,
        **options,
    ):
        check_sampling(pipe, **options)
        self.pipe, self.output_dir, self.seed, self.options = pipe, output_dir, seed, options
        self.classes, self.images_per_class = list(pipe.id2label)[:classes], images_per_class
        self.held_out, self.uploads, self.is_main_process = held_out, uploads, is_main_process

    def __call__(self, step: int) -> dict[str, float]:
        """
        Samples with the pipeline's weights.

        Args:
            step (`int`): Finished steps.

        Returns:
            `dict[str, float]`: what `held_out` measures, if it is given.
        """
        grid = sample_grid(self.pipe, self.classes, self.images_per_class, self.seed, **self.options)
        metrics = {}
        if self.held_out is not None:
            metrics = self.held_out.measure(sample_images(self.pipe, self.held_out.labels, self.seed, **self.options))
        if self.is_main_process:
            path = grid_path(self.output_dir, step)
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
