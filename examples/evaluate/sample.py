#!/usr/bin/env python
"""Draws images for evaluation: the same set for any number of processes and any batch size, resumable.

    accelerate launch examples/evaluate/sample.py --pretrained_model_name_or_path emoji64 --num_samples 1000 \
        --num_inference_steps 30 --guidance_scale 5 --output_dir outputs/samples

Expected: three minutes for a thousand images of the bundled model on 2 cores. OUTPUT_DIR then holds `images/`, one PNG a
sample, `samples.npz` in ADM's format and `recipe.json`. The same command goes on after a kill.
"""

import argparse
import json
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.command_line import run
from dit_hf.complexity import count_macs
from dit_hf.data.fingerprints import checksum
from dit_hf.data.images import check_column, load_image_dataset
from dit_hf.evaluation.samples import SAMPLING_RECIPES, draw_missing, missing_samples, sample_labels, write_npz
from dit_hf.evaluation.sources import SAMPLES
from dit_hf.schedulers import trained_options
from dit_hf.seeds import seeded_generator
from dit_hf.training.checkpointing import check_same_settings, record_settings
from dit_hf.training.running import only_run, start_accelerator


# What may differ between two runs that draw the same set.
MAY_CHANGE = ("batch_size", "versions")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Pipeline: folder, Hub id or bundled name."
    )
    parser.add_argument("--revision", help="Of a repository on the Hub.")
    parser.add_argument(
        "--recipe", choices=SAMPLING_RECIPES, help="A row of the paper; other flags replace single values."
    )
    parser.add_argument("--num_samples", type=int, default=50_000, help="Images.")
    parser.add_argument(
        "--labels",
        default="balanced",
        help="`balanced`, classes in turn; `random`, drawn; or a dataset, whose test split says how often each occurs.",
    )
    parser.add_argument("--scheduler", help="Recipe of `make_scheduler`; the pipeline's own if not given.")
    parser.add_argument("--num_inference_steps", type=int, default=250, help="Sampler steps.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="Classifier-free guidance.")
    parser.add_argument("--guidance_channels", type=int, help="Guided channels, 3 in the paper; all if not given.")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, default=(0.0, 1.0), help="Guided part of the steps."
    )
    parser.add_argument("--vae", help="Folder or Hub id of another decoder.")
    parser.add_argument("--seed", type=int, default=0, help="Image i depends on (seed, i) alone.")
    parser.add_argument("--batch_size", type=int, default=48, help="Images drawn at once by a process.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Images, samples.npz and recipe.json.")
    parser.add_argument("--dry_run", action="store_true", help="Print the cost, and write nothing.")
    parser.set_defaults(**SAMPLING_RECIPES.get(parser.parse_known_args()[0].recipe, {}))
    return parser.parse_args()


def load_pipeline(args, device):
    """The pipeline that the flags name, with their scheduler and decoder."""
    name = args.pretrained_model_name_or_path
    if "/" not in name and not Path(name).exists():
        pipe = DiTClassCondPipeline.from_bundled(name)
    else:
        pipe = DiTClassCondPipeline.from_pretrained(name, revision=args.revision)
    if args.vae:
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(args.vae))
    if args.scheduler:
        pipe.scheduler = make_scheduler(args.scheduler, **trained_options(args.scheduler, pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_options(args):
    """What the pipeline is called with."""
    return {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "guidance_channels": args.guidance_channels,
        "guidance_interval": tuple(args.guidance_interval),
    }


def asked_labels(args, pipe, count):
    """Class ids of the samples."""
    if args.labels in ("balanced", "random"):
        return sample_labels(args.labels, count, pipe.transformer.config.num_classes, args.seed)
    dataset = load_image_dataset(args.labels, "test")
    names = getattr(check_column(dataset, "label", "--labels"), "names", None)
    if names is None:
        raise ValueError(f"--labels {args.labels}: its column `label` has no class names.")
    # Shuffled, or a part of them would hold the first classes only.
    order = torch.randperm(len(dataset), generator=seeded_generator(args.seed, 2))
    column = dataset["label"]
    labels = [column[index] for index in order.tolist()]
    if any(label is None or label < 0 for label in labels):
        raise ValueError(f"--labels {args.labels} has images without a class.")
    ids = torch.tensor(pipe.get_label_ids(names))
    return ids[torch.tensor(labels)[torch.arange(count) % len(labels)]]


def print_cost(args, pipe, num_processes):
    """Compute and hours, by two timed steps."""
    first, last = args.guidance_interval
    halves = 1 + (last - first if args.guidance_scale > 1 else 0)
    labels = asked_labels(args, pipe, args.batch_size)
    options = pipeline_options(args) | {"num_inference_steps": 2, "output_type": "latent"}
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        pipe(labels.tolist(), **options).images.sum().item()  # waits for a GPU
        call = (time.perf_counter() - started) / pipe.num_timesteps / args.batch_size
    pipe.scheduler.set_timesteps(args.num_inference_steps)
    calls = len(pipe.scheduler.timesteps)  # two a step for Heun's
    gflops = count_macs(pipe.transformer.config) / 1e9 * calls * halves
    hours = call * calls * args.num_samples / num_processes / 3600
    print(
        json.dumps(
            {"Gflops an image": round(gflops, 2), "images": args.num_samples, "hours": round(hours, 2)}, indent=2
        )
    )


def main():
    args = parse_args()
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1.")
    accelerator = start_accelerator()
    pipe = load_pipeline(args, accelerator.device)
    if args.dry_run:
        if accelerator.is_main_process:
            print_cost(args, pipe, accelerator.num_processes)
        return
    labels = asked_labels(args, pipe, args.num_samples)
    with only_run(args.output_dir) if accelerator.is_main_process else nullcontext():
        sample(args, accelerator, pipe, labels)


def sample(args, accelerator, pipe, labels):
    """All images that are not there yet, each process its part; then the npz."""
    recipe = {name: value for name, value in vars(args).items() if name not in ("dry_run", "output_dir")}
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    recipe |= {"scheduler": type(pipe.scheduler).__name__, "scheduler_config": config}
    recipe |= {"dtype": str(pipe.transformer.dtype), "weights": checksum(pipe.transformer)[:16]}
    recipe["vae_weights"] = checksum(pipe.vae)[:16] if pipe.vae is not None else None
    recipe["classes"] = {str(label): name for label, name in pipe.id2label.items()}
    recipe["versions"] = {name: version(name) for name in ("dit_hf", "torch", "diffusers")}
    folder = args.output_dir / "images"
    missing = missing_samples(folder, args.num_samples)
    if accelerator.is_main_process:
        check_same_settings(args.output_dir / "recipe.json", recipe, MAY_CHANGE)
        if missing:  # a complete set keeps the versions that drew it
            record_settings(args.output_dir / "recipe.json", recipe)
    accelerator.wait_for_everyone()  # or one would list what another has already drawn
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=len(mine), desc="samples", mininterval=5, disable=not accelerator.is_main_process)
    for count in draw_missing(pipe, labels, mine, folder, args.seed, args.batch_size, **pipeline_options(args)):
        progress.update(count)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_npz(folder, labels, args.output_dir / SAMPLES)
        drawn = f"{args.num_samples} images, {len(missing)} of them new"
        print(f"{drawn}: {args.output_dir / SAMPLES}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
