#!/usr/bin/env python
"""Makes a training set of a new class and of generated images of a model's own classes (prior preservation).

    python examples/finetune/prepare_new_class.py --dataset_name outputs/coins --num_images 24 --class_name coins \
        --pretrained_model_name_or_path emoji64 --output_dir outputs/emoji64-coins

Expected: two minutes on 2 cores; Ctrl-C leaves nothing, and the next run removes what a kill leaves. The result has
one folder per class, which `--train_data_dir` of the training reads; the model's own classes keep their labels by
their names. The images of the new class are repeated until they are half of the set.
"""

from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dit_hf import DiTClassCondPipeline
from dit_hf.command_line import ArgumentParser, integer, run
from dit_hf.data.images import load_image_dataset, load_unlabelled_folder
from dit_hf.data.reader import ImageReader
from dit_hf.files import check_apart, check_folder, is_occupied, writing_folder
from dit_hf.pipeline_dit_class_cond import ClassNames
from dit_hf.seeds import seeded_generator
from dit_hf.training.config import GUIDANCE
from dit_hf.training.validation import check_sampling


# Images of the old classes in all, unless told otherwise, and those that are generated together.
PRIOR_IMAGES, BATCH = 1000, 64


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", help="Hub id or local dataset with images of the new class.")
    parser.add_argument("--train_data_dir", type=Path, help="Or a folder with such images.")
    parser.add_argument("--image_column", default="image", help="Column with images.")
    parser.add_argument("--num_images", type=integer(at_least=1), default=24, help="How many of them to take.")
    parser.add_argument("--class_name", required=True, help="Name of the new class.")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Folder, Hub id or bundled name.")
    parser.add_argument(
        "--prior_images_per_class",
        type=integer(at_least=1),
        help="Images generated per old class; if not given, about a thousand in all, but one of each at least.",
    )
    own = "if not given, as the pipeline recommends."
    scale = f"Guidance scale of the generated images, 1 for a few-step model; {own}"
    parser.add_argument("--guidance_scale", type=GUIDANCE, help=scale)
    parser.add_argument("--num_inference_steps", type=integer(1, 1000), help=f"Their sampler steps; {own}")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="Their seed.")
    parser.add_argument("--output_dir", type=Path, required=True, help="A new or empty folder.")
    return parser.parse_args()


def main():
    args = parse_args()
    check_output(args)
    check_names([args.class_name])
    dataset = new_class_dataset(args)
    pipe = DiTClassCondPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    if not pipe.id2label:
        raise ValueError(f"{args.pretrained_model_name_or_path} names no classes; save it with `id2label`.")
    if ClassNames(pipe.id2label).find(args.class_name) is not None:  # among the synonyms, and in any case, too
        raise ValueError(f"The model has a class {args.class_name!r} already; choose another --class_name.")
    names = [args.class_name, *pipe.id2label.values()]
    check_names(names)
    check_sampling(pipe, guidance_scale=args.guidance_scale, num_inference_steps=args.num_inference_steps)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    resolution = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    images = new_images(args, dataset, resolution)
    each = args.prior_images_per_class or max(1, PRIOR_IMAGES // len(pipe.id2label))
    total = max(len(images), each * len(pipe.id2label))
    with writing_folder(args.output_dir) as folder:
        (folder / names[0]).mkdir(parents=True)
        for index, image in enumerate(islice(cycle(images), total)):
            image.save(folder / names[0] / f"{index:04d}.png")
        generate_prior(pipe, args, each, folder)
    print(f"{len(names)} classes: {args.output_dir}")


def generate_prior(pipe, args, each, folder):
    """As many images of each of the model's own classes, one folder per class."""
    wanted = [(label, index) for label in pipe.id2label for index in range(each)]
    for start in tqdm(range(0, len(wanted), BATCH), desc="prior"):
        part = wanted[start : start + BATCH]
        images = pipe(
            [label for label, _ in part],
            generator=[seeded_generator(args.seed, label, index) for label, index in part],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
        ).images
        for (label, index), image in zip(part, images, strict=True):
            (folder / pipe.id2label[label]).mkdir(exist_ok=True)
            image.save(folder / pipe.id2label[label] / f"{index:04d}.png")


def check_names(names):
    """Checks that every class can have a folder of its name."""
    folded = [name.strip().casefold() for name in names]
    for name in names:
        usable = name.isprintable() and "/" not in name and len(name.encode(errors="replace")) < 256
        if not usable or not name.strip() or name.startswith("."):
            raise ValueError(f"The class {name!r} can't be a folder's name; train on a dataset with labels instead.")
        if folded.count(name.strip().casefold()) > 1:
            raise ValueError(f"There are two classes {name!r}; choose another --class_name, or rename the model's.")


def check_output(args):
    """Checks that the output is a new or empty folder outside of the data."""
    if is_occupied(check_folder(args.output_dir, "--output_dir")):
        raise ValueError(f"{args.output_dir} exists and is not empty; choose another folder.")
    check_apart(args.output_dir, args.train_data_dir or args.dataset_name, "--output_dir")


def new_class_dataset(args):
    """The images of the new class, whatever their labels."""
    if args.train_data_dir is not None and args.dataset_name is None:
        return load_unlabelled_folder(args.train_data_dir)
    return load_image_dataset(args.dataset_name, train_data_dir=args.train_data_dir)


def new_images(args, dataset, resolution):
    """`--num_images` of them, evenly spaced."""
    count = min(args.num_images, len(dataset))
    chosen = dataset.select(torch.linspace(0, len(dataset) - 1, count).long().tolist())
    reader = ImageReader(chosen, resolution=resolution, image_column=args.image_column)
    images, _ = reader.stack()
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


if __name__ == "__main__":
    run(main)
