#!/usr/bin/env python
"""Converts a checkpoint of DiT, SiT, REPA, LightningDiT or stock diffusers into a pipeline folder, and verifies it.

    python conversion/convert_original_to_hf.py --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256 \
        --vae stabilityai/sd-vae-ft-mse --id2label imagenet.json

Expected: the time it takes to read and write the weights, and six forward passes. Every dimension is read off the
weights.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL
from safetensors.torch import save_file
from verify_parity import DTYPES, add_checkpoint_arguments, read, verify

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.checkpoints.diffusers_dit import CORRECTED
from dit_hf.checkpoints.loading import build_model
from dit_hf.checkpoints.saving import ASIDE_FILE
from dit_hf.command_line import run
from dit_hf.hub import CardFacts, publish_folder, write_card


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


def check_names(args, num_classes):
    """The class names of `--id2label`, one a class, or None."""
    id2label = read_id2label(args.id2label) if args.id2label else None
    if id2label and set(id2label) != set(range(num_classes)):
        raise ValueError(
            f"--id2label {args.id2label} names {len(id2label)} classes; the model has 0 to {num_classes - 1}."
        )
    return id2label


def build_pipeline(args, checkpoint, id2label):
    """The converted model with its family's sampler, and a VAE if one is given."""
    transformer = build_model(DiTTransformer2DModel, checkpoint, args.checkpoint_path, DTYPES[args.dtype])
    if checkpoint.family.flow_matching:
        scheduler = make_scheduler("flow_euler")
    else:
        scheduler = make_scheduler(
            "ddpm", **({} if transformer.config.learn_sigma else {"variance_type": "fixed_large"})
        )
    vae = AutoencoderKL.from_pretrained(args.vae) if args.vae else None
    return DiTClassCondPipeline(transformer, scheduler, vae, id2label)


def card_facts(checkpoint, args):
    """Licence and origin; Meta's DiT weights have 1000 classes and come without training arguments."""
    meta = checkpoint.family.name in ("dit", "diffusers") and checkpoint.config["num_classes"] == 1000
    limits = "Converted, not retrained: the limits are those of the original weights."
    if not args.skip_verification:
        limits += " The conversion was verified against an independent forward pass."
    return CardFacts(license=args.license or ("cc-by-nc-4.0" if meta else None), limits=limits)


def save_whole(pipe, checkpoint, args):
    """Writes to the side, verifies and renames, so that the folder is complete, right, or absent."""
    output_dir = args.output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=output_dir.parent))
    partial.chmod(0o755)
    try:
        pipe.save_pretrained(partial)
        write_card(pipe, partial, output_dir.name, card_facts(checkpoint, args))
        if checkpoint.aside:
            save_file(checkpoint.aside, partial / "transformer" / ASIDE_FILE)
        pipe.transformer.to("meta")  # its weights are on the disk now
        if not args.skip_verification:
            verify(checkpoint, partial, args.dtype, name=output_dir)
        os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def describe(checkpoint):
    """One line on what the weights say."""
    config = checkpoint.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    parameters = sum(weight.numel() for weight in checkpoint.weights.values())
    options = [name for name in ("swiglu", "rms_norm", "sincos+rope") if name in config.values()]
    options += ["qk_norm"] * config["qk_norm"] + ["no shift"] * (not config["modulation_shift"])
    return (
        f"{checkpoint.family.name}: {config['num_layers']} blocks of width {width}, patch {config['patch_size']}, "
        f"{config['num_classes']} classes, {parameters / 1e6:.2f} M parameters" + "".join(f", {o}" for o in options)
    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the pipeline.")
    parser.add_argument("--vae", help="Folder or Hub id of an AutoencoderKL to put into the pipeline.")
    parser.add_argument("--id2label", type=Path, help="JSON list of class names, or object of id to name.")
    parser.add_argument("--dry_run", action="store_true", help="Say what the file holds and write nothing.")
    parser.add_argument("--skip_verification", action="store_true", help="Do not compare what was written.")
    parser.add_argument("--license", help="The Hub's identifier; cc-by-nc-4.0 for what looks like Meta's weights.")
    parser.add_argument("--push_to_hub", action="store_true", help="Publish the folder as well.")
    parser.add_argument("--hub_model_id", help="Repository; the folder's name if not given.")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.output_dir.is_file() or (args.output_dir.is_dir() and any(args.output_dir.iterdir())):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose a new folder.")
    checkpoint = read(args)
    print(describe(checkpoint))
    if checkpoint.family.name == "diffusers":
        print(f"Note: {CORRECTED}.")
    if checkpoint.aside:
        print(f"{len(checkpoint.aside)} weights that only training needs go to transformer/{ASIDE_FILE}.")
    id2label = check_names(args, checkpoint.config["num_classes"])
    pipe = build_pipeline(args, checkpoint, id2label)
    if pipe.vae is None and pipe.transformer.config.in_channels != 3:
        print("There is no VAE in it, so it draws latents (`output_type='latent'`); pass --vae for images.")
    if args.dry_run:
        return
    save_whole(pipe, checkpoint, args)
    print(f"Pipeline: {args.output_dir}")
    if args.push_to_hub:
        repo_id = args.hub_model_id or args.output_dir.resolve().name
        print(f"Published: {publish_folder(args.output_dir, repo_id, pipe, card_facts(checkpoint, args))}")


if __name__ == "__main__":
    run(main)
