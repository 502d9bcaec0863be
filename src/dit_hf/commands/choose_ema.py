"""Puts an average of any length together after a training with `--ema_profiles`, as a pipeline folder."""

import argparse
from pathlib import Path

import torch

from ..command_line import ArgumentParser, integer, real, run
from ..files import check_folder, is_occupied, writing_folder
from ..hub import CardFacts, write_card
from ..pipeline import DiTClassCondPipeline
from ..training.ema import average_after_training
from ..training.finetuning import frozen_names
from ..training.records import read_settings, read_snapshots
from ..training.settings import LOG_FILE, SETTINGS_FILE


def parse_args(flags: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="Output folder of the training.")
    width = real(above=0, below=12**-0.5)  # no profile is wider
    parser.add_argument(
        "--sigma_rel",
        type=width,
        required=True,
        help="Width of the average relative to the length of the training, below 0.28.",
    )
    parser.add_argument("--step", type=integer(at_least=1), help="Last step of the average; by default the newest.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the pipeline.")
    return parser.parse_args(flags)


def main() -> None:
    """Saves the average that the flags name."""
    save_average(parse_args())


@torch.no_grad()
def save_average(args: argparse.Namespace) -> None:
    """Loads the trained pipeline, replaces its weights by the average, and saves it."""
    if is_occupied(check_folder(args.output_dir, "--output_dir")):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose a new folder.")
    kept = read_snapshots(args.run / LOG_FILE)
    weights = average_after_training(args.run / "ema", args.sigma_rel, args.step, kept)
    pipe = DiTClassCondPipeline.from_pretrained(args.run / "pipeline", dtype=torch.float32)
    parameters = dict(pipe.transformer.named_parameters())
    if unknown := weights.keys() - parameters.keys():
        raise ValueError(f"{args.run / 'ema'} is of another model: the pipeline has no {min(unknown)}.")
    frozen = read_settings(args.run / SETTINGS_FILE).get("freeze", ())
    if missing := parameters.keys() - weights.keys() - frozen_names(parameters, frozen):
        raise ValueError(f"{args.run / 'ema'} is incomplete: its snapshots have no {min(missing)}.")
    for name, weight in weights.items():
        if weight.shape != parameters[name].shape:
            raise ValueError(f"{args.run / 'ema'} is of another model: the pipeline's {name} has another shape.")
        parameters[name].copy_(weight)
    pipe.register_to_config(_name_or_path=None)  # its card is of other weights
    recipe = {"weights": f"averaged after training, sigma_rel {args.sigma_rel}", "run": args.run.name}
    with writing_folder(args.output_dir) as partial:
        pipe.save_pretrained(partial)
        write_card(pipe, partial, args.output_dir.resolve().name, CardFacts(recipe=recipe))
    print(f"Pipeline: {args.output_dir}")


if __name__ == "__main__":
    run(main)
