"""Latents of a dataset, encoded once: sharded safetensors with posteriors, their mirror images and statistics.

Shapes: `N` images of a shard, `C` latent channels, `h w` latent size, `F` channels of an alignment's features.

A shard holds the images of one stretch of the dataset, so that its content does not depend on the number of processes,
and each is written by one process, to the side and then renamed. What is there already is kept.
"""

import hashlib
import json
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from diffusers.utils import logging
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .images import to_unit_range
from .reader import ImageReader


logger = logging.get_logger(__name__)

INDEX = "index.json"
# One entry of metadata, as safetensors writes several in any order, and checksums are to be the same.
FACTS = "dit_hf"
SHARD_SIZE = 2048
# Counted up when the same images would give other pixels than before.
PREPROCESSING = 1
# What of a VAE has no part in encoding.
DECODER = ("decoder.", "post_quant_conv.")
# More unreadable images than this share are no accident.
MAX_UNREADABLE = 0.1


@torch.no_grad()
def encode_images(vae, pixels: torch.Tensor, encoder=None) -> dict[str, torch.Tensor]:
    """
    The VAE's posteriors of images, and what an alignment's encoder sees in them.

    Args:
        vae (`AutoencoderKL`): In eval mode.
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        encoder (`nn.Module`, *optional*): From `dit_hf.training.alignment.load_encoder`, on the VAE's device.

    Returns:
        `dict[str, torch.Tensor]`: `mean`, `std` of shape `(N, C, h, w)`, with an encoder also `features` of shape
        `(N, F, h, w)` in half precision; on the CPU.
    """
    pixels = to_unit_range(pixels).to(vae.device, vae.dtype)
    posterior = vae.encode(pixels).latent_dist
    tensors = {"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu()}
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
    Encodes this process's shards, those that are not there yet; [`index_latents`] completes the cache when all are done.

    Args:
        vae (`AutoencoderKL`): In eval mode.
        reader (`ImageReader`): The images.
        cache_dir (`str` or `Path`): The cache's folder.
        fingerprint (`str`): From [`cache_fingerprint`]; shards with another one are written anew.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): Shard k is written by process k modulo this.
        encoder (`nn.Module`, *optional*): Of an alignment.
        batch_size (`int`, defaults to 64): Images encoded at once.
        shard_size (`int`, defaults to 2048): Images a shard, but the last.

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
        labels, unreadable = [], []
        for start in tqdm(range(0, len(rows), batch_size), desc=f"latents, shard {number}", mininterval=5):
            images = []
            for offset, row in enumerate(rows[start : start + batch_size], start=start):
                try:
                    image, label = reader.read(row, number * shard_size + offset)
                except OSError as error:
                    unreadable.append(str(error))
                    continue
                images.append(image)
                labels.append(label)
            if images:
                pixels = torch.stack(images)
                part = encode_images(vae, pixels, encoder)
                mirrored = encode_images(vae, pixels.flip(-1), encoder)
                parts.append(part | {f"{name}_flipped": tensor for name, tensor in mirrored.items()})
        tensors = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        tensors["label"] = torch.tensor(labels, dtype=torch.int64)
        facts: dict[str, Any] = {"fingerprint": fingerprint, "unreadable": unreadable}
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
        names (`list[str]`): Class names, by id.
        num_shards (`int`): How many there are; what is left of another cache is removed.
        made_by (`dict[str, str | None]`): Checksums of `vae` and `encoder`, to hold a training against.

    Returns:
        `dict`: the content of `index.json`.

    Raises:
        ValueError: if a shard is missing, or more than a tenth of the images could not be read.
    """
    cache_dir = Path(cache_dir)
    shards, moments, unreadable = [], [], []
    for path in sorted(cache_dir.glob("shard-*.safetensors"))[num_shards:]:
        path.unlink()
    for number in range(num_shards):
        path = cache_dir / f"shard-{number:05d}.safetensors"
        facts = _facts(path)
        if facts.get("fingerprint") != fingerprint:
            raise ValueError(f"{path} is missing or of another cache; run the same command again.")
        unreadable += facts["unreadable"]
        if "moments" in facts:
            moments.append(facts["moments"])
        shards.append({"file": path.name, "count": _count(path), "sha256": _checksum(path)})
    count = sum(shard["count"] for shard in shards)
    if unreadable:
        logger.warning(f"{len(unreadable)} of {count + len(unreadable)} images can't be read and are left out:")
        for line in unreadable[:20]:
            logger.warning(line)
    if len(unreadable) > MAX_UNREADABLE * (count + len(unreadable)):
        raise ValueError(
            f"{len(unreadable)} of {count + len(unreadable)} images can't be read, such as {unreadable[0]}"
        )
    if count == 0:
        raise ValueError("The dataset has no images.")
    mean, std = _statistics(moments)
    index = {"fingerprint": fingerprint, "count": count, "unreadable": unreadable, "classes": names} | made_by
    index |= {"latents_mean": mean, "latents_std": std, "shards": shards}
    partial = cache_dir / f"partial-{INDEX}"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(partial, cache_dir / INDEX)
    return index


def verify_latents(cache_dir: str | Path) -> dict:
    """
    Holds a cache against its index.

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
        if not path.exists() or _checksum(path) != shard["sha256"] or _count(path) != shard["count"]:
            raise ValueError(f"{path} is not what was written; delete it and run precompute_latents.py again.")
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
        raise ValueError(
            f"{cache_dir} holds no cache of latents ({INDEX} is missing); precompute_latents.py makes one."
        )
    return json.loads(file.read_text())


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
            if _facts(path).get("fingerprint") != self.index["fingerprint"] or _count(path) != shard["count"]:
                raise ValueError(f"{path} is missing or of another cache; run precompute_latents.py again.")
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
    Latents encoded as they are drawn, without a cache; the VAE's own scale or statistics normalise them.

    Args:
        vae (`AutoencoderKL`): In eval mode.
        reader (`ImageReader`): Of a dataset that is not streamed.
        encoder (`nn.Module`, *optional*): Of an alignment.

    Raises:
        ValueError: if the dataset is streamed.
    """

    def __init__(self, vae, reader: ImageReader, encoder=None):
        if isinstance(reader.dataset, IterableDataset):
            raise ValueError("A streamed dataset has no order to draw from; leave out --no-cache_latents.")
        self.vae, self.reader, self.encoder = vae, reader, encoder
        self.labels = torch.tensor(
            [reader.label_id(label, i) for i, label in enumerate(reader.dataset[reader.label_column])]
        )
        first = self.read(torch.tensor([0]), torch.tensor([False]))
        self.feature_dim = first["features"].shape[1] if encoder is not None else None
        self.statistics = vae_statistics(vae)

    def read(self, indices: torch.Tensor, flipped: torch.Tensor) -> dict[str, torch.Tensor]:
        """As [`CachedLatents.read`]; the next readable image takes the place of one that is not, and a line names it."""
        found = [self._next_readable(index) for index in indices.tolist()]
        images = torch.stack([image for image, _ in found])
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        encoded = encode_images(self.vae, images, self.encoder)
        return {name: tensor.float() for name, tensor in encoded.items()} | {
            "label": torch.tensor([label for _, label in found])
        }

    def _next_readable(self, index):
        count = len(self.reader.dataset)
        for position in (*range(index, count), *range(index)):
            try:
                return self.reader.read(self.reader.dataset[position], position)
            except OSError as error:
                logger.warning(f"Left out: {error}")
        raise ValueError("None of the dataset's images can be read.")


def checksum(module: torch.nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """
    A hash of a network's weights.

    Args:
        module (`torch.nn.Module`): The network.
        leave_out (`tuple[str, ...]`): Beginnings of parameter names that do not count.

    Returns:
        `str`
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(leave_out):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def cache_fingerprint(dataset, source: str | Path, **settings: Any) -> str:
    """
    Changes when the data or what is done to them change.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data.
        source (`str` or `Path`): Where they come from; a local folder's files count by size and date.
        settings: Whatever else the latents depend on, as JSON: checksums of VAE and encoder among it.

    Returns:
        `str`
    """
    if Path(source).exists():
        files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        data: Any = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    elif isinstance(dataset, IterableDataset):
        data = HfApi().dataset_info(str(source)).sha
    else:
        data = dataset._fingerprint
    settings |= {"preprocessing": PREPROCESSING, "source": str(source), "data": data}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def vae_statistics(vae) -> tuple[list[float], list[float]]:
    """
    What a VAE's config normalises latents by.

    Args:
        vae (`AutoencoderKL`): The VAE.

    Returns:
        `tuple[list[float], list[float]]`: mean and standard deviation, a value a channel or one for all.
    """
    config = vae.config
    mean, std = ([0.0], [1.0]) if config.latents_mean is None else (config.latents_mean, config.latents_std)
    shift, scale = config.shift_factor or 0.0, config.scaling_factor or 1.0
    return [value + shift for value in mean], [value / scale for value in std]


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
    """What a shard says of itself; nothing if there is no such file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (FileNotFoundError, SafetensorError):
        return {}


def _count(path):
    with safe_open(path, "pt") as file:
        return file.get_slice("label").get_shape()[0]


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
