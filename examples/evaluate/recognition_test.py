#!/usr/bin/env python
"""A blind test of a pipeline: can a person tell what its images show?

    python examples/evaluate/recognition_test.py --dataset_name outputs/emoji64 --output_dir outputs/recognition
    python examples/evaluate/recognition_test.py --output_dir outputs/recognition --answers outputs/answers.txt

Expected: a minute on 2 cores for the bundled model. The first command chooses classes by the seed and generates one
image of each. It writes `images-1.png` … with numbered images, `questions.txt` with eight class names for each number,
and the right ones to `key.json`. The names are of one group (the column `group` of the dataset), so that a guess is
right one time in eight. The second command compares answers, a line `NUMBER NAME` each, with the key.
"""

import json
import random
import re
from pathlib import Path

import torch
from datasets import ClassLabel
from PIL import Image

from dit_hf import DiTClassCondPipeline
from dit_hf.command_line import ArgumentParser, integer, run
from dit_hf.commands.sample import add_call_flags, add_seed_flag, call_settings
from dit_hf.data.images import load_image_dataset
from dit_hf.evaluation.grid import labelled_grid
from dit_hf.files import check_folder, is_occupied, read_json, reading, writing_folder
from dit_hf.seeds import seeded_generator


CHOICES, IMAGES_PER_PAGE, SIDE = 8, 20, 160


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained_model_name_or_path", default="emoji64", help="Folder, Hub id or bundled name.")
    parser.add_argument("--dataset_name", help="Dataset whose column `group` says which classes are alike.")
    parser.add_argument("--group_column", default="group", help="Column with groups of classes.")
    parser.add_argument("--num_images", type=integer(at_least=1, at_most=1000), default=60, help="Images of the test.")
    add_call_flags(parser)
    add_seed_flag(parser, "Classes, images and choices depend on it alone.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Images, questions and the key.")
    parser.add_argument(
        "--answers", type=Path, help="Text file with lines `NUMBER NAME`, to be compared with the key."
    )
    args = parser.parse_args()
    if args.answers is None and args.dataset_name is None:
        parser.error("pass --dataset_name to make a test, or --answers to evaluate one")
    return args


def class_groups(dataset_name: str, group_column: str) -> dict[str, str]:
    """Class name -> group, from the training split."""
    dataset = load_image_dataset(dataset_name, "train").select_columns(["label", group_column])
    labels, groups = dataset.features["label"], dataset.features[group_column]
    if not isinstance(labels, ClassLabel) or not isinstance(groups, ClassLabel):
        raise ValueError(f"--dataset_name {dataset_name}: label and {group_column} must be columns of ClassLabel.")
    return {labels.int2str(row["label"]): groups.int2str(row[group_column]) for row in dataset}


def make_questions(groups: dict[str, str], count: int, seed: int) -> list[dict]:
    """Classes and the names to choose from, which are of the same group."""
    chooser = random.Random(seed)
    questions = []
    for name in chooser.sample(sorted(groups), min(count, len(groups))):
        alike = sorted(other for other, group in groups.items() if group == groups[name] and other != name)
        if len(alike) < CHOICES - 1:
            raise ValueError(f"The group {groups[name]!r} has {len(alike) + 1} classes; a question takes {CHOICES}.")
        choices = [name, *chooser.sample(alike, CHOICES - 1)]
        chooser.shuffle(choices)
        questions.append({"class": name, "group": groups[name], "choices": choices})
    return questions


def make_test(args):
    """Generates the images, and writes them with their questions and the key."""
    if is_occupied(check_folder(args.output_dir, "--output_dir")):
        raise ValueError(f"{args.output_dir} exists and is not empty; choose another folder.")
    questions = make_questions(class_groups(args.dataset_name, args.group_column), args.num_images, args.seed)
    pipe = DiTClassCondPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    generators = [seeded_generator(args.seed, index) for index in range(len(questions))]
    labels = pipe.get_label_ids([question["class"] for question in questions])
    images = pipe(labels, generator=generators, **call_settings(pipe, args)).images
    numbers = [str(index + 1) for index in range(len(images))]
    with writing_folder(args.output_dir) as partial:
        partial.mkdir(exist_ok=True)
        for start in range(0, len(images), IMAGES_PER_PAGE):
            page = slice(start, start + IMAGES_PER_PAGE)
            larger = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images[page]]
            grid = labelled_grid(larger, numbers[page], columns=5)
            grid.save(partial / f"images-{start // IMAGES_PER_PAGE + 1}.png")
        asked = [
            f"{number}: {' | '.join(choice.split(',')[0] for choice in question['choices'])}"
            for number, question in zip(numbers, questions, strict=True)
        ]
        (partial / "questions.txt").write_text("\n".join(asked) + "\n", encoding="utf-8")
        (partial / "key.json").write_text(json.dumps(questions, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"Images and questions: {args.output_dir}")


def read_answers(text: str) -> dict[str, str]:
    """Number -> name, from lines of both; `ValueError` for a line of another kind."""
    answers = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if (match := re.fullmatch(r"(\d+)\W+(.+)", line)) is None:
            raise ValueError(f"--answers has the line {line!r}; each must be a number and a name, such as 1: sloth.")
        answers[match[1]] = match[2]
    return answers


def evaluate_answers(args):
    """Prints the fraction of correct answers, and the wrong ones."""
    key = read_json(args.output_dir / "key.json", list)
    with reading(args.answers, "text"):
        answers = read_answers(args.answers.read_text(encoding="utf-8-sig"))
    if unknown := sorted(answers.keys() - {str(number + 1) for number in range(len(key))}):
        raise ValueError(f"--answers answers {', '.join(unknown)}; the questions are 1 to {len(key)}.")
    wrong = []
    for number, question in enumerate(key, start=1):
        right, given = question["class"].split(",")[0], answers.get(str(number), "no answer")
        if given.casefold() != right.casefold():
            wrong.append(f"{number} ({question['group']}): {right}, taken for {given}")
    print(f"{len(key) - len(wrong)} of {len(key)} right ({1 - len(wrong) / len(key):.0%})", *wrong, sep="\n")


def main():
    args = parse_args()
    if args.answers:
        evaluate_answers(args)
    else:
        make_test(args)


if __name__ == "__main__":
    run(main)
