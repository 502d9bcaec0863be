"""Sampling for evaluation: image i depends on (seed, i) alone.

Shapes: `N` images, `H W` pixels.
"""

import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.pixels import open_image
from ..files import check_file, content_of, read_json, writing
from ..seeds import seeded_generator


# How values become 8 bits: `round` as in diffusers and DiT, whose truncated 127.5 x + 128 differs in ties alone;
# `truncate` as in ADM's own samples.
ROUNDINGS = {"round": torch.round, "truncate": torch.floor}


def to_bytes(images: torch.Tensor, rounding: str = "round") -> torch.Tensor:
    """
    Images as 8-bit values.

    Args:
        images (`torch.Tensor` of any shape): Values in [0, 1].
        rounding (`str`, defaults to `"round"`): Or `"truncate"`, which makes images half a level darker on average.

    Returns:
        `torch.Tensor` of the same shape, uint8, on the CPU.
    """
    return ROUNDINGS[rounding](images.float() * 255).to("cpu", torch.uint8)


def sample_images(pipe, labels: torch.Tensor, seed: int, batch_size: int = 48, **options) -> torch.Tensor:
    """
    One image per label; image i depends on (seed, i) alone.

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
        batches.append(to_bytes(pipe(chosen, generator=generators, output_type="pt", **options).images))
    return torch.cat(batches)


# The files that `sample.py` writes beside the images, and the text in each image that tells its set.
SAMPLES, RECIPE = "samples.npz", "recipe.json"
MARK = "dit_hf set"
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


# Label policies that need no dataset.
LABEL_POLICIES = ("balanced", "random")


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


def missing_samples(folder: str | Path, count: int, mark: str) -> list[int]:
    """
    Samples that have not been generated yet, or whose files are damaged. Nothing is written.

    Args:
        folder (`str` or `Path`): Of all samples; it need not exist.
        count (`int`): N.
        mark (`str`): Of the set; each file holds it and its number.

    Returns:
        `list[int]`: their indices.

    Raises:
        ValueError: naming a file in the way that is none of this set.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise ValueError(f"{folder} is not a folder; move it away, or choose a new --output_dir.")
        return list(range(count))
    paths = {path.name: path for path in (sample_path(folder, index) for index in range(count))}
    if foreign := content_of(folder, paths):
        raise ValueError(
            f"{folder / foreign[0]} does not belong to this set; move it away, or choose a new --output_dir."
        )
    return [
        index
        for index, path in enumerate(paths.values())
        if not os.path.lexists(path) or not _is_whole(path, _own_mark(mark, index))
    ]


def _own_mark(mark, index):
    """What the file of a sample holds, so that neither another set's nor another sample's passes for it."""
    return f"{mark} {index}"


def _is_whole(path, mark):
    """Whether an image's checksums hold; `ValueError` if it is not the one of this set."""
    check_file(path)
    found = None
    with suppress(Exception), Image.open(path, formats=["PNG"]) as image:  # what is damaged raises all kinds
        found = image.info.get(MARK)  # it comes before the pixels
        image.verify()
        if found == mark:
            return True
    if found == mark:
        return False
    raise ValueError(
        f"{path} is not the sample of this number in this set: it was generated with other settings, "
        "renamed, or its header is damaged. Move it away, or choose a new --output_dir."
    )


def generate_samples(
    pipe,
    labels: torch.Tensor,
    indices: list[int],
    folder: str | Path,
    mark: str,
    seed: int,
    batch_size: int,
    rounding: str = "round",
    **options,
) -> Iterator[int]:
    """
    Generates samples and writes each as a PNG, whole or not at all.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        labels (`torch.Tensor` of shape `(N,)`, int64): Of all samples.
        indices (`list[int]`): Those to generate.
        folder (`str` or `Path`): Of all samples.
        mark (`str`): Of the set; each file holds it and its number, so that a later run knows its own.
        seed (`int`): Image i depends on (seed, i) alone.
        batch_size (`int`): Images in a batch.
        rounding (`str`, defaults to `"round"`): How values become 8 bits, of `ROUNDINGS`.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …

    Returns:
        `Iterator[int]`: after each batch the number of its images.

    Raises:
        OSError: if an image can't be written.
    """
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        generators = [seeded_generator(seed, index) for index in chosen]
        images = pipe(labels[chosen].tolist(), generator=generators, output_type="pt", **options).images
        for index, pixels in zip(chosen, to_bytes(images, rounding), strict=True):
            image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            metadata = PngInfo()
            metadata.add_text(MARK, _own_mark(mark, index))
            with writing(sample_path(folder, index), one_of_many=True) as partial:
                image.save(partial, pnginfo=metadata)
        yield len(chosen)


def write_npz(folder: str | Path, labels: torch.Tensor, path: str | Path) -> None:
    """
    Writes all samples in ADM's format, one at a time: `arr_0`, uint8, `(N, H, W, 3)`, and `arr_1`, the class ids.

    Args:
        folder (`str` or `Path`): With samples 0 … N-1.
        labels (`torch.Tensor` of shape `(N,)`, int64): Class ids.
        path (`str` or `Path`): The `.npz`.

    Raises:
        OSError: if it can't be written; what was there before is unchanged.
    """
    shape = (len(labels), *np.asarray(open_image(sample_path(folder, 0)).convert("RGB")).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with writing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(len(labels)):
                file.write(np.asarray(open_image(sample_path(folder, index)).convert("RGB")).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())


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
    file = Path(source).parent / RECIPE
    if Path(source).name != SAMPLES or not os.path.lexists(file):
        return {}
    recipe = read_json(file)
    classes = recipe.get("classes")
    if not isinstance(classes, dict | None) or not all(isinstance(name, str) for name in (classes or {}).values()):
        raise ValueError(f"{file}: `classes` must be an object of class id to name.")
    return recipe


def check_recipe(source: str | Path, count: int, digest: str | None = None) -> None:
    """
    Checks that a set of samples is the one that its `recipe.json` describes.

    Args:
        source (`str` or `Path`): The set.
        count (`int`): Its images.
        digest (`str`, *optional*): The hash of its pixels.

    Raises:
        ValueError: if it is another.
    """
    recipe = sampling_recipe(source)
    for name, found in (("num_samples", count), ("pixels", digest)):
        if found is not None and recipe.get(name, found) != found:
            raise ValueError(
                f"{source} is not the set that {RECIPE} beside it describes: `{name}` is {found}, there it is "
                f"{recipe[name]}. Generate it again, or move {RECIPE} away."
            )
