"""Compares sampling settings by their metrics: every combination of the values given.

    dit-hf sweep --pretrained_model_name_or_path emoji64 --num_samples 500 --reference outputs/emoji64 \
        --scheduler flow_euler --guidance_scale 1.5 3 4.5 6 --num_inference_steps 10 25 --output_dir outputs/sweep

Expected: two minutes a cell for 500 images of the bundled model on 2 cores. OUTPUT_DIR then holds `results.json`,
`table.md`, `plot.png`, and a folder for each cell with its samples and `metrics.json`. After an interruption the same
command resumes. Settings that aren't given are the pipeline's own.
"""

import argparse
import itertools
import json
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..command_line import ArgumentParser, integer, names, print_text, real, run
from ..evaluation.extractors import EFFICIENTNET
from ..evaluation.metrics import METRICS, find_metrics, full_names, too_few_images
from ..evaluation.protocol import protocol_line
from ..evaluation.samples import SAMPLES
from ..evaluation.sources import ImageSource
from ..evaluation.sweeps import INTERVAL, best, cell_name, grid, markdown_table, plot, shown
from ..files import check_apart, check_folder, writing
from ..training.config import GUIDANCE
from ..training.running import start_accelerator
from . import choose_ema, metrics, sample


# What a cell sets: flags of `dit-hf sample`, and the width of an average. The slowest to change comes first.
SETTINGS = ("scheduler", "sigma_rel", "guidance_scale", "guidance_interval", "num_inference_steps")
FD = next(metric for metric in METRICS if metric.name == "fd")


def interval(text):
    """`START,END` as two fractions of the steps."""
    words = text.split(",")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be two fractions of the steps, START,END")
    fraction = real(at_least=0, at_most=1)
    return fraction(words[0]), fraction(words[1])


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--pretrained_model_name_or_path", "--pipeline", help="Folder, Hub id or bundled name.")
    model.add_argument("--run", type=Path, help="Output folder of a training with --ema_profiles, for --sigma_rel.")
    parser.add_argument("--reference", required=True, help="Reference, as for `dit-hf metrics`.")
    parser.add_argument("--training", help="Training images, as for `dit-hf metrics`.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for samples, metrics, table and plot.")
    lists = parser.add_argument_group("settings with one or more values each")
    lists.add_argument("--scheduler", nargs="+", help="Recipes of `make_scheduler`.")
    lists.add_argument("--guidance_scale", type=GUIDANCE, nargs="+", help="Guidance scales.")
    lists.add_argument(
        "--guidance_interval", type=interval, nargs="+", help="Guided parts of the steps, as START,END."
    )
    lists.add_argument(
        "--num_inference_steps", type=integer(at_least=1, at_most=100_000), nargs="+", help="Numbers of steps."
    )
    width = real(above=0, below=12**-0.5)
    lists.add_argument("--sigma_rel", type=width, nargs="+", help="Widths of the averaged weights, with --run.")
    parser.add_argument("--num_samples", type=integer(at_least=2), default=1000, help="Images per combination.")
    parser.add_argument("--labels", default="balanced", help="Classes of the samples, as for `dit-hf sample`.")
    parser.add_argument(
        "--holdout", type=real(at_least=0, below=1), default=0.0, help="Test fraction of a dataset with one split."
    )
    sample.add_seed_flag(parser, "Seed of every combination.")
    parser.add_argument("--batch_size", type=integer(at_least=1, at_most=2**16), default=48, help="Images per batch.")
    parser.add_argument(
        "--metrics", type=names, default=[FD.name], help="Metrics, separated by commas; the first decides."
    )
    parser.add_argument("--feature_extractor", default=EFFICIENTNET, help="Extractor, as for `dit-hf metrics`.")
    parser.add_argument("--held_out_extractor", help="Second extractor, whose Fréchet distance checks the choice.")
    parser.add_argument(
        "--bootstrap", type=integer(at_least=0, at_most=10_000), default=10, help="Resampled sets for the intervals."
    )
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/features"), help="Folder for cached features.")
    args = parser.parse_args()
    if (args.run is None) != (args.sigma_rel is None):
        parser.error("--run and --sigma_rel belong together: give both or neither")
    if args.held_out_extractor == args.feature_extractor:
        parser.error(f"--held_out_extractor {args.held_out_extractor} is --feature_extractor; name another one")
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name)}
    if not given:
        parser.error(f"there is nothing to compare; give values of {', '.join(f'--{name}' for name in SETTINGS)}")
    args.cells = grid({name: list(dict.fromkeys(values)) for name, values in given.items()})
    check_folder(args.output_dir, "--output_dir")
    check_apart(args.output_dir, args.reference, "--output_dir")
    return args


def cell_flags(args, cell, **others):
    """The flags of `dit-hf sample` for a combination of settings."""
    source = average_folder(args, cell["sigma_rel"]) if args.run else args.pretrained_model_name_or_path
    flags = {"pretrained_model_name_or_path": source, "output_dir": args.output_dir / cell_name(cell)}
    flags |= {name: getattr(args, name) for name in ("num_samples", "labels", "seed", "batch_size")}
    flags |= {"holdout": args.holdout} if args.holdout else {}
    flags |= {name: value for name, value in cell.items() if name != "sigma_rel"} | others
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def metric_args(args, samples, extractor, asked):
    """The arguments of `dit-hf metrics` for the samples of a combination."""
    flags = ["--samples", samples, "--reference", args.reference, "--feature_extractor", extractor]
    flags += ["--metrics", ",".join(asked), "--cache_dir", args.cache_dir, "--bootstrap", args.bootstrap]
    flags += ["--training", args.training] if args.training else []
    flags += ["--holdout", args.holdout] if args.holdout else []
    return metrics.parse_args(list(map(str, flags)))


def average_folder(args, width):
    """Where the pipeline of a width of the average is kept."""
    return args.output_dir / "averages" / str(width)


def save_averages(args):
    """The pipelines of all widths, of the newest weights; samples of older ones are refused later."""
    for width in args.sigma_rel or ():
        folder = average_folder(args, width)
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--run", str(args.run), "--sigma_rel", str(width), "--output_dir", str(folder)]
        choose_ema.save_average(choose_ema.parse_args(flags))


def check_metrics(args):
    """The metrics of each extractor; refuses what can't be measured, before the first sample."""
    found = {args.feature_extractor: full_names(args.metrics, args.feature_extractor)}
    if args.held_out_extractor:
        found[args.held_out_extractor] = full_names([FD.name], args.held_out_extractor)
    every = [name for each in found.values() for name in each]
    if len(set(every)) < len(every):
        raise ValueError(
            f"Both extractors give the name {max(every, key=every.count)}; name their folders differently."
        )
    for extractor, each in found.items():
        asked = metric_args(args, args.output_dir / SAMPLES, extractor, each)
        _, description, parts = metrics.open_extractor(asked)
        metrics.choose_metrics(asked, description, parts)
        for name, reason in too_few_images(each, extractor, {"samples": args.num_samples}).items():
            raise ValueError(f"{name} {reason}; raise --num_samples.")
    for source, split in ((args.reference, "test"), (args.training, "train")):
        if source and Path(source).suffix != ".npz":
            ImageSource(source, split, holdout=args.holdout)
    return found


def check_cells(args):
    """Refuses settings that the pipeline can't be called with, before the first sample."""
    for _, group in itertools.groupby(args.cells, key=lambda cell: (cell.get("scheduler"), cell.get("sigma_rel"))):
        asked = [sample.parse_args(cell_flags(args, cell)) for cell in group]
        pipe = sample.load_pipeline(asked[0], "cpu")
        for each in asked:
            sample.call_settings(pipe, each)


def measure_cell(args, accelerator, cell, asked):
    """Generates the samples of a combination, or what is missing of them; their metrics, on the main process."""
    flags = cell_flags(args, cell)
    wanted = sample.parse_args(flags)
    sample.generate(wanted, accelerator)
    values, recipes = {}, {}
    if accelerator.is_main_process:
        for extractor, each in asked.items():
            result, recipe = metrics.measure(metric_args(args, wanted.output_dir / SAMPLES, extractor, each))
            recipes[extractor] = {"protocol": protocol_line(recipe), "recipe": recipe}
            for name in each:
                values[name] = result[name]["value"]
                values |= {f"{name}{INTERVAL}": result[name]["ci95"]} if "ci95" in result[name] else {}
        write_json(wanted.output_dir / "metrics.json", values | {"command": command(flags), "extractors": recipes})
    return values


def command(flags):
    """A command line for a shell."""
    return shlex.join(["dit-hf", "sample", *flags])


def write_json(path, value):
    """Writes a file whole or not at all."""
    with writing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")


def finish(args, rows, asked):
    """Writes results, table and plot; prints the table and the best combination by each extractor's first metric."""
    chosen = [(extractor, each[0], find_metrics(each[:1], extractor)[0]) for extractor, each in asked.items()]
    _, metric, row = chosen[0]
    rows = best(rows, metric, row.higher_is_better)
    table = markdown_table(rows, [name for each in asked.values() for name in each])
    with writing(args.output_dir / "table.md") as partial:
        partial.write_text(table + "\n", "utf-8")
    print_text(table)
    found = {}
    new = {"seed": args.seed + 1, "output_dir": args.output_dir.with_name(f"{args.output_dir.name}-best")}
    for extractor, name, row in chosen:
        cell = {setting: best(rows, name, row.higher_is_better)[0].get(setting) for setting in SETTINGS}
        cell = {setting: value for setting, value in cell.items() if value is not None}
        found[name] = {"extractor": extractor, "cell": cell}
        print_text(f"Best by {name}, with new noise: {command(cell_flags(args, cell, **new))}")
    write_json(args.output_dir / "results.json", {"rows": rows, "best": found, "settings": vars(args)})
    if plot(rows, metric, args.output_dir / "plot.png"):
        print_text(f"Plot: {args.output_dir / 'plot.png'}")


def main():
    args = parse_args()
    accelerator = start_accelerator()
    asked = check_metrics(args)
    rows = []
    with redirect_stdout(sys.stderr):  # the table alone goes to stdout
        if accelerator.is_main_process:
            save_averages(args)
        accelerator.wait_for_everyone()
        check_cells(args)
        for number, cell in enumerate(args.cells, start=1):
            rows.append(cell | measure_cell(args, accelerator, cell, asked))
            if accelerator.is_main_process:
                words = ", ".join(f"{name} {shown(value)}" for name, value in rows[-1].items() if INTERVAL not in name)
                print_text(f"{number} of {len(args.cells)}: {words}")
    if accelerator.is_main_process:
        finish(args, rows, asked)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
