#!/usr/bin/env python
"""Samples a pipeline with the class counts of a held-out split and reports Fréchet distance and class agreement.

    python examples/evaluate/evaluate_pipeline.py --pipeline emoji64 --dataset_name outputs/emoji64

Expected: four minutes on 2 cores for the bundled model; the figures are in its model card.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.command_line import run
from dit_hf.data.images import load_image_dataset, stack_images
from dit_hf.evaluation.extractors import extract, load_extractor
from dit_hf.evaluation.frechet import frechet_distance
from dit_hf.evaluation.metrics import gaussian
from dit_hf.evaluation.probe import class_agreement, train_probe
from dit_hf.evaluation.samples import sample_images


def distinct(images, others):
    """Indices of the images that are neither blank nor, to the byte, among the others."""
    known = {image.numpy().tobytes() for image in others}
    return [i for i, image in enumerate(images) if image.min() < 255 and image.numpy().tobytes() not in known]


def same_classes(labels, pool, generator):
    """Indices into a pool of labels, drawn without replacement so that classes occur as often as in `labels`."""
    chosen = []
    for label, count in zip(*labels.unique(return_counts=True), strict=True):
        members = (pool == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def evaluate(pipe, args):
    """All figures of one pipeline, with real images measured the same way as the floor."""
    resolution = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    splits = {name: load_image_dataset(args.dataset_name, name) for name in ("train", "test")}
    real = {name: stack_images(split, resolution) for name, split in splits.items()}
    labels = {name: torch.tensor(split["label"]) for name, split in splits.items()}
    generator = torch.Generator().manual_seed(args.seed)
    usable = torch.tensor(distinct(real["test"], real["train"]))
    chosen = usable[torch.randperm(len(usable), generator=generator)[: args.num_images]]
    held_out, asked = real["test"][chosen], labels["test"][chosen]
    floor_images = real["train"][same_classes(asked, labels["train"], generator)]

    extractor = load_extractor("efficientnet-lite0", resolution=args.feature_resolution)
    seen = {
        name: extract(images, extractor).features for name, images in (("held out", held_out), ("floor", floor_images))
    }
    ids = torch.tensor(pipe.get_label_ids(splits["test"].features["label"].names))
    samples = sample_images(
        pipe,
        ids[asked],
        args.seed,
        args.batch_size,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
    )
    seen["samples"] = extract(samples, extractor).features
    probe = train_probe(extract(real["train"], extractor).features, labels["train"])
    reference = gaussian(seen["held out"])
    return {
        "fd": frechet_distance(gaussian(seen["samples"]), reference),
        "fd_real_vs_real": frechet_distance(gaussian(seen["floor"]), reference),
        "class_agreement": class_agreement(probe, seen["samples"], asked),
        "class_agreement_of_held_out_images": class_agreement(probe, seen["held out"], asked),
        "recipe": {
            "pipeline": str(args.pipeline),
            "vae": type(pipe.vae).__name__,
            "dtype": str(pipe.transformer.dtype),
            "num_images": len(chosen),
            "extractor": extractor.description,
            "scheduler": type(pipe.scheduler).__name__,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "guidance_channels": "all",
            "labels": "the held-out split's own",
            "seed": args.seed,
            "versions": {name: version(name) for name in ("dit_hf", "torch", "diffusers", "scikit-learn")},
        },
    }


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", default="emoji64", help="Folder of a pipeline, or the name of a bundled one.")
    parser.add_argument("--dataset_name", required=True, help="Dataset with a train and a test split.")
    parser.add_argument("--num_images", type=int, default=1008, help="Held-out images, and as many samples.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Classifier-free guidance.")
    parser.add_argument("--scheduler", help="Recipe of `make_scheduler` instead of the pipeline's own.")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="Sampler steps.")
    parser.add_argument("--feature_resolution", type=int, default=112, help="Pixels a side the extractor sees.")
    parser.add_argument("--batch_size", type=int, default=48, help="Images sampled at once.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples and of the choice of images.")
    parser.add_argument("--output", type=Path, help="JSON file for the result.")
    return parser.parse_args()


def main():
    args = parse_args()
    is_folder = Path(args.pipeline).is_dir()
    load = DiTClassCondPipeline.from_pretrained if is_folder else DiTClassCondPipeline.from_bundled
    pipe = load(args.pipeline)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler:
        pipe.scheduler = make_scheduler(args.scheduler)
    result = json.dumps(evaluate(pipe, args), indent=2)
    print(result)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(result + "\n")


if __name__ == "__main__":
    run(main)
