#!/usr/bin/env python
"""Converts an original DiT checkpoint (released format or `train.py`'s) into a pipeline folder.

    python conversion/convert_original_to_hf.py --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256 \
        --vae stabilityai/sd-vae-ft-mse --id2label imagenet.json

Expected: the time it takes to read and write the weights. Every dimension is read off the weights.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.command_line import run


def read_id2label(path):
    """A JSON object of id -> name, or a list of names."""
    try:
        names = json.loads(path.read_text())
        entries = enumerate(names) if isinstance(names, list) else names.items()
        return {int(key): str(name) for key, name in entries}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--id2label {path} must hold a JSON list of names or an object of id to name: {error}"
        ) from None


def build_pipeline(args):
    """The converted model with the paper's sampler, and a VAE if one is given."""
    id2label = read_id2label(args.id2label) if args.id2label else None
    transformer = DiTTransformer2DModel.from_single_file(
        args.checkpoint_path, num_attention_heads=args.num_attention_heads, weights=args.weights
    )
    num_classes = transformer.config.num_classes
    if id2label and set(id2label) != set(range(num_classes)):
        raise ValueError(
            f"--id2label {args.id2label} names {len(id2label)} classes; the model has 0 to {num_classes - 1}."
        )
    variance = {} if transformer.config.learn_sigma else {"variance_type": "fixed_large"}
    vae = AutoencoderKL.from_pretrained(args.vae) if args.vae else None
    return DiTClassCondPipeline(transformer, make_scheduler("ddpm", **variance), vae, id2label)


def save_whole(pipe, output_dir):
    """Writes to the side and renames, so that the folder is complete or absent."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=output_dir.parent))
    partial.chmod(0o755)
    try:
        pipe.save_pretrained(partial)
        os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="A .pt or .safetensors file.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the pipeline.")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="Of a training checkpoint.")
    parser.add_argument("--num_attention_heads", type=int, help="If the width is none of the paper's.")
    parser.add_argument("--vae", help="Folder or Hub id of an AutoencoderKL to put into the pipeline.")
    parser.add_argument("--id2label", type=Path, help="JSON list of class names, or object of id to name.")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.output_dir.is_file() or (args.output_dir.is_dir() and any(args.output_dir.iterdir())):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose a new folder.")
    pipe = build_pipeline(args)
    save_whole(pipe, args.output_dir)
    config = pipe.transformer.config
    print(
        f"{config.num_layers} blocks of width {config.num_attention_heads * config.attention_head_dim}, "
        f"patch {config.patch_size}, {config.num_classes} classes, {pipe.transformer.num_parameters() / 1e6:.2f} M parameters"
    )
    if pipe.vae is None and config.in_channels != 3:
        print("There is no VAE in it, so it draws latents (`output_type='latent'`); pass --vae for images.")
    print(f"Pipeline: {args.output_dir}")


if __name__ == "__main__":
    run(main)
