"""Compares sampling settings by their metrics: every combination of the values given.

    dit-hf sweep --pretrained_model_name_or_path emoji64 --num_samples 500 --reference outputs/emoji64 \
        --guidance_scale 1.5 3 4.5 6 --num_inference_steps 10 25 --output_dir outputs/sweep

Expected: two minutes a cell for 500 images of the bundled model on 2 cores. OUTPUT_DIR then holds `results.json`,
`table.md`, `plot.png`, and a folder for each cell with its samples and `metrics.json`. After an interruption the same
command resumes. Settings that aren't given are the pipeline's own.
"""

import itertools
import json
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..command_line import ArgumentParser, integer, names, real, run
from ..evaluation.extractors import EFFICIENTNET
from ..evaluation.metrics import METRICS, find_metrics
from ..evaluation.samples import SAMPLES
from ..evaluation.sweeps import best, cell_name, grid, markdown_table, plot
from ..files import check_apart, check_folder, printable, writing
from ..training.config import GUIDANCE
from ..training.running import start_accelerator
from . import choose_ema, metrics, sample


# What a cell sets: flags of `dit-hf sample`, and the width of an average. The slowest to change comes first.
SETTINGS = ("scheduler", "sigma_rel", "guidance_scale", "guidance_interval", "num_inference_steps")
FD = next(metric for metric in METRICS if metric.name == "fd")


def interval(text):
    """`START,END` as two fractions of the steps."""
    start, _, end = text.partition(",")
    fraction = real(at_least=0, at_most=1)
    return fraction(start), fraction(end)


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--pretrained_model_name_or_path", "--pipeline", help="Folder, Hub id or bundled name.")
    model.add_argument("--run", type=Path, help="Output folder of a training with --ema_profiles (--sigma_rel).")
    parser.add_argument("--reference", required=True, help="As `dit-hf metrics` takes it.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Samples, metrics, table and plot.")
    lists = parser.add_argument_group("settings, each with one or more values")
    lists.add_argument("--scheduler", nargs="+", help="Recipes of `make_scheduler`.")
    lists.add_argument("--guidance_scale", type=GUIDANCE, nargs="+", help="Scales.")
    lists.add_argument("--guidance_interval", type=interval, nargs="+", help="START,END of the guided steps.")
    lists.add_argument("--num_inference_steps", type=integer(at_least=1, at_most=100_000), nargs="+", help="Steps.")
    width = real(above=0, below=12**-0.5)
    lists.add_argument("--sigma_rel", type=width, nargs="+", help="Widths of the average, with --run.")
    parser.add_argument("--num_samples", type=integer(at_least=2), default=1000, help="Images a cell.")
    parser.add_argument("--labels", default="balanced", help="As `dit-hf sample` takes it.")
    parser.add_argument("--holdout", type=real(at_least=0, below=1), default=0.0, help="Of a dataset with one split.")
    sample.add_seed_flag(parser, "The same for every cell.")
    parser.add_argument("--batch_size", type=integer(at_least=1, at_most=2**16), default=48, help="Images in a batch.")
    parser.add_argument("--metrics", type=names, default=[FD.name], help="Separated by commas; the first decides.")
    parser.add_argument("--feature_extractor", default=EFFICIENTNET, help="As `dit-hf metrics` takes it.")
    parser.add_argument("--held_out_extractor", help="A second one, by whose Fréchet distance the choice is checked.")
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/features"), help="Where features are kept.")
    args = parser.parse_args()
    if (args.run is None) != (args.sigma_rel is None):
        parser.error("--run and --sigma_rel belong together: give both or neither")
    if args.held_out_extractor == args.feature_extractor:
        parser.error(f"--held_out_extractor {args.held_out_extractor} is --feature_extractor; name another one")
    check_folder(args.output_dir, "--output_dir")
    check_apart(args.output_dir, args.reference, "--output_dir")
    return args


def cell_flags(args, cell):
    """The flags of `dit-hf sample` for a cell."""
    source = average_folder(args, cell["sigma_rel"]) if args.run else args.pretrained_model_name_or_path
    flags = {"pretrained_model_name_or_path": source, "output_dir": args.output_dir / cell_name(cell)}
    flags |= {name: getattr(args, name) for name in ("num_samples", "labels", "seed", "batch_size")}
    flags |= {"holdout": args.holdout} if args.holdout else {}
    flags |= {name: value for name, value in cell.items() if name != "sigma_rel"}
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def metric_flags(args, samples, extractor, asked):
    """The flags of `dit-hf metrics` for the samples of a cell."""
    flags = ["--samples", str(samples), "--reference", args.reference, "--feature_extractor", extractor]
    flags += ["--metrics", ",".join(asked), "--cache_dir", str(args.cache_dir), "--bootstrap", "0"]
    return flags + (["--holdout", str(args.holdout)] if args.holdout else [])


def average_folder(args, width):
    """Where the pipeline of a width of the average is kept."""
    return args.output_dir / "averages" / str(width)


def save_averages(args):
    """The pipelines of all widths that aren't there yet."""
    for width in args.sigma_rel or ():
        folder = average_folder(args, width)
        if not folder.exists():
            flags = ["--run", str(args.run), "--sigma_rel", str(width), "--output_dir", str(folder)]
            choose_ema.save_average(choose_ema.parse_args(flags))


def metric_names(args):
    """The metrics by extractor, as `dit-hf metrics` calls them."""
    rows = {metric.name: metric for metric in METRICS}
    extractor = args.feature_extractor
    found = {extractor: [rows[name].full_name(extractor) if name in rows else name for name in args.metrics]}
    if args.held_out_extractor:
        found[args.held_out_extractor] = [FD.full_name(args.held_out_extractor)]
    for extractor, each in found.items():
        find_metrics(each, extractor)  # refuses unknown ones
    return found


def check_cells(args, cells):
    """Refuses settings that the pipeline can't be called with, before the first sample."""
    for _, group in itertools.groupby(cells, key=lambda cell: (cell.get("scheduler"), cell.get("sigma_rel"))):
        each = [sample.parse_args(cell_flags(args, cell)) for cell in group]
        pipe = sample.load_pipeline(each[0], "cpu")
        for asked in each:
            sample.call_settings(pipe, asked)


def measure_cell(args, accelerator, cell, asked):
    """Generates the samples of a cell, or what is missing of them, and measures them."""
    flags = cell_flags(args, cell)
    wanted = sample.parse_args(flags)
    with redirect_stdout(sys.stderr):  # the table alone goes to stdout
        sample.generate(wanted, accelerator)
    found = {}
    if accelerator.is_main_process:
        for extractor, each in asked.items():
            compared = metric_flags(args, wanted.output_dir / SAMPLES, extractor, each)
            result, recipe = metrics.measure(metrics.parse_args(compared))
            found |= {name: result[name]["value"] for name in each}
        write_json(wanted.output_dir / "metrics.json", found | {"command": command(flags), "recipe": recipe})
    return found


def command(flags):
    """A command line for a shell."""
    return shlex.join(["dit-hf", "sample", *flags])


def write_json(path, value):
    """Writes a file whole or not at all."""
    with writing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")


def finish(args, rows, asked):
    """Writes results, table and plot; prints the table and the best cell by each extractor's first metric."""
    chosen = [(extractor, each[0], find_metrics(each[:1], extractor)[0]) for extractor, each in asked.items()]
    _, metric, row = chosen[0]
    rows = best(rows, metric, row.higher_is_better)
    table = markdown_table(rows, [name for each in asked.values() for name in each])
    with writing(args.output_dir / "table.md") as partial:
        partial.write_text(table + "\n", "utf-8")
    print(printable(table))
    found = {}
    for extractor, name, row in chosen:
        cell = {setting: best(rows, name, row.higher_is_better)[0].get(setting) for setting in SETTINGS}
        cell = {setting: value for setting, value in cell.items() if value is not None}
        found[name] = {"extractor": extractor, "cell": cell, "command": command(cell_flags(args, cell))}
        print(printable(f"Best by {name}: {found[name]['command']}"))
    write_json(args.output_dir / "results.json", {"rows": rows, "best": found, "settings": vars(args)})
    if plot(rows, metric, args.output_dir / "plot.png"):
        print(printable(f"Plot: {args.output_dir / 'plot.png'}"))


def main():
    args = parse_args()
    asked = metric_names(args)
    cells = grid({name: getattr(args, name) for name in SETTINGS if getattr(args, name)})
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        save_averages(args)
    accelerator.wait_for_everyone()
    check_cells(args, cells)
    rows = []
    for number, cell in enumerate(cells, start=1):
        rows.append(cell | measure_cell(args, accelerator, cell, asked))
        if accelerator.is_main_process:
            print(printable(f"{number} of {len(cells)}: {rows[-1]}"), file=sys.stderr)
    if accelerator.is_main_process:
        finish(args, rows, asked)


if __name__ == "__main__":
    run(main)
