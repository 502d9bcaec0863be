"""Generates a labelled grid of images, one row a class.

    dit-hf generate --output outputs/demo.png

Expected: under a minute on 2 cores for the bundled emoji64 model.
"""

import time
from pathlib import Path

import torch
from PIL import Image

from ..command_line import ArgumentParser, run
from ..evaluation.grid import labelled_grid
from ..pipeline import DiTClassCondPipeline
from ..pipeline_dit_class_cond import ClassNames
from ..seeds import seeded_generator
from .sample import add_call_flags, call_settings


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
        "of that name if there is one, else the class id. All classes (at most 12) if not given.",
    )
    parser.add_argument("--num_images_per_label", type=int, default=10, help="Columns of the grid.")
    add_call_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="Image i of the grid depends on (seed, i) alone.")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="File of the grid.")
    args = parser.parse_args()
    if args.num_images_per_label < 1:
        parser.error(f"--num_images_per_label is {args.num_images_per_label}; it must be at least 1")
    if args.output.suffix.lower() not in Image.registered_extensions() or args.output.is_dir():
        parser.error(f"--output is {args.output}; it must name an image file such as grid.png")
    return args


def class_labels(values: list[str], id2label: dict[int, str]) -> list[int | str]:
    """Values of `--class_labels` for the pipeline: a whole number that is no class's name is an id."""
    names = ClassNames(id2label)
    return [int(value) if value.isdecimal() and names.find(value) is None else value for value in values]


def main():
    args = parse_args()
    pipe = DiTClassCondPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    all_classes = range(min(12, pipe.transformer.config.num_classes))
    given = class_labels(args.class_labels, pipe.id2label) if args.class_labels else list(all_classes)
    labels = pipe.resolve_class_labels(given)
    columns = args.num_images_per_label
    started = time.time()
    images = pipe(
        labels,
        num_images_per_label=columns,
        generator=[seeded_generator(args.seed, index) for index in range(len(labels) * columns)],
        **call_settings(pipe, args),
    ).images
    seconds = time.time() - started

    rows = [images[index * columns : (index + 1) * columns] for index in range(len(labels))]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(rows, [pipe.id2label.get(label, str(label)) for label in labels]).save(args.output)
    print(f"{len(images)} images in {seconds:.1f} s: {args.output}")


if __name__ == "__main__":
    run(main)
