"""What a training reads: a dataset's images, the cache of their latents, held-out images for validation.

Shapes: `N` images, `H W` pixels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.autoencoders import latent_channels, spatial_factor, vae_statistics
from ..data.fingerprints import cache_settings, checksum
from ..data.images import label_names, load_image_dataset
from ..data.latents import DECODER, SHARD_SIZE, CachedLatents, cache_latents, check_images, index_latents
from ..data.reader import ImageReader
from ..data.shards import check_cache, known_fingerprint, record_dates
from ..pipeline_dit_class_cond import is_rae
from .running import run_on_main


@dataclass(frozen=True)
class ImageData:
    """
    A labelled image dataset and how it is read.

    Args:
        resolution (`int`): Pixels per side that images are cropped and resized to.
        dataset_name (`str`, *optional*): A Hub id or a local dataset.
        train_data_dir (`str` or `Path`, *optional*):
            Instead: a folder with one folder of images per class, or with shards.
        split (`str`, defaults to `"train"`): The split to train on.
        holdout (`float`, defaults to 0.0): Fraction of the images that data with one split hold out as split `"test"`.
        streaming (`bool`, defaults to `False`): Whether to keep no copy of the images.
        image_column (`str`, defaults to `"image"`): Column with images.
        label_column (`str`, defaults to `"label"`): Column with class ids or names.
    """

    resolution: int
    dataset_name: str | None = None
    train_data_dir: str | Path | None = None
    split: str = "train"
    holdout: float = 0.0
    streaming: bool = False
    image_column: str = "image"
    label_column: str = "label"

    @property
    def source(self) -> str | Path | None:
        """Where the images come from."""
        return self.dataset_name or self.train_data_dir

    def load(self, split: str, streaming: bool = False):
        """A split, as `datasets` has it; `ValueError` if there is none."""
        return load_image_dataset(self.dataset_name, split, self.train_data_dir, streaming, holdout=self.holdout)

    def reader(self) -> ImageReader:
        """The images of the training split; `ValueError` if the dataset, the split or a column is missing."""
        dataset = self.load(self.split, self.streaming)
        names = label_names(dataset, self.label_column)
        return ImageReader(dataset, names, self.resolution, self.image_column, self.label_column)

    def settings(self, reader: ImageReader, shard_size: int = SHARD_SIZE, **made_by) -> dict:
        """What latents depend on: the images and what is done to them; `made_by` are checksums of the networks."""
        settings = {"split": self.split, "holdout": self.holdout, "resolution": self.resolution}
        settings["classes"] = reader.names
        settings |= {"columns": [self.image_column, self.label_column], "shard_size": shard_size}
        return cache_settings(reader.dataset, self.source or "", **settings, **made_by)

    def held_out(
        self, split: str, names: list[str], ids: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Images of another split, spread over it.

        Args:
            split (`str`): Its name.
            names (`list[str]`): Classes of the split that is trained on, by id.
            ids (`torch.Tensor` of shape `(classes,)`, int64): Their ids in the model.
            count (`int`): Images at most.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `(N, 3, H, W)`, uint8, and class ids of the model, `(N,)`.

        Raises:
            ValueError: if there is no such split, or it has other classes.
        """
        dataset = self.load(split)
        if label_names(dataset, self.label_column) != names:
            raise ValueError(
                f"Split {split!r} has other classes than {self.split!r}; both splits must have the same classes."
            )
        dataset = dataset.select(torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist())
        images, labels = ImageReader(dataset, names, self.resolution, self.image_column, self.label_column).stack()
        return images, ids[torch.tensor(labels)]


def latent_size(vae, resolution: int) -> int:
    """Side of the latents of images of this resolution; `ValueError` if the autoencoder can't encode it."""
    factor = spatial_factor(vae)
    if resolution < factor or resolution % factor:
        raise ValueError(f"--resolution {resolution} is not divisible by {factor}, the VAE's factor.")
    if is_rae(vae) and resolution != (only := factor * math.isqrt(vae.num_patches)):
        raise ValueError(f"--resolution is {resolution}; this AutoencoderRAE has latents of one size, pass {only}.")
    return resolution // factor


def checksums(vae, encoder=None) -> dict[str, str | None]:
    """What latents and features are made by."""
    return {"vae": checksum(vae, DECODER), "encoder": None if encoder is None else checksum(encoder)}


def write_latents(
    accelerator,
    vae,
    data: ImageData,
    reader: ImageReader,
    folder: str | Path,
    encoder=None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """
    Encodes a dataset, on all processes; what an earlier call wrote is kept, and a sample of its images compared.

    Args:
        accelerator (`accelerate.Accelerator`): The processes.
        vae: An autoencoder from [`load_autoencoder`].
        data (`ImageData`): The dataset.
        reader (`ImageReader`): Its images.
        folder (`str` or `Path`): Where the latents go.
        encoder (`nn.Module`, *optional*): Of an alignment, whose features are kept as well.
        shard_size (`int`, defaults to 2048): Images per file.

    Raises:
        ValueError: if the folder holds another cache, files of the user, or latents of other images.
        OSError: if it can't be written.
    """
    folder = Path(folder)
    made_by = checksums(vae, encoder)
    settings = data.settings(reader, shard_size, **made_by)
    fingerprint, every = known_fingerprint(folder, settings)
    is_there = check_cache(folder, fingerprint, settings)
    # It also waits, before the main process writes.
    run_on_main(accelerator, lambda: check_images(folder, reader, shard_size, every))
    if is_there and every:
        run_on_main(accelerator, lambda: record_dates(folder, settings))
    if is_there:
        return
    rank, size = accelerator.process_index, accelerator.num_processes
    num_shards = cache_latents(
        vae, reader, folder, fingerprint, rank, size, encoder, shard_size=shard_size, settings=settings
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        index_latents(folder, fingerprint, reader.names, num_shards, made_by, settings)
    accelerator.wait_for_everyone()


def open_latents(
    folder: str | Path,
    vae,
    resolution: int,
    encoder=None,
    keep_statistics: bool = False,
    share: tuple[int, int] = (0, 1),
) -> CachedLatents:
    """
    Opens a cache of latents for training. The statistics that normalise them are written to the config of the
    autoencoder, or taken from there.

    Args:
        folder (`str` or `Path`): The cache.
        vae: The autoencoder that will decode samples; its config is changed unless `keep_statistics`.
        resolution (`int`): Pixels per side of the images.
        encoder (`nn.Module`, *optional*): Of an alignment.
        keep_statistics (`bool`, defaults to `False`): Whether to normalise as the autoencoder's config says.
        share (`tuple[int, int]`): This process and how many verify the cache together, as for [`CachedLatents`].

    Returns:
        `CachedLatents`

    Raises:
        ValueError: if the latents were made by another autoencoder or encoder, or have another shape.
    """
    latents = CachedLatents(folder, *share)
    made_by = checksums(vae, encoder)
    for flag, name in (("--vae", "vae"), ("--alignment_encoder", "encoder")):
        if made_by[name] is not None and latents.index.get(name) not in (None, made_by[name]):
            raise ValueError(
                f"{folder} was not made with the {name} of {flag}; encode the images again with this one."
            )
    size, channels = latent_size(vae, resolution), latent_channels(vae)
    if latents.shape != (channels, size, size):
        raise ValueError(
            f"{folder} holds latents {latents.shape}; the VAE makes {(channels, size, size)} of the images."
        )
    if keep_statistics or is_rae(vae):
        latents.statistics = vae_statistics(vae)
        return latents
    mean, std = latents.statistics
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    return latents
