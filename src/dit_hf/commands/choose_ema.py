"""Puts an average of any length together after a training with `--ema_profiles`, as a pipeline folder."""

import argparse
from pathlib import Path

import torch

from ..command_line import ArgumentParser, integer, real, run
from ..files import check_folder, is_occupied
from ..hub import CardFacts
from ..pipeline import DiTClassCondPipeline
from ..training.ema import average_after_training


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="Output folder of the training.")
    width = real(above=0, below=12**-0.5)  # no profile is wider
    parser.add_argument("--sigma_rel", type=width, required=True, help="Width over the training's length, below 0.28.")
    parser.add_argument("--step", type=integer(at_least=1), help="Last step that counts; the newest if not given.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the pipeline goes; a new folder.")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Loads the trained pipeline, replaces its weights by the average, and saves it."""
    args = parse_args()
    if is_occupied(check_folder(args.output_dir, "--output_dir")):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose a new folder.")
    weights = average_after_training(args.run / "ema", args.sigma_rel, args.step)
    pipe = DiTClassCondPipeline.from_pretrained(args.run / "pipeline", dtype=torch.float32)
    parameters = dict(pipe.transformer.named_parameters())
    if unknown := weights.keys() - parameters.keys():  # frozen parameters have no average, but not the converse
        raise ValueError(f"{args.run / 'ema'} is of another model: the pipeline has no {min(unknown)}.")
    for name, weight in weights.items():
        if weight.shape != parameters[name].shape:
            raise ValueError(f"{args.run / 'ema'} is of another model: the pipeline's {name} has another shape.")
        parameters[name].copy_(weight)
    pipe.register_to_config(_name_or_path=None)  # its card is of other weights
    recipe = {"weights": f"averaged after training, sigma_rel {args.sigma_rel}", "run": args.run.name}
    pipe.save_pretrained(args.output_dir, card=CardFacts(recipe=recipe))
    print(f"Pipeline: {args.output_dir}")


if __name__ == "__main__":
    run(main)
