"""Latents of a dataset, encoded once: sharded safetensors with posteriors, those of mirrored images, and statistics.

Means and deviations are in half precision, which rounds a value by 2⁻¹¹ of its size at most; statistics are not.

Shapes: `N` images of a shard, `C` latent channels, `h w` latent size, `F` channels of an alignment's features.

A shard holds consecutive images of the dataset, so its content does not depend on the number of processes. One process
writes it under a temporary name and renames it. Finished shards are kept; what is not of the same cache is refused.
"""

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..files import writing
from .autoencoders import encode_posterior, vae_statistics
from .fingerprints import summary
from .library import datasets
from .pixels import normalize_pixels
from .reader import MAX_UNREADABLE, ImageReader, check_classes, check_skipped
from .shards import (
    FACTS,
    INDEX,
    MAX_SHARD_SIZE,
    RowReader,
    begun_dtype,
    check_cache,
    check_checksums,
    check_shards,
    file_checksum,
    read_index,
    record_verified,
    remove_partial_shards,
    shard_digests,
    shard_facts,
    shard_labels,
    shard_path,
    write_index,
)


logger = logging.get_logger(__name__)

SHARD_SIZE = 2048
# Images whose content is compared with what was encoded before a cache is used or completed.
COMPARED_IMAGES = 256
# Prefixes of a VAE's weights that have no part in encoding.
DECODER = ("decoder.", "post_quant_conv.")


@torch.no_grad()
def encode_images(vae, pixels: torch.Tensor, encoder=None) -> dict[str, torch.Tensor]:
    """
    Posteriors of images under an autoencoder, and an alignment encoder's features of them.

    Args:
        vae (`diffusers.ModelMixin`): From [`~dit_hf.data.autoencoders.load_autoencoder`].
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        encoder (`nn.Module`, *optional*): From `dit_hf.training.alignment.load_encoder`, on the VAE's device.

    Returns:
        `dict[str, torch.Tensor]`: `mean`, `std` of shape `(N, C, h, w)`, std 0 where the autoencoder is deterministic;
        with an encoder also `features` of shape `(N, F, h, w)` in half precision; on the CPU.

    Raises:
        ValueError: if they are not finite.
    """
    pixels = normalize_pixels(pixels).to(vae.device, vae.dtype)
    mean, std = encode_posterior(vae, pixels)
    tensors = {"mean": mean.float().cpu(), "std": std.float().cpu()}
    if encoder is not None:
        tensors["features"] = encoder(pixels.float()).half().cpu()
    for name, tensor in tensors.items():
        if bad := [row for row, values in enumerate(tensor) if not values.isfinite().all()]:
            raise ValueError(
                f"{name} is not finite for {len(bad)} of {len(tensor)} images, such as number {bad[0]}: the weights "
                f"are damaged, or {vae.dtype} is too narrow for them."
            )
    return tensors


def cache_latents(
    vae,
    reader: ImageReader,
    cache_dir: str | Path,
    fingerprint: str,
    process_index: int = 0,
    num_processes: int = 1,
    encoder=None,
    batch_size: int = 64,
    shard_size: int = SHARD_SIZE,
    settings: dict[str, Any] | None = None,
) -> int:
    """
    Encodes this process's missing shards; [`index_latents`] completes the cache when all processes are done.

    Args:
        vae (`diffusers.ModelMixin`): The autoencoder, in eval mode.
        reader (`ImageReader`): The images.
        cache_dir (`str` or `Path`): The cache's folder.
        fingerprint (`str`): From [`~dit_hf.data.fingerprints.fingerprint_of`]; shards with the same one are kept.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): Shard k is written by process k modulo this.
        encoder (`nn.Module`, *optional*): Of an alignment.
        batch_size (`int`, defaults to 64): Images encoded at once.
        shard_size (`int`, defaults to 2048): Images per shard, except the last.
        settings (`dict`, *optional*): What the fingerprint is of, which the cache records.

    Returns:
        `int`: the number of shards, of all processes.

    Raises:
        ValueError:
            if the folder holds files of another cache or of the user, a label is none of the classes, latents are not
            finite, or more than a tenth of all images can't be read.
        OSError: if a shard can't be written; those before it are kept.
    """
    if batch_size < 1 or not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(
            f"A batch of {batch_size} and shards of {shard_size} images: both must be at least 1, and shards at most "
            f"{MAX_SHARD_SIZE}."
        )
    cache_dir = Path(cache_dir)
    if process_index == 0 and not check_cache(cache_dir, fingerprint, settings):
        (cache_dir / INDEX).unlink(missing_ok=True)  # of the same cache, which is not complete from here on
    dtype = begun_dtype(cache_dir, fingerprint) or torch.float16
    total = None if isinstance(reader.dataset, datasets.IterableDataset) else len(reader.dataset)
    number, all_skipped = -1, list[str]()
    for number, rows in enumerate(reader.shards(shard_size)):
        path = shard_path(cache_dir, number)
        if number % num_processes != process_index:
            continue
        facts = shard_facts(path)
        if facts.get("fingerprint") == fingerprint:
            if len(shard_labels(path)) + len(facts.get("unreadable", [])) != len(rows):
                raise ValueError(f"{path} does not hold {len(rows)} images; remove it, and re-run.")
            continue
        tensors, skipped = _encode_shard(vae, reader, rows, number * shard_size, encoder, batch_size, dtype)
        all_skipped += [message for message, _ in skipped]
        if total is not None and len(all_skipped) > MAX_UNREADABLE * total:
            check_skipped(all_skipped, total - len(all_skipped))
        facts = {"fingerprint": fingerprint, "unreadable": [message for message, _ in skipped]}
        facts["unreadable_labels"] = [label for _, label in skipped]
        if settings is not None:
            facts["settings"] = summary(settings)
        if len(tensors["label"]):
            facts["moments"] = _moments(tensors["mean"], tensors["std"])
        try:
            with writing(path) as partial:
                save_file(tensors, partial, metadata={FACTS: json.dumps(facts)})
        except OSError as error:
            raise OSError(f"{error} The shards before it are whole and kept; re-run the same command.") from error
    return number + 1


def _encode_shard(vae, reader, rows, first, encoder, batch_size, dtype):
    """The tensors of a shard whose first image is at a position, and its skipped images."""
    parts: list[dict[str, torch.Tensor]] = []
    labels: list[int | None] = []
    digests: list[int] = []
    skipped: list[tuple[str, int | None]] = []
    rows = list(rows)
    for start in tqdm(range(0, len(rows), batch_size), desc=f"latents from image {first}", mininterval=5):
        position = first + start
        batch = [reader.load(row, position + k) for k, row in enumerate(rows[start : start + batch_size])]
        digests += [reader.digest(row, position + k) for k, row in enumerate(batch)]
        read = list(reader.readable(batch, skipped, position))
        labels += [label for _, label in read]
        if read:
            pixels = torch.stack([image for image, _ in read])
            try:
                part = encode_images(vae, pixels, encoder)
                mirrored = encode_images(vae, pixels.flip(-1), encoder)
            except ValueError as error:
                raise ValueError(f"Images from {position} on: {error}") from error
            part |= {f"{name}_flipped": tensor for name, tensor in mirrored.items()}
            parts.append({name: tensor if "features" in name else tensor.to(dtype) for name, tensor in part.items()})
            if not all(tensor.isfinite().all() for tensor in parts[-1].values()):
                raise ValueError(
                    f"Images from {position} on: the latents are too large for half precision; check the weights of "
                    "the autoencoder."
                )
    tensors = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    tensors |= {"label": torch.tensor(labels, dtype=torch.int64), "source": torch.tensor(digests, dtype=torch.int64)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, skipped


def check_images(
    cache_dir: str | Path, reader: ImageReader, shard_size: int = SHARD_SIZE, every: bool = False
) -> None:
    """
    Compares the content of a sample of images with what was encoded. The fingerprint knows files by size and date
    alone, which damage to a disk, or a copy that keeps dates, does not change. Images of a stream, and those of a
    cache of a release before 0.3, can't be compared.

    Args:
        cache_dir (`str` or `Path`): A cache of the same fingerprint, whether or not it is complete.
        reader (`ImageReader`): The images; of more than 256, the same 256 are chosen every time.
        shard_size (`int`, defaults to 2048): Images per shard.
        every (`bool`, defaults to `False`): Whether all images are compared, as their dates have changed.

    Raises:
        ValueError: naming the first image that is another one, or if every image of a stream would have to be read.
    """
    if isinstance(reader.dataset, datasets.IterableDataset):
        if every:
            raise ValueError(
                f"The dates of the images of {cache_dir} have changed, and those of a stream can't be compared: omit "
                "--streaming once, or restore the dates (`cp -p`, `rsync -t`)."
            )
        return
    total, digests = len(reader.dataset), dict[int, Any]()
    chosen = random.Random(0).sample(range(total), total if every else min(COMPARED_IMAGES, total))
    for position in sorted(chosen):
        number, row = divmod(position, shard_size)
        path = shard_path(cache_dir, number)
        if number not in digests:
            digests[number] = shard_digests(path) if shard_facts(path) else None
        if digests[number] is None or row >= len(digests[number]):
            continue
        found = reader.dataset[position]
        if reader.digest(found, position) != digests[number][row]:
            raise ValueError(
                f"{reader.name(found, position)} is not the image that {path} was encoded from, though name and size "
                "are the same. Restore it, or choose another folder to encode all images again."
            )


def index_latents(
    cache_dir: str | Path,
    fingerprint: str,
    names: list[str],
    num_shards: int,
    made_by: dict[str, str | None],
    settings: dict[str, Any] | None = None,
) -> dict:
    """
    Completes a cache once all shards are there: counts, checksums, statistics, class names.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.
        fingerprint (`str`): The shards'.
        names (`list[str]`): Class names by id.
        num_shards (`int`): How many there are.
        made_by (`dict[str, str | None]`): Checksums of `vae` and `encoder`, which training compares with its own.
        settings (`dict`, *optional*): What the fingerprint is of, which the index records.

    Returns:
        `dict`: the content of `index.json`.

    Raises:
        ValueError:
            if a shard is missing or one too many, more than a tenth of all images or all images of a class can't be
            read, or a channel of the latents does not vary.
        OSError: if the index can't be written.
    """
    cache_dir = Path(cache_dir)
    shards, moments, unreadable, unreadable_labels, labels = [], [], [], [], []
    for number in range(num_shards):
        path = shard_path(cache_dir, number)
        facts = shard_facts(path)
        if facts.get("fingerprint") != fingerprint:
            raise ValueError(f"{path} is missing or of another cache; re-run the same command.")
        unreadable += facts["unreadable"]
        unreadable_labels += facts.get("unreadable_labels", [])
        found = shard_labels(path).tolist()
        labels += found
        if "moments" in facts:
            moments.append(facts["moments"])
        shards.append({"file": path.name, "count": len(found), "sha256": file_checksum(path)})
    if shard_path(cache_dir, num_shards).exists():
        raise ValueError(f"{shard_path(cache_dir, num_shards)} is one shard too many; remove it, and re-run.")
    count = len(labels)
    check_skipped(unreadable, count)
    check_classes(names, labels, zip(unreadable, unreadable_labels, strict=False))
    mean, std = _statistics(moments)
    index = {"fingerprint": fingerprint, "count": count, "unreadable": unreadable, "classes": names} | made_by
    index |= {"latents_mean": mean, "latents_std": std, "shards": shards}
    if settings is not None:
        index["settings"] = summary(settings)
    write_index(cache_dir, index)
    record_verified(cache_dir, index)
    remove_partial_shards(cache_dir)
    return index


def latent_shape(cache_dir: str | Path) -> tuple[int, int, int]:
    """
    The shape of a sample, by the header of the first shard alone.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.

    Returns:
        `tuple[int, int, int]`: C, h, w.

    Raises:
        ValueError: if there is no cache, or its first shard is not what an index describes.
    """
    index = read_index(cache_dir)
    first = next(shard for shard in index["shards"] if shard["count"])
    check_shards(cache_dir, index | {"shards": [first]})
    with safe_open(Path(cache_dir) / first["file"], "pt") as file:
        return tuple(file.get_slice("mean").get_shape()[1:])


def verify_latents(cache_dir: str | Path) -> dict:
    """
    Compares a cache with its index.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.

    Returns:
        `dict`: the content of `index.json`.

    Raises:
        ValueError: naming the shard whose layout, count or checksum differs.
    """
    index = read_index(cache_dir)
    check_shards(cache_dir, index)
    check_checksums(cache_dir, index, again=True)
    return index


class CachedLatents:
    """
    A cache of latents, read from disk as needed.

    Attributes:
        labels (`torch.Tensor` of shape `(samples,)`, int64): Their classes.
        shape (`tuple[int, int, int]`): C, h, w.
        statistics (`tuple[list[float], list[float]]`): Mean and standard deviation a channel.
        feature_dim (`int`, *optional*): F, if the cache has features.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.
        rank (`int`, defaults to 0): This process, of those that verify the cache together.
        count (`int`, defaults to 1): How many these are.

    Raises:
        ValueError: if the cache is not complete, or a shard is not what was written, by its checksum.
    """

    def __init__(self, cache_dir: str | Path, rank: int = 0, count: int = 1):
        self.cache_dir, self.index = cache_dir, read_index(cache_dir)
        check_shards(cache_dir, self.index)
        check_checksums(cache_dir, self.index, rank, count)
        shards = [shard for shard in self.index["shards"] if shard["count"]]
        paths = [Path(cache_dir) / shard["file"] for shard in shards]
        self._rows = [RowReader(path) for path in paths]
        starts = [0, *accumulate(shard["count"] for shard in shards)][:-1]
        labels = [shard_labels(path) for path in paths]
        self._starts = torch.tensor(starts)
        self.labels = torch.cat(labels)
        self.statistics = self.index["latents_mean"], self.index["latents_std"]
        shapes = self._rows[0].shapes
        self.shape = shapes["mean"][1:]
        self.feature_dim = shapes["features"][1] if "features" in shapes else None

    def read(self, indices: torch.Tensor, flipped: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Posteriors and classes of some samples.

        Args:
            indices (`torch.Tensor` of shape `(B,)`, int64): The samples.
            flipped (`torch.Tensor` of shape `(B,)`, bool): Whose mirror image to take.

        Returns:
            `dict[str, torch.Tensor]`: `mean` and `std` of shape `(B, C, h, w)`, `label` `(B,)`, and `features`
            `(B, F, h, w)` if the cache has them.
        """
        names = ("mean", "std") if self.feature_dim is None else ("mean", "std", "features")
        shapes, dtype = self._rows[0].shapes, self._rows[0].dtypes
        read = {name: torch.empty(len(indices), *shapes[name][1:], dtype=dtype[name]) for name in names}
        numbers = torch.bucketize(indices, self._starts, right=True) - 1
        for number in numbers.unique().tolist():
            places = (numbers == number).nonzero()[:, 0]
            rows = (indices[places] - self._starts[number]).tolist()
            self._rows[number].read_into(read, places.tolist(), rows, flipped[places].tolist())
        read = {name: values.float() for name, values in read.items()}
        valid = (read["std"] >= 0).flatten(1).all(dim=1)
        for values in read.values():
            valid &= values.isfinite().flatten(1).all(dim=1)
        if not valid.all():
            index = indices[~valid][0].item()
            raise ValueError(
                f"{self.cache_dir}: sample {index} is not finite, or its deviation is below 0; encode the images "
                "again."
            )
        return read | {"label": self.labels[indices]}


class EncodedImages:
    """
    Latents that are encoded when a batch needs them, without a cache; the autoencoder's config normalises them.

    Args:
        vae (`AutoencoderKL`): In eval mode.
        reader (`ImageReader`): Of a dataset that is not streamed.
        encoder (`nn.Module`, *optional*): Of an alignment.

    Raises:
        ValueError: if the dataset is streamed, or no image of a class can be read.
    """

    def __init__(self, vae, reader: ImageReader, encoder=None):
        if isinstance(reader.dataset, datasets.IterableDataset):
            raise ValueError("A streamed dataset can't be read at random positions; omit --no-cache_latents.")
        self.vae, self.reader, self.encoder = vae, reader, encoder
        self.labels = torch.tensor(reader.label_ids())
        self._check_classes()
        first = self.read(torch.tensor([0]), torch.tensor([False]))
        self.feature_dim = first["features"].shape[1] if encoder is not None else None
        self.statistics = vae_statistics(vae)

    def read(self, indices: torch.Tensor, flipped: torch.Tensor) -> dict[str, torch.Tensor]:
        """As [`CachedLatents.read`]; the next image replaces one that can't be read, and a warning names it."""
        found = [self._next_readable(index) for index in indices.tolist()]
        images = torch.stack([image for image, _ in found])
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        encoded = encode_images(self.vae, images, self.encoder)
        return {name: tensor.float() for name, tensor in encoded.items()} | {
            "label": torch.tensor([label for _, label in found])
        }

    def _check_classes(self):
        """Decodes images of each class until one can be read."""
        found: set[int] = set()
        skipped: list[tuple[str, int | None]] = []
        for position, label in enumerate(self.labels.tolist()):
            if label not in found and list(self.reader.readable([self.reader.dataset[position]], skipped, position)):
                found.add(label)
        check_classes(self.reader.names, found, skipped)

    def _next_readable(self, index):
        count = len(self.reader.dataset)
        for position in (*range(index, count), *range(index)):
            try:
                return self.reader.read(self.reader.dataset[position], position)
            except OSError as error:
                logger.warning(f"Skipped: {error}")
        raise ValueError("None of the dataset's images can be read; the warnings above say why.")


def normalise_latents(latents: torch.Tensor, latents_mean: list[float], latents_std: list[float]) -> torch.Tensor:
    """
    Latents to zero mean and unit variance per channel; the pipeline undoes it before decoding.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): As the VAE encodes them.
        latents_mean (`list[float]`): One value per channel, or one for all.
        latents_std (`list[float]`): One value per channel, or one for all.

    Returns:
        `torch.Tensor`: same shape.
    """
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (latents_mean, latents_std))
    return (latents - mean) / std


def _moments(mean, std):
    """Number of values, and a channel's sums of samples and of squares, over random draws from the posteriors."""
    channels = mean.double().transpose(0, 1).flatten(1)  # (C, N·h·w)
    variances = std.double().square().transpose(0, 1).flatten(1)
    squares = (channels.square() + variances).sum(dim=1)
    return {"count": channels.shape[1], "sum": channels.sum(dim=1).tolist(), "squares": squares.tolist()}


def _statistics(moments):
    """Mean and standard deviation a channel, `latents_mean` and `latents_std` of a VAE's config."""
    count = sum(shard["count"] for shard in moments)
    mean = torch.tensor([shard["sum"] for shard in moments], dtype=torch.float64).sum(dim=0) / count
    squares = torch.tensor([shard["squares"] for shard in moments], dtype=torch.float64).sum(dim=0) / count
    variance = squares - mean.square()
    if not (mean.isfinite() & (variance > 0)).all():
        raise ValueError(
            "The latents of all images are the same, or not finite, in a channel: is the autoencoder damaged?"
        )
    return mean.tolist(), variance.sqrt().tolist()
