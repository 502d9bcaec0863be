"""Latents cached once: the VAE's posteriors of a dataset, and their statistics in the VAE's config.

Shapes: `N` images, `C` latent channels, `h w` latent size.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .images import to_unit_range


CACHE_FILE = "latents.safetensors"


@torch.no_grad()
def cache_latents(
    vae, images: torch.Tensor, labels: torch.Tensor, cache_dir: str | Path, batch_size: int = 64
) -> Path:
    """
    Encodes images and their mirror images, and writes the posteriors' means and standard deviations.

    Args:
        vae (`AutoencoderKL`): In eval mode.
        images (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        labels (`torch.Tensor` of shape `(N,)`): int64.
        cache_dir (`str` or `Path`): Where the file goes; a cache of the same VAE and images is kept.
        batch_size (`int`, defaults to 64): Images encoded at once.

    Returns:
        `Path`: a safetensors file with `mean`, `std`, `mean_flipped`, `std_flipped` of shape `(N, C, h, w)`, `label`.
    """
    path = Path(cache_dir) / CACHE_FILE
    fingerprint = _fingerprint(vae, images, labels)
    if path.exists():
        with safe_open(path, "pt") as cached:
            if (cached.metadata() or {}).get("fingerprint") == fingerprint:
                return path
    posteriors: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "mean_flipped": [], "std_flipped": []}
    for batch in tqdm(images.split(batch_size), desc="latents"):
        pixels = to_unit_range(batch).to(vae.device, vae.dtype)
        for suffix, view in (("", pixels), ("_flipped", pixels.flip(-1))):
            posterior = vae.encode(view).latent_dist
            posteriors["mean" + suffix].append(posterior.mean.float().cpu())
            posteriors["std" + suffix].append(posterior.std.float().cpu())
    tensors = {name: torch.cat(parts).contiguous() for name, parts in posteriors.items()} | {"label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    save_file(tensors, partial, metadata={"fingerprint": fingerprint})
    os.replace(partial, path)
    return path


def _fingerprint(vae, images, labels):
    """Changes when the VAE's encoder or the data change."""
    digest = hashlib.sha256(json.dumps([list(images.shape), str(vae.dtype)]).encode())
    encoder = [*vae.encoder.parameters(), *(vae.quant_conv.parameters() if vae.config.use_quant_conv else ())]
    for tensor in (*encoder, images, labels):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def latent_statistics(mean: torch.Tensor, std: torch.Tensor) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation of a channel over samples of the posteriors.

    Args:
        mean (`torch.Tensor` of shape `(N, C, h, w)`): Posterior means.
        std (`torch.Tensor` of shape `(N, C, h, w)`): Posterior standard deviations.

    Returns:
        `tuple[list[float], list[float]]`: C values each, for `latents_mean` and `latents_std` of a VAE's config.
    """
    channels = mean.double().transpose(0, 1).flatten(1)  # (C, N·h·w)
    variance = channels.var(dim=1) + std.double().square().transpose(0, 1).flatten(1).mean(dim=1)
    return channels.mean(dim=1).tolist(), variance.sqrt().tolist()


def normalise_latents(latents: torch.Tensor, latents_mean: list[float], latents_std: list[float]) -> torch.Tensor:
    """
    Latents to zero mean and unit variance a channel; the pipeline undoes it before decoding.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): As the VAE encodes them.
        latents_mean (`list[float]`): From [`latent_statistics`].
        latents_std (`list[float]`): From [`latent_statistics`].

    Returns:
        `torch.Tensor`: same shape.
    """
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (latents_mean, latents_std))
    return (latents - mean) / std
