#!/usr/bin/env python
"""Figures of a set of samples against a reference set: FID, sFID, Inception Score, KID, precision, recall and more.

    python examples/evaluate/compute_metrics.py --samples outputs/samples/samples.npz --reference outputs/emoji64 \
        --training outputs/emoji64 --metrics fid,sfid,is,kid,precision,recall,accuracy --output outputs/metrics.json

Expected: three minutes for a thousand images on 2 cores, most of it for the intervals (--bootstrap). Features are kept in
--cache_dir by the content of the images. With --training also the same figures of as many training images, which no
model need surpass, and whether samples are copies.
"""

import argparse
import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult
from tqdm import tqdm

from dit_hf import DiTClassCondPipeline
from dit_hf.command_line import run
from dit_hf.evaluation.extractors import INCEPTION, PRECOMPUTED, Features, extract, load_extractor
from dit_hf.evaluation.metrics import METRICS, check_metrics, compute_metrics
from dit_hf.evaluation.sets import nearest_neighbours
from dit_hf.evaluation.sources import (
    ImageSource,
    open_npz,
    reference_statistics,
    sampling_recipe,
    save_statistics,
)
from dit_hf.hub import CardFacts, publish_folder, write_card
from dit_hf.hub.model_card import PIPELINE_TAG
from dit_hf.seeds import seeded_generator


NAMES = {"fid": "Fréchet distance", "sfid": "spatial Fréchet distance", "is": "Inception Score", "kid": "KID"}
NAMES |= {"accuracy": "class accuracy of a linear probe"}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    source = "an .npz of images, a folder of pictures, a dataset, or with `precomputed` a .safetensors of features"
    parser.add_argument("--samples", required=True, help=source.capitalize() + ".")
    parser.add_argument("--reference", required=True, help=f"{source.capitalize()}; or ADM's .npz of statistics.")
    parser.add_argument("--split", default="test", help="Of a dataset that is samples or reference.")
    parser.add_argument("--image_column", default="image", help="Of a dataset.")
    parser.add_argument(
        "--resolution", type=int, help="Pixels a side to crop pictures of folders and datasets to, as training does."
    )
    parser.add_argument(
        "--feature_extractor", default="efficientnet-lite0", help="Or inception, a vision model, precomputed."
    )
    parser.add_argument("--extractor_weights", type=Path, help="TensorFlow-ported weights for inception.")
    parser.add_argument("--metrics", default="fid,sfid,is,kid,precision,recall", help=f"Of {', '.join(METRICS)}.")
    parser.add_argument("--bootstrap", type=int, default=10, help="Redrawn sets for the intervals; 0 for none.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images at once.")
    parser.add_argument("--seed", type=int, default=0, help="Of the redrawn sets.")
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/features"), help="Where features are kept.")
    parser.add_argument("--training", help="Images the model was trained on; of a dataset the train split.")
    parser.add_argument("--save_statistics", type=Path, help="Write the reference's statistics, as ADM's .npz.")
    parser.add_argument("--output", type=Path, help="JSON file for the result.")
    parser.add_argument("--update_card", type=Path, help="Pipeline folder whose model card gets the figures.")
    parser.add_argument("--dataset_title", default="held-out images", help="What the card calls the reference.")
    parser.add_argument("--push_to_hub", action="store_true", help="Publish that folder.")
    parser.add_argument("--hub_model_id", help="Repository; the folder's name if not given.")
    args = parser.parse_args()
    if args.resolution is not None and args.resolution < 1:
        parser.error(f"--resolution {args.resolution} is no number of pixels")
    if args.push_to_hub and args.update_card is None:
        parser.error("--push_to_hub publishes the folder of --update_card")
    if "accuracy" in args.metrics and args.training is None:
        parser.error("accuracy needs --training, the images that its probe learns from")
    return args


def features_of(source, split, extractor, args):
    """Features of an image source, from the cache where its images have been seen by the same extractor."""
    if extractor is None:
        return Features.load(source)
    images = ImageSource(source, split, args.image_column, args.resolution)
    path = args.cache_dir / f"{images.digest()[:24]}-{extractor.description['weights']}.safetensors"
    if not path.exists() or (features := Features.load(path)).extractor != extractor.description:
        batches = tqdm(images.batches(args.batch_size), desc=f"features of {source}", mininterval=5)
        features = Features.join([extract(batch, extractor) for batch in batches])
        features.save(path)
    features.labels = images.labels()
    return features


def open_reference(args, extractor, made_by):
    """Statistics in the reference file, if they are of the samples' extractor, and features; each None if not there."""
    if Path(args.reference).suffix != ".npz" or (given := reference_statistics(args.reference)) is None:
        return None, features_of(args.reference, args.split, extractor, args)
    statistics, with_extractor = given
    with open_npz(args.reference) as archive:
        has_images = "arr_0.npy" in archive.namelist() and extractor is not None
    features = features_of(args.reference, args.split, extractor, args) if has_images else None
    # ADM's files name no extractor; theirs is Inception.
    known = made_by["name"] in (INCEPTION, PRECOMPUTED) if with_extractor is None else with_extractor == made_by
    if not known and features is None:
        name = with_extractor or f"{INCEPTION} (the file names none, as ADM's)"
        raise ValueError(f"{args.reference} has statistics of {name}, not of {made_by}.")
    return statistics if known else None, features


def figures_of(samples, metrics, references, training=None, bootstrap=0, seed=0):
    """Metrics, Fréchet distances by the reference's statistics where it has them, the others by its images."""
    statistics, features = references
    frechet = [name for name in metrics if name in ("fid", "sfid") and statistics is not None]
    others = [name for name in metrics if name not in frechet]
    found = compute_metrics(samples, statistics, frechet, bootstrap, seed)
    found |= compute_metrics(samples, features or statistics, others, bootstrap, seed, training)
    return {name: found[name] for name in metrics}


def like(samples, training, seed):
    """As many training images as there are samples, of the same classes where they are known."""
    order = torch.randperm(len(training.features), generator=seeded_generator(seed)).tolist()
    if samples.labels is None or training.labels is None:
        return training.select(torch.tensor(order[: len(samples.features)]))
    if unknown := sorted(set(samples.labels) - set(training.labels)):
        raise ValueError(f"No training image is of class {unknown[0]!r}, which samples are of.")
    wanted, chosen = Counter(samples.labels), []
    for row in order:
        if wanted[training.labels[row]] > 0:
            wanted[training.labels[row]] -= 1
            chosen.append(row)
    return training.select(torch.tensor(chosen))


def copies(samples, reference, training):
    """Samples as near to a training image as the nearest hundredth of images the model has not seen, and the nearest."""
    distances, indices = nearest_neighbours(samples.features, training.features)
    nearest = distances.argsort(stable=True)[:5].tolist()
    found = {"nearest": [{"sample": i, "training": int(indices[i]), "distance": float(distances[i])} for i in nearest]}
    found["median"] = distances.median().item()
    if reference is not None:
        unseen, _ = nearest_neighbours(reference.features, training.features)
        found["median of the reference"] = unseen.median().item()
        found["share of suspects"] = (distances <= unseen.quantile(0.01)).double().mean().item()
    return found


def public(recipe):
    """A recipe without the folders of this machine, and without what the model itself tells."""
    if isinstance(recipe, dict):
        return {name: public(value) for name, value in recipe.items() if name not in ("scheduler_config", "classes")}
    if not isinstance(recipe, str):
        return recipe
    is_path = Path(recipe).is_absolute() or recipe.count("/") > 1 or Path(recipe).exists()
    return Path(recipe).name if recipe and is_path else recipe


def update_card(args, figures, recipe):
    """The figures, each with the recipe it was made by, on a pipeline's model card; and on the Hub if asked."""
    pipe = DiTClassCondPipeline.from_pretrained(args.update_card)
    results = []
    for name, figure in figures.items():
        if "value" in figure:
            result = EvalResult(PIPELINE_TAG, "images", args.dataset_title, name, float(f"{figure['value']:.6g}"))
            result.metric_name = f"{NAMES.get(name, name)} ({public(recipe['extractor'].get('name'))})"
            result.metric_args = public(recipe)
            results.append(result)
    facts = CardFacts(results=results)
    print(f"Card: {write_card(pipe, args.update_card, facts=facts)}", file=sys.stderr)
    if args.push_to_hub:
        place = publish_folder(args.update_card, args.hub_model_id or args.update_card.resolve().name, pipe, facts)
        print(f"Published: {place}", file=sys.stderr)


def measure(args, metrics):
    """All figures, and the recipe they were made by."""
    extractor = None
    if args.feature_extractor != PRECOMPUTED:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        extractor = load_extractor(args.feature_extractor, args.extractor_weights).to(device)
    samples = features_of(args.samples, args.split, extractor, args)
    references = open_reference(args, extractor, samples.extractor)
    reference = references[1]
    if args.save_statistics and reference is None:
        raise ValueError(f"--save_statistics: {args.reference} is a file of statistics already.")
    training = features_of(args.training, "train", extractor, args) if args.training else None
    if training and training.extractor != samples.extractor:
        raise ValueError(f"--training {args.training} was seen by {training.extractor}, not {samples.extractor}.")
    real = like(samples, training, args.seed) if training else None

    figures = figures_of(samples, metrics, references, training, args.bootstrap, args.seed)
    if training:
        without_probe = [name for name in metrics if name != "accuracy"]
        figures["training images"] = {"count": len(real.features)} | figures_of(real, without_probe, references)
        figures["nearest training image"] = copies(samples, reference, training)
        if "accuracy" in metrics and reference is not None and reference.labels:
            figures["reference"] = figures_of(reference, ["accuracy"], references, training)
    if args.save_statistics:
        save_statistics(reference, args.save_statistics)
    recipe = {
        "samples": str(args.samples),
        "num_samples": len(samples.features),
        "reference": str(args.reference),
        "num_reference": "statistics" if reference is None else len(reference.features),
        "training": args.training,
        "split": args.split,
        "resolution": args.resolution,
        "extractor": samples.extractor,
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "sampling": sampling_recipe(args.samples),
        "versions": {name: version(name) for name in ("dit_hf", "torch", "numpy")},
    }
    return figures, recipe


def main():
    args = parse_args()
    metrics = [name.strip() for name in args.metrics.split(",")]
    check_metrics(metrics, args.bootstrap)
    if args.update_card and not (args.update_card / "model_index.json").exists():
        raise ValueError(f"--update_card {args.update_card} is no pipeline folder.")
    try:
        figures, recipe = measure(args, metrics)
    except ValueError as error:
        raise ValueError(f"--samples {args.samples} with --reference {args.reference}: {error}") from error
    result = json.dumps(figures | {"recipe": recipe}, indent=2, ensure_ascii=False)
    print(result)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = args.output.with_name(f"partial-{args.output.name}")
        partial.write_text(result + "\n")
        partial.replace(args.output)
    if args.feature_extractor != PRECOMPUTED:
        print(f"Features: {args.cache_dir}", file=sys.stderr)
    if args.update_card:
        update_card(args, figures, recipe)


if __name__ == "__main__":
    run(main)
