"""Converts a checkpoint of an original code base into a pipeline folder, and verifies it; autoencoders as well.

    dit-hf convert --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256 --vae stabilityai/sd-vae-ft-mse \
        --id2label imagenet.json

Expected: the time to read and write the weights, and three forward passes. Every dimension is read off the
weights. An original autoencoder becomes the folder of an `AutoencoderKL` or `AutoencoderRAE`.
"""

import filecmp
import os
import re
from pathlib import Path

from safetensors.torch import save_file

from ..checkpoints.autoencoders import Autoencoder, build_autoencoder, parse_autoencoder
from ..checkpoints.latents_stats import read_latents_stats
from ..checkpoints.links import download, is_link
from ..checkpoints.loading import build_model
from ..checkpoints.parsing import parse_checkpoint
from ..checkpoints.saving import TRAINING_ONLY_FILE
from ..checkpoints.sizes import IMAGENET_CLASSES
from ..command_line import ArgumentParser, real, run
from ..conversion import build_original_vae, build_pipeline, check_vae, is_original_vae, load_transformer
from ..files import NO_CONTENT, check_writable, first_line, is_occupied, read_json, writing_folder
from ..hub import CardFacts, publish_folder, write_card
from ..models import MODELS
from ..pipeline_dit_class_cond import check_guide
from ..transformer_dit import SIZES
from .verify import DTYPES, add_checkpoint_arguments, autoencoder_hints, read, verify, verify_autoencoder


def read_id2label(path):
    """A JSON object of id -> name, or a list of names."""
    names = read_json(path, (dict, list))
    pairs = list(enumerate(names) if isinstance(names, list) else names.items())
    if len(pairs) > SIZES["num_classes"][1]:
        raise ValueError(f"{path} has {len(pairs):,} names; at most {SIZES['num_classes'][1]:,} are read.")
    id2label = {}
    for key, name in pairs:
        if not isinstance(name, str):
            raise ValueError(f"{path}: the name of class {key} is {name!r:.80}; write it in quotes.")
        if not re.fullmatch(r"[0-9]{1,9}", str(key)):
            raise ValueError(f"{path}: {key!r:.80} is not a class id; ids are whole numbers from 0.")
        if int(key) in id2label:
            raise ValueError(f"{path} names class {int(key)} twice.")
        id2label[int(key)] = name
    return id2label


def check_names(id2label, num_classes):
    """That there is one name per class."""
    if id2label is not None and set(id2label) != set(range(num_classes)):
        raise ValueError(
            f"--id2label names {len(id2label)} classes; the model has {num_classes}, 0 to {num_classes - 1}."
        )


def card_facts(checkpoint, args):
    """Licence and limits. A code base's own weights have ImageNet's classes."""
    is_published = checkpoint.config["num_classes"] == IMAGENET_CLASSES
    limits = "Converted, not retrained: the limits are those of the original weights."
    if not args.skip_verification:
        limits += " The conversion was verified against an independent forward pass."
    published_license = checkpoint.family.published_license if is_published else None
    return CardFacts(license=args.license or published_license, limits=limits)


def read_guide(checkpoint, args):
    """The model of --guide, and its checkpoint if it is no converted one."""
    if args.guide is None:
        return None, None
    try:
        if Path(args.guide).is_dir():
            guide, source = load_transformer(args.guide, DTYPES[args.dtype])[0], None
        else:
            path = download(args.guide) if is_link(args.guide) else args.guide
            source = parse_checkpoint(path, family=args.family, weights=args.weights)
            guide = build_model(MODELS[source.family.model], source, path, DTYPES[args.dtype])
            if source.family.predictions != checkpoint.family.predictions:
                raise ValueError(
                    f"it is read as {source.family.name}, whose output differs from the model's; pass a guide of the "
                    "same kind."
                )
        check_guide(guide.config, checkpoint.config)
    except ValueError as error:
        hint = (
            ""
            if Path(args.guide).is_dir()
            else " Flags are the model's; a guide that needs its own is converted first."
        )
        raise ValueError(f"--guide: {error}{hint}") from None
    return guide, source


def save_whole(pipe, checkpoints, args):
    """
    Writes to the side, verifies and renames, so that the folder is complete, right, or absent. The checkpoints are
    those of the components, by name.
    """
    checkpoint = checkpoints["transformer"]
    output_dir = Path(os.path.realpath(args.output_dir))
    occupied = is_occupied(output_dir)
    with writing_folder(output_dir) as partial:
        pipe.save_pretrained(partial)
        write_card(pipe, partial, output_dir.name, card_facts(checkpoint, args))
        for name, source in checkpoints.items():
            if source.training_only:
                save_file(source.training_only, partial / name / TRAINING_ONLY_FILE)
            pipe.components[name].to("meta")  # its weights are on the disk now
        try:
            for name, source in () if args.skip_verification else checkpoints.items():
                verify(source, partial / name, args.dtype, label=output_dir / name if name == "guide" else output_dir)
            if occupied:
                check_same(partial, output_dir)
                (partial / "README.md").unlink()  # the one that is there may have been edited
        except OSError as error:  # of reading, which is no reason that it can't be written
            raise ValueError(f"{output_dir} can't be verified: {first_line(error)}") from error


def files_in(folder):
    """Names of all files in a folder that are its content."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name for name in names if not any(map(NO_CONTENT.fullmatch, name.parts))}


def check_same(new, old):
    """That a folder holds what was just converted; their cards may differ."""
    files = [files_in(folder) for folder in (new, old)]
    same = filecmp.cmpfiles(new, old, files[0] & files[1], shallow=False)[0]
    differing = {str(file) for file in files[0] | files[1]} - {str(file) for file in same} - {"README.md"}
    if differing:
        raise ValueError(
            f"--output_dir {old} is not empty, and its {min(differing)} is not what this command writes; choose a new "
            "folder."
        )


def read_statistics(autoencoder, args):
    """The statistics of an original autoencoder's latents, which its file lacks."""
    name, forms = args.vae or args.checkpoint_path, autoencoder.family.stats_forms
    if args.latent_multiplier != 1 and "vavae" not in forms:
        raise ValueError(f"--latent_multiplier is LightningDiT's, and {name} is {autoencoder.family.name}'s; omit it.")
    if args.latents_stats is None:
        raise ValueError(
            f"{name} is an original autoencoder, whose file has no statistics of its latents; pass --latents_stats "
            "FILE, the one published with it (for a Stable Diffusion VAE pass --vae with its diffusers folder or Hub "
            "id instead)."
        )
    try:
        return read_latents_stats(args.latents_stats, args.latent_multiplier, forms)
    except ValueError as error:
        raise ValueError(f"--latents_stats: {error}") from None


def find_vae(checkpoint, args):
    """The autoencoder for a model's latents, checked: a name that is loaded later, or an original one, loaded."""
    if args.latent_multiplier != 1 and not args.latents_stats:
        raise ValueError("--latent_multiplier goes with --latents_stats; pass both, or omit it.")
    if args.vae and is_original_vae(args.vae):
        path = download(args.vae) if is_link(args.vae) else args.vae
        autoencoder = parse_autoencoder(path, autoencoder_hints(args))
        own = None if args.latents_stats else checkpoint.latents_statistics
        statistics = own or read_statistics(autoencoder, args)
        return build_original_vae(autoencoder, args.vae, checkpoint.config, statistics, args.encoder)
    if args.vae:
        check_vae(args.vae, checkpoint.config)
    for flag in ("latents_stats", "encoder", "decoder_num_attention_heads"):
        if getattr(args, flag):
            raise ValueError(f"--{flag} is for an original autoencoder; pass its file as --vae, or omit the flag.")
    return args.vae


def convert_autoencoder(autoencoder, args):
    """Writes the folder of a model of diffusers, whole, verified, or not at all."""
    for flag in ("vae", "id2label", "guide", "shift", "license", "push_to_hub"):
        if getattr(args, flag):
            raise ValueError(f"--{flag} is for pipelines, and {args.checkpoint_path} is an autoencoder; omit it.")
    statistics, dtype = read_statistics(autoencoder, args), DTYPES[args.dtype]
    vae = build_autoencoder(autoencoder, args.checkpoint_path, statistics, dtype, args.encoder)
    if args.dry_run:
        return
    with writing_folder(args.output_dir) as partial:
        vae.save_pretrained(partial)
        vae.to("meta")  # its weights are on the disk now
        if not args.skip_verification:
            try:
                verify_autoencoder(autoencoder, partial, args.dtype, label=args.output_dir)
            except OSError as error:  # of reading, which is no reason that it can't be written
                raise ValueError(f"{args.output_dir} can't be verified: {first_line(error)}") from error
    print(f"Autoencoder: {args.output_dir}")


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_checkpoint_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the pipeline.")
    parser.add_argument("--vae", help="Autoencoder of the pipeline: folder, Hub id or original file.")
    parser.add_argument(
        "--latents_stats",
        type=Path,
        help="Statistics of an original autoencoder's latents (latents_stats.pt, stat.pt).",
    )
    parser.add_argument("--encoder", help="Folder or Hub id of the encoder of an original RAE, whose file has none.")
    parser.add_argument(
        "--latent_multiplier",
        type=real(above=0),
        default=1.0,
        help="Factor on normalised latents in LightningDiT's configuration.",
    )
    parser.add_argument(
        "--guide",
        help="A weaker model for autoguidance: another checkpoint of the same latents and classes, or the folder of a "
        "converted one.",
    )
    parser.add_argument("--id2label", type=Path, help="JSON list of class names, or object of id to name.")
    parser.add_argument(
        "--shift",
        type=real(above=0),
        help="Shift of a flow-matching scheduler; by default RAE's follows from the latents.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Print what the file holds and write nothing.")
    parser.add_argument(
        "--skip_verification", action="store_true", help="Do not compare the written folder with the file."
    )
    parser.add_argument(
        "--license",
        help="Licence on the model card, the Hub's identifier; by default cc-by-nc-4.0 for 1000-class DiT weights.",
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Publish the folder as well.")
    parser.add_argument("--hub_model_id", help="Repository of --push_to_hub; by default the name of the folder.")
    return parser.parse_args()


def main():
    args = parse_args()
    if not args.dry_run:
        check_writable(args.output_dir)
    # With --push_to_hub it may be what a run wrote whose upload failed.
    if is_occupied(args.output_dir) and not (args.output_dir.is_dir() and args.push_to_hub):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose a new folder.")
    try:
        id2label = read_id2label(args.id2label) if args.id2label else None
    except ValueError as error:
        raise ValueError(f"--id2label: {error}") from None
    checkpoint = read(args)
    print(checkpoint.describe())
    if isinstance(checkpoint, Autoencoder):
        convert_autoencoder(checkpoint, args)
        return
    if checkpoint.family.reading_note:
        print(f"Note: {checkpoint.family.reading_note}.")
    if checkpoint.training_only:
        print(f"{len(checkpoint.training_only)} training-only weights go to transformer/{TRAINING_ONLY_FILE}.")
    in_channels = checkpoint.config["in_channels"]
    vae = find_vae(checkpoint, args)
    if not vae and in_channels != 3:
        print("The pipeline has no VAE, so it generates latents (`output_type='latent'`); pass --vae for images.")
    check_names(id2label, checkpoint.config["num_classes"])
    guide, guide_checkpoint = read_guide(checkpoint, args)
    if args.dry_run:
        return
    pipe = build_pipeline(checkpoint, args.checkpoint_path, DTYPES[args.dtype], vae, id2label, args.shift, guide)
    sources = {"transformer": checkpoint} | ({} if guide_checkpoint is None else {"guide": guide_checkpoint})
    save_whole(pipe, sources, args)
    print(f"Pipeline: {args.output_dir}")
    if args.push_to_hub:
        repo_id = args.hub_model_id or args.output_dir.resolve().name
        print(f"Published: {publish_folder(args.output_dir, repo_id, pipe, card_facts(checkpoint, args))}")


if __name__ == "__main__":
    run(main)
