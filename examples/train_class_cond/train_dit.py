#!/usr/bin/env python
"""Trains a class-conditional DiT on the latents of an image dataset, and writes a pipeline folder.

    accelerate launch examples/train_class_cond/train_dit.py --dataset_name outputs/emoji64 \
        --vae outputs/autoencoder/vae --transformer_config examples/train_class_cond/emoji64.json \
        --output_dir outputs/dit

`dit-hf train` and `accelerate launch --module dit_hf.commands.train` take the same flags. Expected: 0.62 s per step of
64 samples on 2 cores. Re-run the same command to resume.
"""

from dit_hf.command_line import run
from dit_hf.commands.train import main


if __name__ == "__main__":
    run(main)
