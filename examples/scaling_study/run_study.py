#!/usr/bin/env python
"""The paper's scaling study (§5) in miniature: distance against compute, for size, patch, conditioning, steps and guidance.

    python examples/scaling_study/run_study.py --latents_dir outputs/latents --reference outputs/emoji64 \
        --output_dir outputs/scaling_study

Expected: five to six hours on 2 cores for everything; run the same command again to go on. Results are rows of
OUTPUT_DIR/results.csv; `plot_study.py` draws them.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from dit_hf import DiTTransformer2DModel
from dit_hf.command_line import run
from dit_hf.complexity import count_macs
from dit_hf.training.checkpointing import check_same_settings, record_settings


EXAMPLES = Path(__file__).resolve().parents[1]
# The paper's S, B, L, XL with the ratios of their depths and widths, at a tenth to a fifth of the size.
SIZES = {
    "S": {"num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 32},
    "B": {"num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 32},
    "L": {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 32},
    "XL": {"num_layers": 10, "num_attention_heads": 9, "attention_head_dim": 32},
}
PATCHES = (2, 4, 8)
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
STEPS = (4, 8, 16, 32, 64, 128, 256)
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DEFAULT_STEPS, DEFAULT_SCALE = 32, 1.5
MAY_CHANGE = ("output_dir", "sizes", "patches", "studies")
COLUMNS = ("study", "model", "steps", "guidance_scale", "gflops", "sampling_gflops", "fid", "precision", "recall")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--latents_dir", type=Path, required=True, help="Of precompute_latents.py, its VAE beside them."
    )
    parser.add_argument("--reference", required=True, help="Held-out images, as compute_metrics.py takes them.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Runs and results.csv.")
    parser.add_argument("--max_train_steps", type=int, default=3000, help="Of every model.")
    parser.add_argument("--train_batch_size", type=int, default=64, help="Of every model.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Of every figure.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="Rows of the first study.")
    parser.add_argument("--patches", nargs="+", type=int, choices=PATCHES, default=PATCHES, help="Its columns.")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="What to run.")
    return parser.parse_args()


def model_name(size, patch, conditioning="adaln_zero"):
    return f"{size}-{patch}-{conditioning}"


def train(args, size, patch, conditioning="adaln_zero"):
    """A trained model's pipeline folder; a run that is complete is not repeated."""
    folder = args.output_dir / model_name(size, patch, conditioning)
    config = SIZES[size] | {"patch_size": patch, "conditioning": conditioning}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--latents_dir", args.latents_dir, "--vae", args.latents_dir / "vae", "--output_dir", folder]
    flags += ["--transformer_config", folder / "config.json", "--max_train_steps", args.max_train_steps]
    flags += ["--train_batch_size", args.train_batch_size, "--validation_steps", args.max_train_steps]
    flags += ["--validation_images_per_class", 2, "--balance_classes"]
    if not (folder / "pipeline" / "model_index.json").exists():
        script(EXAMPLES / "train_class_cond" / "train_dit.py", *flags)
    return folder


def measure(args, folder, steps, scale):
    """FID, precision and recall of a trained model with a sampler's settings."""
    samples = folder / f"samples-{steps}-{scale}"
    flags = ["--pretrained_model_name_or_path", folder / "pipeline", "--num_samples", args.num_samples]
    flags += ["--num_inference_steps", steps, "--guidance_scale", scale, "--output_dir", samples]
    script(EXAMPLES / "evaluate" / "sample.py", *flags)
    output = samples / "metrics.json"
    flags = ["--samples", samples / "samples.npz", "--reference", args.reference, "--metrics", "fid,precision,recall"]
    script(
        EXAMPLES / "evaluate" / "compute_metrics.py",
        *flags,
        *("--bootstrap", 0, "--cache_dir", args.output_dir / "features", "--output", output),
    )
    found = json.loads(output.read_text())
    return {name: found[name]["value"] for name in ("fid", "precision", "recall")}


def script(path, *flags):
    """Runs a script of the examples; its error is ours."""
    result = subprocess.run([sys.executable, path, *map(str, flags)], stdout=subprocess.DEVNULL)
    if result.returncode:
        raise ValueError(f"{path.name} ended with exit code {result.returncode}; run the same command again to go on.")


def sizes_and_patches(args):
    return [(size, patch, "adaln_zero", DEFAULT_STEPS, DEFAULT_SCALE) for size in args.sizes for patch in args.patches]


def conditionings(args):
    return [(args.sizes[-1], args.patches[0], name, DEFAULT_STEPS, DEFAULT_SCALE) for name in CONDITIONINGS]


def sampling_compute(args):
    return [(size, args.patches[0], "adaln_zero", steps, DEFAULT_SCALE) for size in args.sizes for steps in STEPS]


def guidance(args):
    return [(args.sizes[-1], args.patches[0], "adaln_zero", DEFAULT_STEPS, scale) for scale in SCALES]


STUDIES = {
    "scaling": sizes_and_patches,
    "conditioning": conditionings,
    "sampling": sampling_compute,
    "guidance": guidance,
}


def main():
    args = parse_args()
    check_same_settings(args.output_dir / "settings.json", vars(args), MAY_CHANGE)
    record_settings(args.output_dir / "settings.json", vars(args))
    results = args.output_dir / "results.csv"
    done = set()
    if results.exists():
        with open(results, newline="") as file:
            done = {tuple(row[name] for name in COLUMNS[:4]) for row in csv.DictReader(file)}
    else:
        results.write_text(",".join(COLUMNS) + "\n")
    for study in args.studies:
        for size, patch, conditioning, steps, scale in STUDIES[study](args):
            key = (study, model_name(size, patch, conditioning), str(steps), str(scale))
            if key in done:
                continue
            folder = train(args, size, patch, conditioning)
            figures = measure(args, folder, steps, scale)
            config = DiTTransformer2DModel.load_config(folder / "pipeline", subfolder="transformer")
            gflops = count_macs(config) / 1e9
            row = [*key, gflops, gflops * steps * (2 if scale != 1 else 1), *figures.values()]
            with open(results, "a", newline="") as file:
                csv.writer(file).writerow(row)
            print(" ".join(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)), flush=True)


if __name__ == "__main__":
    run(main)
