"""Sampling for evaluation: image i depends on (seed, i) alone.

Shapes: `N` images, `H W` pixels.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..seeds import seeded_generator


def sample_images(pipe, labels: torch.Tensor, seed: int, batch_size: int = 48, **options) -> torch.Tensor:
    """
    One image a label; image i depends on (seed, i) alone.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        labels (`torch.Tensor` of shape `(N,)`, int64): Class ids.
        seed (`int`): Of the noise.
        batch_size (`int`, defaults to 48): Images in a batch.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …

    Returns:
        `torch.Tensor` of shape `(N, 3, H, W)`, uint8, on the CPU.
    """
    batches = []
    for start in range(0, len(labels), batch_size):
        chosen = labels[start : start + batch_size].tolist()
        generators = [seeded_generator(seed, start + index) for index in range(len(chosen))]
        images = pipe(chosen, generator=generators, output_type="pt", **options).images
        batches.append((images * 255).round().to("cpu", torch.uint8))
    return torch.cat(batches)


# The file that `sample.py` writes.
SAMPLES = "samples.npz"
# Rows of the paper's tables (DiT, tables 2 and 3): 250 steps of the original's sampler, three guided channels.
_PAPER = {"scheduler": "ddpm", "num_inference_steps": 250, "num_samples": 50_000, "labels": "random"}
_PAPER |= {"guidance_channels": 3, "guidance_interval": (0.0, 1.0), "vae": "stabilityai/sd-vae-ft-mse"}
SAMPLING_RECIPES = {
    "dit-xl-2-g1.00": _PAPER | {"guidance_scale": 1.0},
    "dit-xl-2-g1.25": _PAPER | {"guidance_scale": 1.25},
    "dit-xl-2-g1.50": _PAPER | {"guidance_scale": 1.5},
    "dit-xl-2-512-g1.00": _PAPER | {"guidance_scale": 1.0},
    "dit-xl-2-512-g1.25": _PAPER | {"guidance_scale": 1.25},
    "dit-xl-2-512-g1.50": _PAPER | {"guidance_scale": 1.5},
}


def sample_labels(policy: str, count: int, num_classes: int, seed: int) -> torch.Tensor:
    """
    The class of each sample; that of sample i depends on (seed, i) alone.

    Args:
        policy (`str`): `"balanced"`, classes in turn, or `"random"`, each class with the same probability.
        count (`int`): N.
        num_classes (`int`): Classes.
        seed (`int`): Of the random ones.

    Returns:
        `torch.Tensor` of shape `(N,)`, int64.
    """
    if policy == "balanced":
        return torch.arange(count) % num_classes
    generators = (seeded_generator(seed, index, 1) for index in range(count))
    return torch.tensor([torch.randint(num_classes, (), generator=generator).item() for generator in generators])


def sample_path(folder: str | Path, index: int) -> Path:
    """
    The file of a sample.

    Args:
        folder (`str` or `Path`): Of all samples.
        index (`int`): The sample.

    Returns:
        `Path`
    """
    return Path(folder) / f"{index:06d}.png"


def missing_samples(folder: str | Path, count: int) -> list[int]:
    """
    Samples that have not been generated yet.

    Args:
        folder (`str` or `Path`): Created if it does not exist.
        count (`int`): N.

    Returns:
        `list[int]`: their indices.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [index for index in range(count) if not sample_path(folder, index).exists()]


def generate_samples(
    pipe, labels: torch.Tensor, indices: list[int], folder: str | Path, seed: int, batch_size: int, **options
) -> Iterator[int]:
    """
    Generates samples and writes each as a PNG, whole or not at all.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        labels (`torch.Tensor` of shape `(N,)`, int64): Of all samples.
        indices (`list[int]`): Those to generate.
        folder (`str` or `Path`): Of all samples.
        seed (`int`): Image i depends on (seed, i) alone.
        batch_size (`int`): Images in a batch.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …

    Returns:
        `Iterator[int]`: after each batch the number of its images.
    """
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        generators = [seeded_generator(seed, index) for index in chosen]
        images = pipe(labels[chosen].tolist(), generator=generators, **options).images
        for index, image in zip(chosen, images, strict=True):
            path = sample_path(folder, index)
            partial = path.with_name(f"partial-{path.name}")
            image.save(partial)
            partial.replace(path)
        yield len(chosen)


def write_npz(folder: str | Path, labels: torch.Tensor, path: str | Path) -> None:
    """
    Writes all samples in ADM's format, one at a time: `arr_0`, uint8, `(N, H, W, 3)`, and `arr_1`, the class ids.

    Args:
        folder (`str` or `Path`): With samples 0 … N-1.
        labels (`torch.Tensor` of shape `(N,)`, int64): Class ids.
        path (`str` or `Path`): The `.npz`.
    """
    path = Path(path)
    partial = path.with_name(f"partial-{path.name}")
    shape = (len(labels), *np.asarray(Image.open(sample_path(folder, 0)).convert("RGB")).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(len(labels)):
                file.write(np.asarray(Image.open(sample_path(folder, index)).convert("RGB")).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())
    partial.replace(path)


def sampling_recipe(source: str | Path) -> dict:
    """
    How a set of samples was generated.

    Args:
        source (`str` or `Path`): The set.

    Returns:
        `dict`: the `recipe.json` that `sample.py` wrote beside its `samples.npz`; empty for other sets.

    Raises:
        ValueError: if that file is damaged.
    """
    file = Path(source).parent / "recipe.json"
    try:
        return json.loads(file.read_text("utf-8")) if Path(source).name == SAMPLES and file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} can't be read: {error}") from error
