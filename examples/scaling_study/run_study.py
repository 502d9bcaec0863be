#!/usr/bin/env python
"""The paper's scaling study (§5) in miniature: FD vs. compute for size, patch, conditioning, steps, guidance.

    accelerate launch --cpu --num_processes 1 --dynamo_backend inductor --dynamo_use_regional_compilation \
        examples/scaling_study/run_study.py --latents_dir outputs/latents --reference outputs/emoji64 \
        --mixed_precision bf16 --output_dir outputs/scaling_study

Expected: an hour on 2 cores for everything; re-run the same command to resume. Results are rows of
OUTPUT_DIR/results.csv; `plot_study.py` plots them.
"""

import csv
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch

from dit_hf import DiTClassCondPipeline
from dit_hf.command_line import ArgumentParser, integer, run
from dit_hf.complexity import count_macs
from dit_hf.evaluation.extractors import Features, extract, load_extractor
from dit_hf.evaluation.metrics import compute_metrics
from dit_hf.evaluation.samples import sample_images, sample_labels
from dit_hf.evaluation.sources import ImageSource
from dit_hf.files import check_apart, check_file, check_folder, reading, writing
from dit_hf.training.records import check_same_settings, record_settings


TRAIN = Path(__file__).resolve().parents[1] / "train_class_cond" / "train_dit.py"
# The paper's S, B, L, XL: a sixth of their widths, a quarter of their depths.
SIZES = {
    "S": {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 32},
    "B": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32},
    "L": {"num_layers": 6, "num_attention_heads": 5, "attention_head_dim": 32},
    "XL": {"num_layers": 7, "num_attention_heads": 6, "attention_head_dim": 32},
}
PATCHES = (2, 4, 8)
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
STEPS = (4, 8, 16, 32, 64, 128, 256)
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DEFAULT_STEPS = 32
METRICS = ("fd_efficientnet_lite0", "precision", "recall")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
MAY_CHANGE = ("output_dir", "sizes", "patches", "studies")
COLUMNS = ("study", "model", "steps", "guidance_scale", "gflops", "sampling_gflops", *METRICS)


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--latents_dir", type=Path, required=True, help="Of precompute_latents.py, its VAE beside them."
    )
    parser.add_argument("--reference", required=True, help="Held-out images, as compute_metrics.py takes them.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Runs and results.csv.")
    parser.add_argument("--max_train_steps", type=integer(at_least=1), default=1000, help="Of every model.")
    parser.add_argument("--train_batch_size", type=integer(at_least=1), default=64, help="Of every model.")
    parser.add_argument("--mixed_precision", choices=DTYPES, default="no", help="Of training and of the sampler.")
    parser.add_argument("--num_samples", type=integer(at_least=1), default=500, help="For every row of results.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="Rows of the first study.")
    parser.add_argument("--patches", nargs="+", type=int, choices=PATCHES, default=PATCHES, help="Its columns.")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="What to run.")
    return parser.parse_args()


def model_name(size, patch, conditioning="adaln_zero"):
    return f"{size}-{patch}-{conditioning}"


def train(args, size, patch, conditioning):
    """A trained model's pipeline folder; a run that is complete is not repeated."""
    folder = args.output_dir / model_name(size, patch, conditioning)
    config = SIZES[size] | {"patch_size": patch, "conditioning": conditioning}
    check_same_settings(folder / "config.json", config, ())
    record_settings(folder / "config.json", config)
    flags = ["--latents_dir", args.latents_dir, "--vae", args.latents_dir / "vae", "--output_dir", folder]
    flags += ["--transformer_config", folder / "config.json", "--max_train_steps", args.max_train_steps]
    flags += ["--recipe", "fast", "--train_batch_size", args.train_batch_size]
    flags += ["--mixed_precision", args.mixed_precision, "--validation_steps", args.max_train_steps]
    index = folder / "pipeline" / "model_index.json"
    if not index.exists():
        result = subprocess.run([sys.executable, TRAIN, *map(str, flags)], stdout=subprocess.DEVNULL)
        if result.returncode or not index.exists():
            raise ValueError(
                f"{TRAIN.name} ended early (exit code {result.returncode}); re-run the same command to resume."
            )
    return index.parent


@lru_cache(maxsize=1)
def load(folder, dtype):
    """The last pipeline that was measured stays in memory."""
    pipe = DiTClassCondPipeline.from_pretrained(folder, torch_dtype={"transformer": dtype, "default": torch.float32})
    pipe.transformer.compile_repeated_blocks()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def measure(args, pipe, steps, scale, extractor, reference):
    """FD, precision and recall of a trained model with a sampler's settings."""
    labels = sample_labels("balanced", args.num_samples, pipe.transformer.config.num_classes, seed=0)
    images = sample_images(pipe, labels, 0, 100, num_inference_steps=steps, guidance_scale=scale)
    found = compute_metrics(extract(images, extractor), reference, METRICS)
    return [found[name]["value"] for name in METRICS]


def sizes_and_patches(args):
    return [(size, patch, "adaln_zero", DEFAULT_STEPS, 1.0) for size in args.sizes for patch in args.patches]


def conditionings(args):
    return [(args.sizes[-1], args.patches[0], name, DEFAULT_STEPS, 1.0) for name in CONDITIONINGS]


def sampling_compute(args):
    return [(size, args.patches[0], "adaln_zero", steps, 1.0) for size in args.sizes for steps in STEPS]


def guidance(args):
    return [(args.sizes[-1], args.patches[0], "adaln_zero", DEFAULT_STEPS, scale) for scale in SCALES]


STUDIES = {
    "scaling": sizes_and_patches,
    "conditioning": conditionings,
    "sampling": sampling_compute,
    "guidance": guidance,
}


def done_already(results):
    """Rows of an earlier run, by what they are of; a last row that a kill has cut is removed."""
    lines = [",".join(COLUMNS)]
    if results.exists():
        with reading(check_file(results), "CSV"):
            lines = results.read_text(encoding="utf-8").splitlines()
        if lines[:1] != [",".join(COLUMNS)]:
            raise ValueError(f"{results} is no table of this script; choose another --output_dir.")
        if len(lines[-1].split(",")) != len(COLUMNS):
            lines.pop()
    with writing(results) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {tuple(row[name] for name in COLUMNS[:4]) for row in csv.DictReader(lines)}


def main():
    args = parse_args()
    for needed in (args.latents_dir / "index.json", args.latents_dir / "vae"):
        if not needed.exists():
            raise ValueError(f"There is no {needed}; precompute_latents.py makes --latents_dir.")
    check_folder(args.output_dir, "--output_dir")
    check_apart(args.output_dir, args.latents_dir, "--output_dir")
    if Path(args.reference).is_dir():
        check_apart(args.output_dir, args.reference, "--output_dir")
    check_same_settings(args.output_dir / "settings.json", vars(args), MAY_CHANGE)
    record_settings(args.output_dir / "settings.json", vars(args))
    extractor = load_extractor("efficientnet-lite0")
    reference = Features.join([extract(batch, extractor) for batch in ImageSource(args.reference).batches()])
    results = args.output_dir / "results.csv"
    done = done_already(results)
    for study in args.studies:
        for size, patch, conditioning, steps, scale in STUDIES[study](args):
            key = (study, model_name(size, patch, conditioning), str(steps), str(scale))
            if key in done:
                continue
            pipe = load(train(args, size, patch, conditioning), DTYPES[args.mixed_precision])
            metrics = measure(args, pipe, steps, scale, extractor, reference)
            gflops = count_macs(pipe.transformer.config) / 1e9
            row = [*key, gflops, gflops * steps * (2 if scale > 1 else 1), *metrics]
            with open(results, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(row)
            print(" ".join(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)), flush=True)


if __name__ == "__main__":
    run(main)
