"""Latents of a dataset, encoded once: sharded safetensors with posteriors, those of mirrored images, and statistics.

Shapes: `N` images of a shard, `C` latent channels, `h w` latent size, `F` channels of an alignment's features.

A shard holds consecutive images of the dataset, so its content does not depend on the number of processes. One process
writes it under a temporary name and renames it. Finished shards are kept.
"""

import hashlib
import json
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .autoencoders import encode_posterior, vae_statistics
from .library import datasets
from .pixels import normalize_pixels
from .reader import ImageReader, check_classes, check_skipped


logger = logging.get_logger(__name__)

INDEX = "index.json"
# One entry of metadata, as safetensors writes several in any order, and checksums are to be the same.
FACTS = "dit_hf"
SHARD_SIZE = 2048
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
    """
    pixels = normalize_pixels(pixels).to(vae.device, vae.dtype)
    mean, std = encode_posterior(vae, pixels)
    tensors = {"mean": mean.float().cpu(), "std": std.float().cpu()}
    if encoder is not None:
        tensors["features"] = encoder(pixels.float()).half().cpu()
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
) -> int:
    """
    Encodes this process's missing shards; [`index_latents`] completes the cache when all processes are done.

    Args:
        vae (`diffusers.ModelMixin`): The autoencoder, in eval mode.
        reader (`ImageReader`): The images.
        cache_dir (`str` or `Path`): The cache's folder.
        fingerprint (`str`): From [`~dit_hf.data.fingerprints.cache_fingerprint`]; shards with another one
            are encoded again.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): Shard k is written by process k modulo this.
        encoder (`nn.Module`, *optional*): Of an alignment.
        batch_size (`int`, defaults to 64): Images encoded at once.
        shard_size (`int`, defaults to 2048): Images per shard, except the last.

    Returns:
        `int`: the number of shards, of all processes.

    Raises:
        ValueError: if a label is none of the classes.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    index = cache_dir / INDEX
    if process_index == 0 and index.exists() and read_index(cache_dir)["fingerprint"] != fingerprint:
        index.unlink(missing_ok=True)  # it would describe a mixture from here on
    number = -1
    for number, rows in enumerate(reader.shards(shard_size)):
        path = cache_dir / f"shard-{number:05d}.safetensors"
        if number % num_processes != process_index or _facts(path).get("fingerprint") == fingerprint:
            continue
        rows = list(rows)
        parts: list[dict[str, torch.Tensor]] = []
        labels: list[int | None] = []
        skipped: list[tuple[str, int | None]] = []
        for start in tqdm(range(0, len(rows), batch_size), desc=f"latents, shard {number}", mininterval=5):
            batch = rows[start : start + batch_size]
            read = list(reader.readable(batch, skipped, number * shard_size + start))
            labels += [label for _, label in read]
            if read:
                pixels = torch.stack([image for image, _ in read])
                part = encode_images(vae, pixels, encoder)
                mirrored = encode_images(vae, pixels.flip(-1), encoder)
                parts.append(part | {f"{name}_flipped": tensor for name, tensor in mirrored.items()})
        tensors = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        tensors["label"] = torch.tensor(labels, dtype=torch.int64)
        facts: dict[str, Any] = {"fingerprint": fingerprint, "unreadable": [message for message, _ in skipped]}
        facts["unreadable_labels"] = [label for _, label in skipped]
        if parts:
            facts["moments"] = _moments(tensors["mean"], tensors["std"])
        partial = path.with_name(f"partial-{path.name}")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={FACTS: json.dumps(facts)},
        )
        os.replace(partial, path)
    return number + 1


def index_latents(
    cache_dir: str | Path, fingerprint: str, names: list[str], num_shards: int, made_by: dict[str, str | None]
) -> dict:
    """
    Completes a cache once all shards are there: counts, checksums, statistics, class names.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.
        fingerprint (`str`): The shards'.
        names (`list[str]`): Class names by id.
        num_shards (`int`): How many there are; further shards, of another cache, are removed.
        made_by (`dict[str, str | None]`): Checksums of `vae` and `encoder`, which training compares with its own.

    Returns:
        `dict`: the content of `index.json`.

    Raises:
        ValueError: if a shard is missing, or more than a tenth of all images or all images of a class can't be read.
    """
    cache_dir = Path(cache_dir)
    shards, moments, unreadable, unreadable_labels, labels = [], [], [], [], []
    for path in sorted(cache_dir.glob("shard-*.safetensors"))[num_shards:]:
        path.unlink()
    for number in range(num_shards):
        path = cache_dir / f"shard-{number:05d}.safetensors"
        facts = _facts(path)
        if facts.get("fingerprint") != fingerprint:
            raise ValueError(f"{path} is missing or of another cache; re-run the same command.")
        unreadable += facts["unreadable"]
        unreadable_labels += facts.get("unreadable_labels", [])
        labels += _labels(path).tolist()
        if "moments" in facts:
            moments.append(facts["moments"])
        shards.append({"file": path.name, "count": len(_labels(path)), "sha256": _checksum(path)})
    count = sum(shard["count"] for shard in shards)
    check_skipped(unreadable, count)
    check_classes(names, labels, zip(unreadable, unreadable_labels, strict=False))
    mean, std = _statistics(moments)
    index = {"fingerprint": fingerprint, "count": count, "unreadable": unreadable, "classes": names} | made_by
    index |= {"latents_mean": mean, "latents_std": std, "shards": shards}
    partial = cache_dir / f"partial-{INDEX}"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, cache_dir / INDEX)
    return index


def verify_latents(cache_dir: str | Path) -> dict:
    """
    Compares a cache with its index.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.

    Returns:
        `dict`: the content of `index.json`.

    Raises:
        ValueError: naming the shard whose count or checksum differs.
    """
    index = read_index(cache_dir)
    for shard in index["shards"]:
        path = Path(cache_dir) / shard["file"]
        if not path.exists() or _checksum(path) != shard["sha256"] or len(_labels(path)) != shard["count"]:
            raise ValueError(f"{path} is not what was written; delete it and encode the dataset again.")
    return index


def read_index(cache_dir: str | Path) -> dict:
    """
    Reads a cache's `index.json`.

    Args:
        cache_dir (`str` or `Path`): The cache's folder.

    Returns:
        `dict`

    Raises:
        ValueError: if there is none.
    """
    file = Path(cache_dir) / INDEX
    if not file.exists():
        raise ValueError(f"{cache_dir} holds no cache of latents ({INDEX} is missing); `dit-hf latents` makes one.")
    return json.loads(file.read_text(encoding="utf-8"))


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

    Raises:
        ValueError: if the cache is not complete.
    """

    def __init__(self, cache_dir: str | Path):
        self.index = read_index(cache_dir)
        self._shards, self._starts, labels, start = [], [], [], 0
        for shard in self.index["shards"]:
            path = Path(cache_dir) / shard["file"]
            if _facts(path).get("fingerprint") != self.index["fingerprint"] or len(_labels(path)) != shard["count"]:
                raise ValueError(f"{path} is missing or of another cache; encode the dataset again.")
            file = safe_open(path, "pt")
            if shard["count"]:
                names = file.keys()
                self._shards.append({name: file.get_slice(name) for name in names})
                self._starts.append(start)
            labels.append(file.get_tensor("label"))
            start += shard["count"]
        self.labels = torch.cat(labels)
        self.statistics = self.index["latents_mean"], self.index["latents_std"]
        first = self._shards[0]
        self.shape = tuple(first["mean"].get_shape()[1:])
        self.feature_dim = first["features"].get_shape()[1] if "features" in first else None

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
        rows = []
        for index, flip in zip(indices.tolist(), flipped.tolist(), strict=True):
            number = bisect_right(self._starts, index) - 1
            shard, row = self._shards[number], index - self._starts[number]
            suffix = "_flipped" if flip else ""
            names = ("mean", "std") if self.feature_dim is None else ("mean", "std", "features")
            rows.append({name: shard[name + suffix][row : row + 1].float() for name in names})
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} | {"label": self.labels[indices]}


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
        raise ValueError("None of the dataset's images can be read.")


def normalise_latents(latents: torch.Tensor, latents_mean: list[float], latents_std: list[float]) -> torch.Tensor:
    """
    Latents to zero mean and unit variance a channel; the pipeline undoes it before decoding.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): As the VAE encodes them.
        latents_mean (`list[float]`): A value a channel, or one for all.
        latents_std (`list[float]`): A value a channel, or one for all.

    Returns:
        `torch.Tensor`: same shape.
    """
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (latents_mean, latents_std))
    return (latents - mean) / std


def _facts(path):
    """A shard's metadata; empty if there is no such file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (FileNotFoundError, SafetensorError):
        return {}


def _labels(path):
    with safe_open(path, "pt") as file:
        return file.get_tensor("label")


def _checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    return mean.tolist(), (squares - mean.square()).sqrt().tolist()
