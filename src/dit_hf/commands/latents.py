"""Encodes a dataset's images once, with any number of processes, for `train --latents_dir`."""

import argparse
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from ..command_line import ArgumentParser, integer, real, run
from ..data.latents import verify_latents
from ..data.shards import INDEX, MAX_SHARD_SIZE, shard_facts
from ..files import check_apart, check_writable, writing_folder
from ..pipeline_dit_class_cond import is_rae
from ..training.alignment import load_encoder
from ..training.data import ImageData, latent_size, write_latents
from ..training.model import image_resolution, load_vae
from ..training.running import lock_folder, start_accelerator


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the data and the VAE, the same for `latents` and `train`."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id or local dataset for `datasets.load_dataset`.")
    data.add_argument("--train_data_dir", type=Path, help="Folder of class folders, WebDataset or Parquet shards.")
    data.add_argument("--streaming", action="store_true", help="Stream the images and store no copy.")
    data.add_argument("--split", default="train", help="Split to train on.")
    data.add_argument(
        "--holdout",
        type=real(at_least=0, below=1),
        default=0.0,
        help="Fraction of the images to hold out as `test`, for data with one split.",
    )
    data.add_argument("--image_column", default="image", help="Column with images.")
    data.add_argument("--label_column", default="label", help="Column with class ids or names.")
    data.add_argument(
        "--resolution",
        type=integer(8, 8192),
        help="Pixels per side; by default those of given latents or weights, otherwise 64.",
    )
    data.add_argument(
        "--vae", help="Folder or Hub id of an autoencoder; by default the pretrained pipeline's. A JiT needs none."
    )
    data.add_argument(
        "--shard_size",
        type=integer(1, MAX_SHARD_SIZE),
        default=2048,
        help="Images per file of the cache of latents.",
    )
    data.add_argument(
        "--alignment_encoder",
        default="efficientnet-lite0",
        help="Frozen encoder of the alignment's features: efficientnet-lite0, or a vision model of transformers.",
    )


def image_data(args: argparse.Namespace) -> ImageData:
    """The dataset that the flags name; the output must not lie in it."""
    data = ImageData(**{entry.name: getattr(args, entry.name) for entry in fields(ImageData)})
    check_apart(args.output_dir, data.source, "--output_dir")
    return data


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Folder for the cache and for the VAE with its statistics."
    )
    parser.add_argument("--features", action="store_true", help="Cache the alignment encoder's features as well.")
    args = parser.parse_args()
    if args.vae is None:
        parser.error("--vae is missing: a folder or Hub id of the autoencoder")
    return args


def check_output(folder: Path, source: str | Path | None) -> None:
    """Refuses an output folder that can't be written, or holds an autoencoder which this command did not write."""
    check_writable(folder)
    check_apart(folder, source, "--output_dir")
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is neither a folder nor a link to one; choose another path.")
    ours = (folder / INDEX).exists() or any(map(shard_facts, folder.glob("shard-*.safetensors")))
    if (folder / "vae").exists() and not ours:
        raise ValueError(f"{folder / 'vae'} was not written by this command; choose another --output_dir.")


def main() -> None:
    """Encodes as the command line says, verifies what was written, and saves the VAE with its statistics beside it."""
    args = parse_args()
    check_output(args.output_dir, args.dataset_name or args.train_data_dir)
    accelerator = start_accelerator()
    vae = load_vae(args.vae).to(accelerator.device)
    args.resolution = image_resolution(args.resolution, vae)
    latent_size(vae, args.resolution)  # as training will ask
    data = image_data(args)
    reader = data.reader()
    accelerator.print(reader.describe())
    encoder = load_encoder(args.alignment_encoder).to(accelerator.device) if args.features else None
    with lock_folder(args.output_dir) if accelerator.is_main_process else nullcontext():
        write_latents(accelerator, vae, data, reader, args.output_dir, encoder, args.shard_size)
        if accelerator.is_main_process:
            index = verify_latents(args.output_dir)
            statistics = {name: index[name] for name in ("latents_mean", "latents_std")}
            if not is_rae(vae):  # which normalises its latents itself
                vae.register_to_config(**statistics, scaling_factor=1.0, shift_factor=None)
            with writing_folder(args.output_dir / "vae") as partial:  # from which it may have been read
                vae.save_pretrained(partial)
            print(f"{index['count']} images, {len(index['shards'])} shards, verified: {args.output_dir}")


if __name__ == "__main__":
    run(main)
