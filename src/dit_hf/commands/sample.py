"""Generates a seeded set of images for evaluation: the same set for any number of processes and any batch size.

    accelerate launch --module dit_hf.commands.sample --pretrained_model_name_or_path emoji64 --num_samples 1000 \
        --output_dir outputs/samples

Expected: a minute for a thousand images of the bundled model on 2 cores. OUTPUT_DIR then holds `images/`, one PNG
per sample, `samples.npz` in ADM's format and `recipe.json`. After an interruption the same command resumes.
"""

import hashlib
import json
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ..command_line import ArgumentParser, integer, real, run
from ..complexity import count_macs
from ..data.autoencoders import load_autoencoder
from ..data.fingerprints import checksum
from ..evaluation.samples import (
    LABEL_POLICIES,
    RECIPE,
    ROUNDINGS,
    SAMPLES,
    SAMPLING_RECIPES,
    generate_samples,
    missing_samples,
    sample_labels,
    write_npz,
)
from ..evaluation.sources import ImageSource
from ..files import check_apart, check_folder, is_occupied, read_json, remove_leftovers
from ..pipeline import DiTClassCondPipeline
from ..pipeline_dit_class_cond import largest_scale
from ..schedulers import make_scheduler, trained_options
from ..seeds import seeded_generator
from ..training.config import GUIDANCE
from ..training.records import check_same_settings, record_settings
from ..training.running import lock_folder, start_accelerator
from ..training.validation import check_sampling


# What may differ between two runs that generate the same set.
MAY_CHANGE = ("batch_size", "versions")


def parse_args(flags=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--pipeline",
        required=True,
        help="Pipeline: folder, Hub id or bundled name.",
    )
    parser.add_argument("--revision", help="Revision of a repository on the Hub.")
    parser.add_argument(
        "--recipe", choices=SAMPLING_RECIPES, help="Row of the paper's tables; other flags override single values."
    )
    parser.add_argument(
        "--num_samples", type=integer(at_least=1, at_most=10_000_000), default=50_000, help="Number of images."
    )
    parser.add_argument(
        "--labels",
        default="balanced",
        help="`balanced` (classes in turn), `random`, or a dataset whose test split gives the class frequencies.",
    )
    parser.add_argument(
        "--holdout",
        type=real(at_least=0, below=1),
        default=0.0,
        help="Fraction of --labels that is its test split, for a dataset with one split.",
    )
    parser.add_argument("--scheduler", help="Recipe of `make_scheduler`; by default the scheduler of the pipeline.")
    add_call_flags(parser)
    parser.add_argument("--vae", help="VAE to decode with instead of the pipeline's: folder or Hub id.")
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="round",
        help="How pixels become 8 bits: `round` as diffusers and DiT, or `truncate` as ADM.",
    )
    add_seed_flag(parser, "Image i depends on (seed, i) alone.")
    parser.add_argument(
        "--batch_size", type=integer(at_least=1, at_most=2**16), default=48, help="Images per batch and process."
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Folder for images, samples.npz and recipe.json."
    )
    parser.add_argument("--dry_run", action="store_true", help="Print the cost and write nothing.")
    parser.set_defaults(**SAMPLING_RECIPES.get(parser.parse_known_args(flags)[0].recipe, {}))
    args = parser.parse_args(flags)
    if args.holdout and args.labels in LABEL_POLICIES:
        parser.error(f"--holdout has no effect with --labels {args.labels}, which is not a dataset; omit it")
    if not args.dry_run:
        check_output(args)
    return args


def check_output(args):
    """Refuses a folder that can't be written, is the dataset's, or holds something else than a set of samples."""
    folder = args.output_dir
    check_folder(folder, "--output_dir")
    if args.labels not in LABEL_POLICIES:
        check_apart(folder, args.labels, "--output_dir")
    if (folder / RECIPE).is_file():
        read_json(folder / RECIPE)
    elif is_occupied(folder):
        raise ValueError(f"--output_dir {folder} is not empty and holds no set of samples; choose a new folder.")


def add_call_flags(parser):
    """The flags of a call of the pipeline; what is not given is what its makers recommend."""
    default = "the pipeline's own if not given"
    parser.add_argument(
        "--num_inference_steps", type=integer(at_least=1, at_most=100_000), help=f"Sampler steps; {default}."
    )
    parser.add_argument("--guidance_scale", type=GUIDANCE, help=f"Classifier-free guidance, at most 1000; {default}.")
    parser.add_argument(
        "--guidance_channels", type=integer(at_least=1), help=f"Guided channels, 3 in the paper; {default}."
    )
    parser.add_argument(
        "--guidance_interval",
        type=real(at_least=0, at_most=1),
        nargs=2,
        help=f"Part of the steps that is guided; {default}.",
    )


def add_seed_flag(parser, help):
    """The seed, a whole number that JSON and every generator hold."""
    parser.add_argument("--seed", type=integer(at_least=0, at_most=2**63 - 1), default=0, help=help)


def call_settings(pipe, args):
    """What the pipeline is called with: the flags, and its own settings for those that are not given."""
    names = ("num_inference_steps", "guidance_scale", "guidance_channels", "guidance_interval")
    return check_sampling(pipe, **{name: getattr(args, name) for name in names})


def load_pipeline(args, device):
    """The pipeline that the flags name, with their scheduler and decoder."""
    pipe = DiTClassCondPipeline.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
    if args.vae is not None:
        pipe.register_modules(vae=load_autoencoder(args.vae))
    if args.scheduler is not None:
        pipe.scheduler = make_scheduler(args.scheduler, **trained_options(args.scheduler, pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def asked_labels(args, pipe, count):
    """Class ids of the samples."""
    if args.labels in LABEL_POLICIES:
        return sample_labels(args.labels, count, pipe.transformer.config.num_classes, args.seed)
    from ..data.images import check_column, load_image_dataset
    from ..evaluation.sources import dataset_labels

    dataset = load_image_dataset(args.labels, "test", holdout=args.holdout)
    check_column(dataset, "label", "--labels")
    names = dataset_labels(dataset)
    if names is None:
        raise ValueError(f"--labels {args.labels}: its images have no classes, or not all of them.")
    classes = sorted(set(names))
    ids = dict(zip(classes, pipe.get_label_ids(classes), strict=True))
    # Shuffled, or a part of them would hold the first classes only.
    order = torch.randperm(len(names), generator=seeded_generator(args.seed, 2)).tolist()
    return torch.tensor([ids[names[order[index % len(names)]]] for index in range(count)])


def print_cost(args, pipe, settings, num_processes):
    """Compute and hours, by two timed steps."""
    labels = asked_labels(args, pipe, args.batch_size)
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        short = pipe(labels.tolist(), **settings | {"num_inference_steps": 2}, output_type="latent")
        short.images.sum().item()  # waits for a GPU
        seconds = (time.perf_counter() - started) / pipe.num_timesteps / args.batch_size
    first, last = settings["guidance_interval"]
    predictions = 1 + (last - first if largest_scale(settings["guidance_scale"]) != 1 else 0)
    pipe.scheduler.set_timesteps(settings["num_inference_steps"])
    evaluations = len(pipe.scheduler.timesteps)  # two per step for Heun's
    gflops = count_macs(pipe.transformer.config) / 1e9 * evaluations * predictions
    hours = seconds * evaluations * args.num_samples / num_processes / 3600
    cost = {"Gflops an image": round(gflops, 2), "images": args.num_samples, "hours": round(hours, 2)}
    print(json.dumps(cost, indent=2))


def main():
    args = parse_args()
    accelerator = start_accelerator()
    generate(args, accelerator)
    accelerator.end_training()


def generate(args, accelerator):
    """The set of samples that the flags ask for, or what it would cost."""
    pipe = load_pipeline(args, accelerator.device)
    settings = call_settings(pipe, args)
    if args.dry_run:
        if accelerator.is_main_process:
            print_cost(args, pipe, settings, accelerator.num_processes)
        return
    labels = asked_labels(args, pipe, args.num_samples)
    classes = pipe.transformer.config.num_classes
    if args.labels == "balanced" and args.num_samples < classes and accelerator.is_main_process:
        given = f"{args.num_samples} samples are of the first {args.num_samples} of {classes} classes"
        print(f"{given}; --labels random, or a dataset, chooses others.", file=sys.stderr)
    recipe = make_recipe(args, pipe, labels, settings)
    if accelerator.is_main_process:
        check_recorded(args, recipe)  # what is refused is refused before the lock, which writes
    with lock_folder(args.output_dir) if accelerator.is_main_process else nullcontext():
        sample(args, accelerator, pipe, labels, settings, recipe)


def make_recipe(args, pipe, labels, settings):
    """All that the images depend on, and a mark of it for each image."""
    recipe = {name: value for name, value in vars(args).items() if name not in ("dry_run", "output_dir")}
    recipe |= settings | {"label_ids": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]}
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    recipe |= {"scheduler": type(pipe.scheduler).__name__, "scheduler_config": config}
    recipe |= {"dtype": str(pipe.transformer.dtype), "weights": checksum(pipe.transformer)[:16]}
    recipe["guidance"] = guidance_kind(pipe, settings["guidance_scale"])
    if pipe.guider is not None:
        recipe["guider"] = {name: value for name, value in pipe.guider.config.items() if not name.startswith("_")}
    recipe["vae_weights"] = checksum(pipe.vae)[:16] if pipe.vae is not None else None
    recipe["classes"] = {str(label): name for label, name in pipe.id2label.items()}
    fixed = {name: value for name, value in recipe.items() if name not in MAY_CHANGE}
    recipe["mark"] = hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()[:16]
    recipe["versions"] = {name: version(name) for name in ("dit_hf", "torch", "diffusers")}
    return recipe


def guidance_kind(pipe, scale):
    """What guidance takes the difference to, or why there is none."""
    kind = "away from the null class" if pipe.guide is None else "away from a guide"
    if pipe.guider is not None:
        return f"{kind} by {type(pipe.guider).__name__}"
    if scale != 1:
        return kind
    return "in the weights" if pipe._guidance_in_weights else "none"


def check_recorded(args, recipe):
    """Checks that the folder holds no set of other settings, or of an older version."""
    file = args.output_dir / RECIPE
    check_same_settings(file, recipe, MAY_CHANGE)
    if file.exists() and "mark" not in read_json(file):
        raise ValueError(f"{file} was not written by this version; choose a new --output_dir.")


def sample(args, accelerator, pipe, labels, settings, recipe):
    """All images that are not there yet, each process its part; then the npz."""
    folder, file = args.output_dir / "images", args.output_dir / RECIPE
    missing, is_new = [], not file.exists()
    if accelerator.is_main_process:
        missing = missing_samples(folder, args.num_samples, recipe["mark"])
        if missing:  # a complete set keeps the versions that generated it
            record_settings(file, recipe)
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
    (missing,) = broadcast_object_list([missing])
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=len(mine), desc="samples", mininterval=5, disable=not accelerator.is_main_process)
    try:
        for count in generate_samples(
            pipe, labels, mine, folder, recipe["mark"], args.seed, args.batch_size, args.rounding, **settings
        ):
            progress.update(count)
    except BaseException:
        if is_new and accelerator.is_main_process and not any(folder.iterdir()):
            folder.rmdir()
            file.unlink()  # or other flags would be refused for a set that was never begun
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(args, labels, recipe, len(missing))


def finish(args, labels, recipe, new):
    """Writes the npz, and records the hash of its pixels, which tells that they belong to the recipe."""
    path, file = args.output_dir / SAMPLES, args.output_dir / RECIPE
    write_npz(args.output_dir / "images", labels, path)
    record_settings(file, read_json(file) | {"pixels": ImageSource(path).digest()})
    print(f"{args.num_samples} images, {new} of them new: {path}")


if __name__ == "__main__":
    run(main)
