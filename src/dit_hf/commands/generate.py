"""Generates a grid of images, each with the name of its class below.

    dit-hf generate --output outputs/demo.png

Expected: 60 images of the bundled emoji64 model in under a minute on 2 cores.
"""

import time
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from ..command_line import ArgumentParser, integer, run
from ..data.pixels import MAX_PIXELS
from ..evaluation.grid import COLUMNS, grid_size, labelled_grid
from ..files import check_writable, reading, writing
from ..pipeline import DiTClassCondPipeline
from ..pipeline_dit_class_cond import ClassNames
from ..seeds import drawn_classes, seeded_generator
from .sample import add_call_flags, add_seed_flag, call_settings


# Classes of a grid for which none are named.
MAX_DRAWN = 60


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--pipeline",
        default="emoji64",
        help="Pipeline: folder, Hub id or bundled name.",
    )
    parser.add_argument(
        "--class_labels",
        nargs="+",
        help="Names as in `pipe(name)`, one value each, quoted if they hold spaces or commas. A number is the class "
        "of that name if there is one, else the class id. If not given, at most 60, chosen by the seed.",
    )
    parser.add_argument(
        "--num_images_per_label", type=integer(at_least=1, at_most=1000), default=1, help="Images of each class."
    )
    add_call_flags(parser)
    add_seed_flag(parser, "Chooses the classes if none are named; the noise of image i depends on (seed, i) alone.")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="File of the grid.")
    args = parser.parse_args()
    if args.output.suffix.lower() not in Image.registered_extensions() or args.output.is_dir():
        parser.error(f"--output is {args.output}; it must name an image file such as grid.png")
    check_writable(args.output)
    check_format(args.output, 1, 1)
    return args


def check_format(path, width, height):
    """Refuses a format that is read only, or has no images of this size or kind, before they are generated."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"The grid would have {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} in all are written."
        )
    format_name = Image.registered_extensions()[path.suffix.lower()]
    with reading(path, f"a {format_name} to be written"):
        Image.new("RGB", (width, height)).save(BytesIO(), format_name)


def class_labels(values: list[str], id2label: dict[int, str]) -> list[int | str]:
    """Values of `--class_labels` for the pipeline: a whole number that is no class's name is an id."""
    names = ClassNames(id2label)
    return [int(value) if value.isdecimal() and names.find(value) is None else value for value in values]


def main():
    args = parse_args()
    pipe = DiTClassCondPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    drawn = drawn_classes(pipe.transformer.config.num_classes, MAX_DRAWN, args.seed)
    given = class_labels(args.class_labels, pipe.id2label) if args.class_labels else drawn
    labels = [label for label in pipe.resolve_class_labels(given) for _ in range(args.num_images_per_label)]
    columns = COLUMNS if args.num_images_per_label == 1 else args.num_images_per_label
    settings = call_settings(pipe, args)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    check_format(args.output, *grid_size(len(labels), columns, side, side))
    started = time.time()
    generators = [seeded_generator(args.seed, index) for index in range(len(labels))]
    images = pipe(labels, generator=generators, **settings).images
    seconds = time.time() - started

    names = [pipe.id2label.get(label, str(label)) for label in labels]
    with writing(args.output) as partial:
        labelled_grid(images, names, columns).save(partial)
    print(f"{len(images)} images in {seconds:.1f} s: {args.output}")


if __name__ == "__main__":
    run(main)
