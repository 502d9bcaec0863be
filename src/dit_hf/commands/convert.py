"""Converts a checkpoint of DiT, SiT, REPA, LightningDiT or stock diffusers into a pipeline folder, and verifies it.

    dit-hf convert --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256 --vae stabilityai/sd-vae-ft-mse \
        --id2label imagenet.json

Expected: the time it takes to read and write the weights, and six forward passes. Every dimension is read off the
weights.
"""

import filecmp
import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from ..checkpoints.parsing import IMAGENET_CLASSES
from ..checkpoints.saving import TRAINING_ONLY_FILE
from ..command_line import ArgumentParser, run
from ..conversion import build_pipeline, check_vae
from ..hub import CardFacts, publish_folder, write_card
from .verify import DTYPES, add_checkpoint_arguments, read, verify


def read_id2label(path):
    """A JSON object of id -> name, or a list of names."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        id2label = {int(key): name for key, name in (enumerate(names) if isinstance(names, list) else names.items())}
        if strange := [name for name in id2label.values() if not isinstance(name, str)]:
            raise ValueError(f"{strange[0]!r} is no name; write it in quotes.")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--id2label {path} must hold a JSON list of names or an object of id to name: {error}"
        ) from None
    return id2label


def check_names(args, num_classes):
    """The class names of `--id2label`, one per class, or None."""
    id2label = read_id2label(args.id2label) if args.id2label else None
    if id2label and set(id2label) != set(range(num_classes)):
        raise ValueError(
            f"--id2label {args.id2label} names {len(id2label)} classes; the model has 0 to {num_classes - 1}."
        )
    return id2label


def card_facts(checkpoint, args):
    """Licence and limits. A code base's own weights have ImageNet's classes."""
    is_published = checkpoint.config["num_classes"] == IMAGENET_CLASSES
    limits = "Converted, not retrained: the limits are those of the original weights."
    if not args.skip_verification:
        limits += " The conversion was verified against an independent forward pass."
    published_license = checkpoint.family.published_license if is_published else None
    return CardFacts(license=args.license or published_license, limits=limits)


def save_whole(pipe, checkpoint, args):
    """Writes to the side, verifies and renames, so that the folder is complete, right, or absent."""
    output_dir = args.output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=output_dir.parent))
    partial.chmod(0o755)
    try:
        pipe.save_pretrained(partial)
        write_card(pipe, partial, output_dir.name, card_facts(checkpoint, args))
        if checkpoint.training_only:
            save_file(checkpoint.training_only, partial / "transformer" / TRAINING_ONLY_FILE)
        pipe.transformer.to("meta")  # its weights are on the disk now
        if not args.skip_verification:
            verify(checkpoint, partial, args.dtype, label=output_dir)
        if is_occupied(output_dir):
            check_same(partial, output_dir)
        else:
            if output_dir.is_dir():
                output_dir.rmdir()  # empty; Windows replaces no folder
            os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_occupied(output_dir):
    """Whether there is something in the way of a new folder."""
    return output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir()))


def check_same(new, old):
    """That a folder holds what was just converted; its card may have been edited."""
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (new, old)]
    same = filecmp.cmpfiles(new, old, files[0] & files[1], shallow=False)[0]
    differing = {str(file) for file in files[0] | files[1]} - {str(file) for file in same} - {"README.md"}
    if differing:
        raise ValueError(
            f"--output_dir {old} is not empty, and its {min(differing)} is not what this command writes; choose a new "
            "folder."
        )


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_checkpoint_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the pipeline.")
    parser.add_argument("--vae", help="Folder or Hub id of an autoencoder to put into the pipeline.")
    parser.add_argument("--id2label", type=Path, help="JSON list of class names, or object of id to name.")
    parser.add_argument("--dry_run", action="store_true", help="Say what the file holds and write nothing.")
    parser.add_argument("--skip_verification", action="store_true", help="Do not compare what was written.")
    parser.add_argument("--license", help="The Hub's identifier; cc-by-nc-4.0 for what looks like Meta's weights.")
    parser.add_argument("--push_to_hub", action="store_true", help="Publish the folder as well.")
    parser.add_argument("--hub_model_id", help="Repository; the folder's name if not given.")
    return parser.parse_args()


def main():
    args = parse_args()
    # With --push_to_hub it may be what a run wrote whose upload failed.
    if is_occupied(args.output_dir) and (args.output_dir.is_file() or not args.push_to_hub):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose a new folder.")
    checkpoint = read(args)
    print(checkpoint.describe())
    if checkpoint.family.reading_note:
        print(f"Note: {checkpoint.family.reading_note}.")
    if checkpoint.training_only:
        print(f"{len(checkpoint.training_only)} training-only weights go to transformer/{TRAINING_ONLY_FILE}.")
    in_channels = checkpoint.config["in_channels"]
    if args.vae:
        check_vae(args.vae, in_channels)
    elif in_channels != 3:
        print("The pipeline has no VAE, so it generates latents (`output_type='latent'`); pass --vae for images.")
    id2label = check_names(args, checkpoint.config["num_classes"])
    if args.dry_run:
        return
    pipe = build_pipeline(checkpoint, args.checkpoint_path, DTYPES[args.dtype], args.vae, id2label)
    save_whole(pipe, checkpoint, args)
    print(f"Pipeline: {args.output_dir}")
    if args.push_to_hub:
        repo_id = args.hub_model_id or args.output_dir.resolve().name
        print(f"Published: {publish_folder(args.output_dir, repo_id, pipe, card_facts(checkpoint, args))}")


if __name__ == "__main__":
    run(main)
