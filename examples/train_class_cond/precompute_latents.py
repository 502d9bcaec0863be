#!/usr/bin/env python
"""Encodes a dataset's images once, with any number of processes, for `train_dit.py --latents_dir`.

    accelerate launch examples/train_class_cond/precompute_latents.py --dataset_name outputs/emoji64 \
        --vae outputs/autoencoder/vae --output_dir outputs/latents

Expected: 330 images a second on 2 cores at 64 px, mirror images included. Run the same command again after a kill: what
is written is kept. At the end every shard is held against its count and checksum.
"""

import argparse
from pathlib import Path

from preparation import add_data_arguments, find_data, image_resolution, load_vae, make_cache

from dit_hf.command_line import run
from dit_hf.data.latents import verify_latents
from dit_hf.training.alignment import load_encoder
from dit_hf.training.running import only_run, start_accelerator


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="The cache, and the VAE with its statistics.")
    parser.add_argument("--features", action="store_true", help="Cache the alignment encoder's features as well.")
    parser.set_defaults(latents_dir=None, lora_rank=None, pretrained_model_name_or_path=None)
    args = parser.parse_args()
    if args.vae is None:
        parser.error("--vae says what encodes the images")
    return args


def main():
    args = parse_args()
    accelerator = start_accelerator()
    vae = load_vae(args, accelerator.device)
    args.resolution = image_resolution(args, vae)
    data = find_data(args)
    encoder = load_encoder(args.alignment_encoder).to(accelerator.device) if args.features else None
    if accelerator.is_main_process:
        with only_run(args.output_dir):
            precompute(args, accelerator, vae, data, encoder)
    else:
        precompute(args, accelerator, vae, data, encoder)


def precompute(args, accelerator, vae, data, encoder):
    """The cache, verified, and the VAE with its statistics beside it."""
    make_cache(args, accelerator, vae, data, encoder, args.output_dir)
    if accelerator.is_main_process:
        index = verify_latents(args.output_dir)
        statistics = {name: index[name] for name in ("latents_mean", "latents_std")}
        vae.register_to_config(**statistics, scaling_factor=1.0, shift_factor=None)
        vae.save_pretrained(args.output_dir / "vae")
        print(f"{index['count']} images, {len(index['shards'])} shards, verified: {args.output_dir}")


if __name__ == "__main__":
    run(main)
