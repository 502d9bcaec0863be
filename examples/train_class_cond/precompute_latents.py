#!/usr/bin/env python
"""Encodes a dataset's images once, with any number of processes, for `train_dit.py --latents_dir`.

    accelerate launch examples/train_class_cond/precompute_latents.py --dataset_name outputs/emoji64 \
        --vae outputs/autoencoder/vae --output_dir outputs/latents

`dit-hf latents` and `accelerate launch --module dit_hf.commands.latents` take the same flags. Expected: 330 images per
second on 2 cores at 64 pixels, mirrored images included. Re-run the same command after a kill.
"""

from dit_hf.command_line import run
from dit_hf.commands.latents import main


if __name__ == "__main__":
    run(main)
