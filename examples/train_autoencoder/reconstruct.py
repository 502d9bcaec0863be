#!/usr/bin/env python
"""Encodes and decodes the held-out images of a dataset: PSNR, and an `.npz` for the metrics of the reconstructions.

    python examples/train_autoencoder/reconstruct.py --dataset_name outputs/emoji64 --vae outputs/autoencoder/vae \
        --output outputs/reconstructions.npz
    python examples/evaluate/compute_metrics.py --samples outputs/reconstructions.npz --reference outputs/emoji64

Expected: a minute on 2 cores. The Fréchet distance of the reconstructions estimates the best that a model of these
latents reaches.
"""

from pathlib import Path

import numpy as np
import torch

from dit_hf.command_line import ArgumentParser, integer, run
from dit_hf.data.autoencoders import encode_posterior, load_autoencoder
from dit_hf.data.images import load_image_dataset
from dit_hf.data.pixels import normalize_pixels
from dit_hf.data.reader import ImageReader
from dit_hf.files import check_writable, writing
from dit_hf.pipeline_dit_class_cond import is_rae


BATCH = 64


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder.")
    parser.add_argument("--split", default="test", help="Split of images that the autoencoder was not trained on.")
    parser.add_argument("--vae", default="emoji64", help="Folder, Hub id, or bundled name.")
    parser.add_argument("--resolution", type=integer(at_least=8), default=64, help="Pixels per side.")
    parser.add_argument("--output", type=Path, required=True, help="The .npz of the reconstructions.")
    args = parser.parse_args()
    check_writable(args.output)
    return args


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(B, 3, H, W)` uint8 -> theirs after the autoencoder, uint8, and the PSNR of each in dB."""
    pixels = normalize_pixels(images)
    mean, _ = encode_posterior(vae, pixels)
    made = vae.decode(mean).sample.clamp(-1, 1)
    error = ((made - pixels) / 2).square().mean(dim=(1, 2, 3))
    return ((made + 1) * 127.5).round().byte(), -10 * error.log10()


def main():
    args = parse_args()
    vae = load_autoencoder(args.vae)
    if is_rae(vae):
        raise ValueError(f"--vae {args.vae} is an AutoencoderRAE, whose scales of pixels are others; pass a KL one.")
    images, _ = ImageReader(load_image_dataset(args.dataset_name, args.split), resolution=args.resolution).stack()
    parts = [reconstruct(vae, part) for part in images.split(BATCH)]
    made, psnr = (torch.cat(part) for part in zip(*parts, strict=True))
    with writing(args.output) as partial, open(partial, "wb") as file:
        np.savez(file, arr_0=made.permute(0, 2, 3, 1).numpy())
    print(f"PSNR of {len(images)} images: {psnr.mean().item():.2f} dB; reconstructions: {args.output}")


if __name__ == "__main__":
    run(main)
