#!/usr/bin/env python
"""Measures whether a converted pipeline computes what the checkpoint it came from computes, and converts back to it.

    python conversion/verify_parity.py --checkpoint_path DiT-XL-2-256x256.pt --model_path dit-xl-2-256

Expected: two forward passes each way of two samples; exit code 2 if a difference is more than rounding.
"""

import argparse
from pathlib import Path

import torch

from dit_hf import DiTTransformer2DModel
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.loading import understand
from dit_hf.checkpoints.parity import measure_parity
from dit_hf.checkpoints.saving import ASIDE_FILE
from dit_hf.command_line import run


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_checkpoint_arguments(parser):
    """What tells how a checkpoint is to be read."""
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="A .pt or .safetensors file.")
    parser.add_argument("--family", choices=("auto", *FAMILIES), default="auto", help="Code base it comes from.")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="Of a training checkpoint.")
    parser.add_argument("--num_attention_heads", type=int, help="If the width is none of the published ones.")
    parser.add_argument(
        "--embedders_of_block", type=int, help="Which copy to take where a diffusers DiT's were trained apart."
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="Of the converted weights.")


def read(args):
    """The checkpoint of these arguments."""
    return understand(
        args.checkpoint_path, args.num_attention_heads, args.family, args.weights, args.embedders_of_block
    )


def verify(checkpoint, model_path, dtype, name=None):
    """Reloads what was written and compares; prints the figures, and raises if they are more than rounding."""
    model = DiTTransformer2DModel.from_pretrained(model_path, subfolder="transformer", dtype=DTYPES[dtype])
    parity = measure_parity(checkpoint, model, Path(model_path) / "transformer" / ASIDE_FILE)
    print(f"Parity: {parity}")
    if not parity.holds:
        raise ValueError(f"{name or model_path} does not compute what its checkpoint computes: {parity}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--model_path", type=Path, required=True, help="The converted pipeline's folder.")
    return parser.parse_args()


def main():
    args = parse_args()
    if not (args.model_path / "transformer").is_dir():
        raise ValueError(f"--model_path {args.model_path} has no folder `transformer`.")
    verify(read(args), args.model_path, args.dtype)


if __name__ == "__main__":
    run(main)
