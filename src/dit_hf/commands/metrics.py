"""Computes FID, Inception Score, KID, precision, recall and other metrics of a set of samples against a reference.

    dit-hf metrics --samples outputs/samples/samples.npz --reference outputs/emoji64 --training outputs/emoji64 \
        --output outputs/metrics.json

Expected: three minutes for a thousand images on 2 cores, most of it for the intervals (--bootstrap). Features are kept
in --cache_dir by the content of the images. With --training the result also has the same metrics of as many training
images, which are what a perfect model would reach, and tells whether samples are copies.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from ..command_line import ArgumentParser, run
from ..evaluation.cards import card_results
from ..evaluation.extractors import PRECOMPUTED, Features, load_extractor
from ..evaluation.feature_cache import image_features
from ..evaluation.metrics import METRICS, Available, check_metrics, check_same_size, default_metrics
from ..evaluation.reference import reference_statistics, save_statistics
from ..evaluation.samples import sampling_recipe
from ..evaluation.sources import ImageSource
from ..evaluation.training_images import evaluate
from ..hub import CardFacts, publish_folder, write_card
from ..hub.model_card import PIPELINE_TAG
from ..pipeline import DiTClassCondPipeline


# The names of an image in a pair of neighbours, and of its set.
PAIR = {"sample": "samples", "training": "training"}


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    source = "an .npz of images, a folder of images, a dataset, or with `precomputed` a .safetensors of features"
    parser.add_argument("--samples", required=True, help=source.capitalize() + ".")
    parser.add_argument("--reference", required=True, help=f"{source.capitalize()}; or ADM's .npz of statistics.")
    parser.add_argument("--training", help="Images the model was trained on; of a dataset the train split.")
    parser.add_argument("--split", default="test", help="Of a dataset that is samples or reference.")
    parser.add_argument(
        "--holdout", type=float, default=0.0, help="Of a dataset with one split, the fraction that is its test split."
    )
    parser.add_argument("--image_column", default="image", help="Of a dataset.")
    parser.add_argument(
        "--resolution", type=int, help="Pixels a side to crop all images to, as training does; none by default."
    )
    parser.add_argument(
        "--feature_extractor",
        default="efficientnet-lite0",
        help="Or `inception`, a vision model of transformers by id or folder, or `precomputed`.",
    )
    parser.add_argument("--extractor_weights", type=Path, help="TensorFlow-ported weights for inception.")
    titles = ", ".join(metric.full_name("EXTRACTOR") for metric in METRICS)
    parser.add_argument(
        "--metrics",
        help=f"Separated by commas, of {titles}; with inception fid, sfid, is, kid. By default those that the "
        "extractor and the reference allow, without density, coverage and accuracy.",
    )
    parser.add_argument("--bootstrap", type=int, default=10, help="Redrawn sets for the intervals; 0 for none.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a batch.")
    parser.add_argument("--seed", type=int, default=0, help="Of the redrawn sets.")
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/features"), help="Where features are kept.")
    parser.add_argument("--save_statistics", type=Path, help="Write the reference's statistics, as ADM's .npz.")
    parser.add_argument("--output", type=Path, help="JSON file for the result.")
    parser.add_argument("--update_card", type=Path, help="Pipeline folder whose model card gets the metrics.")
    parser.add_argument("--dataset_title", default="held-out images", help="What the card calls the reference.")
    parser.add_argument("--push_to_hub", action="store_true", help="Publish that folder.")
    parser.add_argument("--hub_model_id", help="Repository; the folder's name if not given.")
    args = parser.parse_args()
    if args.resolution is not None and args.resolution < 1:
        parser.error(f"--resolution {args.resolution} is no number of pixels")
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; it must be at least 1")
    if args.output is not None and args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; it must name a file such as metrics.json")
    if args.push_to_hub and args.update_card is None:
        parser.error("--push_to_hub publishes the folder of --update_card")
    if args.update_card and not (args.update_card / "model_index.json").exists():
        parser.error(f"--update_card {args.update_card} is no pipeline folder")
    return args


def open_sets(args, extractor, use_images):
    """Images (or with `precomputed` features) of the samples, the reference and the training images, by name."""
    places = {"samples": (args.samples, args.split)}
    if use_images:
        places["reference"] = (args.reference, args.split)
    if args.training:
        places["training"] = (args.training, "train")
    if extractor is None:
        return {name: Features.load(source) for name, (source, _) in places.items()}
    return {
        name: ImageSource(source, split, args.image_column, args.resolution, args.holdout)
        for name, (source, split) in places.items()
    }


def open_statistics(args, description):
    """The reference's statistics, None where there are none of this extractor, and whether its images can be used."""
    statistics = reference_statistics(args.reference) if Path(args.reference).suffix == ".npz" else None
    if statistics is None:
        return None, True
    use_images = statistics.has_images and args.feature_extractor != PRECOMPUTED
    if statistics.is_of(description):
        return statistics, use_images
    if not use_images:
        whose = statistics.extractor or "inception (the file names none, as ADM's)"
        raise ValueError(f"{args.reference} has statistics of {whose}, not of {description}.")
    return None, True


def read_features(args, extractor, sources, statistics, labelled):
    """Features of every set; those of `labelled` sets with class names where they are known."""
    for name, source in sources.items():
        source.digest()
        for reason in list(source.skipped.values())[:5]:
            print(f"Skipped in {name} {source.source}: {reason}", file=sys.stderr)
        if len(source.skipped) > 5:
            print(f"Skipped in {name} {source.source}: {len(source.skipped)} images in all", file=sys.stderr)
    sizes = {name: source.image_size for name, source in sources.items()}
    for name, size in (sizes | {"statistics": statistics and statistics.image_size}).items():
        check_same_size(sizes["samples"], name, size)
    features = {
        name: image_features(source, extractor, args.cache_dir, args.batch_size) for name, source in sources.items()
    }
    for name in labelled & set(sources):
        features[name].labels = sources[name].labels()
    return features


def measure(args):
    """All metrics, and the recipe they were computed by."""
    extractor = None
    if args.feature_extractor == PRECOMPUTED:
        samples = Features.load(args.samples)
        description, parts = samples.extractor, samples.parts
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        extractor = load_extractor(args.feature_extractor, args.extractor_weights).to(device)
        description, parts = extractor.description, extractor.parts
    statistics, use_images = open_statistics(args, description)
    if args.save_statistics and not use_images:
        raise ValueError(f"--save_statistics: {args.reference} is a file of statistics already.")
    available = Available(parts, use_images, tuple(statistics.parts) if statistics else (), bool(args.training))
    names = [name.strip() for name in args.metrics.split(",")] if args.metrics else None
    names = names or default_metrics(description["name"], available)
    rows = check_metrics(names, description["name"], available, args.bootstrap)
    sets = open_sets(args, extractor, use_images)
    skipped = {}
    if extractor is not None:
        # Classes are read where they are needed, and to choose training images of the samples' classes.
        needed = {"samples", "reference", "training"} if any(row.labels for row in rows) else set()
        labelled = needed | ({"samples", "training"} if args.training else set())
        sources, sets = sets, read_features(args, extractor, sets, statistics, labelled)
        skipped = {name: source.skipped for name, source in sources.items()}
    reference, training = sets.get("reference"), sets.get("training")
    found = evaluate(sets["samples"], reference, names, args.bootstrap, args.seed, training, statistics)
    for pair in found.get("nearest training image", {}).get("nearest", ()):
        pair |= {name: position(pair[name], skipped.get(source, ())) for name, source in PAIR.items()}
    if args.save_statistics:
        save_statistics(reference, args.save_statistics)
    recipe = {
        "samples": args.samples,
        "num_samples": len(sets["samples"].features),
        "reference": args.reference,
        "num_reference": "statistics" if reference is None else len(reference.features),
        "training": args.training,
        "split": args.split,
        "holdout": args.holdout,
        "resolution": args.resolution,
        "skipped": {name: len(images) for name, images in skipped.items()},
        "extractor": description,
        "settings": {name: row.settings for name, row in zip(names, rows, strict=True) if row.settings},
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "sampling": sampling_recipe(args.samples),
        "versions": {name: version(name) for name in ("dit_hf", "torch", "numpy")},
    }
    return found, recipe


def position(row, skipped):
    """The place in a set of the image that a row of features is of."""
    for image in sorted(skipped):
        row += image <= row
    return row


def update_card(args, found, recipe):
    """The metrics on a pipeline's model card; and on the Hub if asked."""
    pipe = DiTClassCondPipeline.from_pretrained(args.update_card)
    metrics = {name: result for name, result in found.items() if "value" in result}
    facts = CardFacts(results=card_results(metrics, recipe, args.dataset_title, PIPELINE_TAG))
    print(f"Card: {write_card(pipe, args.update_card, facts=facts)}", file=sys.stderr)
    if args.push_to_hub:
        place = publish_folder(args.update_card, args.hub_model_id or args.update_card.resolve().name, pipe, facts)
        print(f"Published: {place}", file=sys.stderr)


def main():
    args = parse_args()
    try:
        found, recipe = measure(args)
    except ValueError as error:
        raise ValueError(f"--samples {args.samples} with --reference {args.reference}: {error}") from error
    result = json.dumps(found | {"recipe": recipe}, indent=2, ensure_ascii=False)
    print(result)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = args.output.with_name(f"partial-{args.output.name}")
        partial.write_text(result + "\n", "utf-8")
        partial.replace(args.output)
    if args.feature_extractor != PRECOMPUTED:
        print(f"Features: {args.cache_dir}", file=sys.stderr)
    if args.update_card:
        update_card(args, found, recipe)


if __name__ == "__main__":
    run(main)
