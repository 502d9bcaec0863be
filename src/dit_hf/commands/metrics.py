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

from ..command_line import ArgumentParser, integer, names, print_text, real, run
from ..evaluation.accuracy import check_classes
from ..evaluation.cards import card_results
from ..evaluation.extractors import PRECOMPUTED, Features, load_extractor
from ..evaluation.feature_cache import image_features
from ..evaluation.frechet_ratio import RATIO, check_same_sets, mean_ratio, read_ratio
from ..evaluation.metrics import (
    METRICS,
    Available,
    check_metrics,
    check_same_size,
    default_metrics,
    find_metrics,
    full_names,
    too_few_images,
)
from ..evaluation.protocol import protocol_line
from ..evaluation.reference import reference_statistics, save_statistics
from ..evaluation.result_table import result_table
from ..evaluation.samples import check_recipe, sampling_recipe
from ..evaluation.sources import ImageSource
from ..evaluation.training_images import evaluate
from ..files import check_apart, check_folder, check_links, check_writable, printable, writing
from ..hub import CardFacts, publish_folder, write_card
from ..hub.model_card import PIPELINE_TAG
from ..pipeline import DiTClassCondPipeline


# The names of an image in a pair of neighbours, and of its set.
PAIR = {"sample": "samples", "training": "training"}


def parse_args(flags=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    source = "an .npz of images, a folder of images, a dataset, or with `precomputed` a .safetensors of features"
    parser.add_argument("--samples", required=True, help=source.capitalize() + ".")
    parser.add_argument("--reference", required=True, help=f"{source.capitalize()}; or ADM's .npz of statistics.")
    parser.add_argument("--training", help="Images that the model was trained on; for a dataset the train split.")
    parser.add_argument("--split", default="test", help="Split of a dataset that is passed as samples or reference.")
    parser.add_argument(
        "--holdout",
        type=real(at_least=0, below=1),
        default=0.0,
        help="Fraction that is the test split, for a dataset with one split.",
    )
    parser.add_argument("--image_column", default="image", help="Column with images, for a dataset.")
    parser.add_argument(
        "--resolution",
        type=integer(at_least=1, at_most=8192),
        help="Pixels per side to crop all images to, as training does; by default no crop.",
    )
    parser.add_argument(
        "--feature_extractor",
        default="efficientnet-lite0",
        help="efficientnet-lite0, efficientnet-lite2, inception, a vision model of transformers (id or folder), or "
        "precomputed.",
    )
    parser.add_argument("--extractor_weights", type=Path, help="TensorFlow-ported weights for inception.")
    metric_names = ", ".join(metric.full_name("EXTRACTOR") for metric in METRICS)
    defaults = ", ".join(metric.name for metric in METRICS if metric.default)
    parser.add_argument(
        "--metrics",
        type=names,
        help=f"Metrics, separated by commas: {metric_names}; with inception also fid. By default {defaults}, as far "
        "as the extractor and the reference allow.",
    )
    parser.add_argument(
        "--bootstrap",
        type=integer(at_least=0, at_most=10_000),
        default=10,
        help="Resampled sets for the intervals; 0 for none.",
    )
    parser.add_argument("--batch_size", type=integer(at_least=1, at_most=2**16), default=64, help="Images per batch.")
    parser.add_argument(
        "--seed", type=integer(at_least=0, at_most=2**63 - 1), default=0, help="Seed of the resampled sets."
    )
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/features"), help="Folder for cached features.")
    parser.add_argument(
        "--save_statistics", type=Path, help="Write the statistics of the reference in ADM's .npz format."
    )
    parser.add_argument(
        "--fdr_results",
        type=Path,
        nargs="+",
        default=[],
        help=f"Results (--output) of other extractors for the same sets, with {RATIO}: adds the mean of all.",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the result.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON instead of a table.")
    parser.add_argument("--update_card", type=Path, help="Pipeline folder whose model card gets the metrics.")
    parser.add_argument("--dataset_title", default="held-out images", help="What the card calls the reference.")
    parser.add_argument("--push_to_hub", action="store_true", help="Publish that folder.")
    parser.add_argument("--hub_model_id", help="Repository of --push_to_hub; by default the name of the folder.")
    args = parser.parse_args(flags)
    if args.push_to_hub and args.update_card is None:
        parser.error("--push_to_hub publishes the folder of --update_card")
    if args.hub_model_id is not None and not args.push_to_hub:
        parser.error("--hub_model_id has no effect without --push_to_hub")
    if args.fdr_results and RATIO not in (args.metrics or ()):
        parser.error(f"--fdr_results has no effect without {RATIO} among --metrics")
    check_outputs(args)
    return args


def check_outputs(args):
    """Refuses what can't be written, or would change what is read, before any work."""
    sources = [source for source in (args.samples, args.reference, args.training) if source]
    outputs = {"--output": args.output, "--save_statistics": args.save_statistics, "--cache_dir": args.cache_dir}
    for flag, path in outputs.items():
        if path is None:
            continue
        if flag != "--cache_dir" and path.is_dir():
            raise ValueError(f"{flag} {path} is a folder; it must name a file.")
        check_folder(path, flag) if flag == "--cache_dir" else check_writable(path)
        for source in sources:
            check_apart(path, source, flag)
    if args.output and args.save_statistics and args.output.resolve() == args.save_statistics.resolve():
        raise ValueError(f"--output and --save_statistics are both {args.output}; name two files.")
    if args.update_card is not None:
        if not (args.update_card / "model_index.json").is_file():
            raise ValueError(f"--update_card {args.update_card} is not a pipeline folder: it has no model_index.json.")
        check_links(args.update_card, "README.md")


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
        for part in statistics.parts.values():
            try:
                part.root()  # kept for the distances
            except ValueError as error:
                raise ValueError(f"{args.reference}: {error}") from None
        return statistics, use_images
    if not use_images:
        whose = statistics.extractor or "inception (the file names none, as ADM's)"
        raise ValueError(f"{args.reference} has statistics of {whose}, not of {description}.")
    return None, True


def read_images(args, sources, statistics, labelled):
    """Reads every set once: names what is skipped, and checks sizes and classes before the extractor's work."""
    for source in sources.values():
        source.digest()
    sizes = {name: source.image_size for name, source in sources.items()}
    for name, size in (sizes | {"statistics": statistics and statistics.image_size}).items():
        check_same_size(sizes["samples"], name, size)
    if args.resolution is None:
        check_recipe(args.samples, sources["samples"].count, sources["samples"].digest())
    for name, source in sources.items():
        for reason in list(source.skipped.values())[:5]:
            print(printable(f"Skipped in {name} {source.source}: {reason}"), file=sys.stderr)
        if len(source.skipped) > 5:
            print(printable(f"Skipped in {name} {source.source}: {len(source.skipped)} images"), file=sys.stderr)
    labels = {name: sources[name].labels() for name in sources if name in labelled}
    if labels.get("samples") and labels.get("training"):
        check_classes(labels["samples"], labels["training"], "training")
    return labels


def read_features(args, extractor, sources, labels):
    """Features of every set, with class names where they are known."""
    features = {
        name: image_features(source, extractor, args.cache_dir, args.batch_size) for name, source in sources.items()
    }
    for name, classes in labels.items():
        features[name].labels = classes
    return features


def select_computable(args, names, extractor, counts):
    """The metrics that there are enough images for; those that were asked for must be."""
    if counts.get("training", 2) < 2:
        raise ValueError("--training holds one image; at least 2 are needed.")
    reasons = too_few_images(names, extractor, counts)
    for name, reason in reasons.items():
        if args.metrics:
            raise ValueError(f"{name} {reason}.")
        print(f"Omitted: {name} {reason}.", file=sys.stderr)
    if len(reasons) == len(names):
        raise ValueError("There are too few images for any metric; --metrics NAME says what one needs.")
    return [name for name in names if name not in reasons]


def check_labelled(rows, names, labels):
    """Refuses metrics that need classes which are not known."""
    for name, row in zip(names, rows, strict=True):
        if row.labels and any(labels[set_] is None for set_ in ("samples", row.against)):
            raise ValueError(f"{name} needs the class of every image of the samples and of the {row.against}.")
        if row.labels:
            check_classes(labels["samples"], labels[row.against], row.against)


def open_extractor(args):
    """The extractor, None for features computed elsewhere, with its description and the parts that it gives."""
    if args.feature_extractor == PRECOMPUTED:
        samples = Features.load(args.samples)
        return None, samples.extractor, samples.parts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor(args.feature_extractor, args.extractor_weights).to(device)
    return extractor, extractor.description, extractor.parts


def choose_metrics(args, description, parts):
    """The metrics by full names, the reference's statistics if there are any, and whether its images are used."""
    statistics, use_images = open_statistics(args, description)
    available = Available(parts, use_images, tuple(statistics.parts) if statistics else (), bool(args.training))
    names = full_names(args.metrics or (), description["name"]) or default_metrics(description["name"], available)
    check_metrics(names, description["name"], available, args.bootstrap)
    return names, statistics, use_images


def measure(args):
    """All metrics, and the recipe they were computed by."""
    extractor, description, parts = open_extractor(args)
    recipe = asked_recipe(args, description)
    ratios = [read_ratio(path) for path in args.fdr_results]
    check_same_sets([recipe, *(result["recipe"] for result in ratios)])
    names, statistics, use_images = choose_metrics(args, description, parts)
    if args.save_statistics and not use_images:
        raise ValueError(f"--save_statistics: {args.reference} is a file of statistics already.")
    sets = open_sets(args, extractor, use_images)
    skipped = {}
    if extractor is None:
        names = select_computable(
            args, names, description["name"], {name: len(part.features) for name, part in sets.items()}
        )
    else:
        if args.holdout and not any(source.is_dataset for source in sets.values()):
            raise ValueError(f"--holdout {args.holdout} has no effect: none of the sets is a dataset.")
        rows = find_metrics(names, description["name"])
        # Classes are read where they are needed, and to choose training images of the samples' classes.
        needed = {"samples", "reference", "training"} if any(row.labels for row in rows) else set()
        labels = read_images(args, sets, statistics, needed | ({"samples", "training"} if args.training else set()))
        check_labelled(rows, names, labels)
        names = select_computable(
            args, names, description["name"], {name: source.count for name, source in sets.items()}
        )
        skipped = {name: source.skipped for name, source in sets.items()}
        sets = read_features(args, extractor, sets, labels)
    reference, training = sets.get("reference"), sets.get("training")
    found = evaluate(sets["samples"], reference, names, args.bootstrap, args.seed, training, statistics)
    for pair in found.get("nearest training image", {}).get("nearest", ()):
        pair |= {name: position(pair[name], skipped.get(source, ())) for name, source in PAIR.items()}
    if args.save_statistics:
        save_statistics(reference, args.save_statistics)
    rows = find_metrics(names, description["name"])
    recipe |= {
        "num_samples": len(sets["samples"].features),
        "num_reference": "statistics" if reference is None else len(reference.features),
        "statistics": "file" if statistics else "images",
        "skipped": {name: len(images) for name, images in skipped.items()},
        "settings": {name: row.settings for name, row in zip(names, rows, strict=True) if row.settings},
    }
    if ratios:
        found["mean fdr"] = mean_ratio([found | {"recipe": recipe}, *ratios])
    return found, recipe


def asked_recipe(args, description):
    """What is known of the recipe before any image is read."""
    return {
        "samples": args.samples,
        "reference": args.reference,
        "training": args.training,
        "split": args.split,
        "holdout": args.holdout,
        "resolution": args.resolution,
        "extractor": description,
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "sampling": {name: value for name, value in sampling_recipe(args.samples).items() if name != "classes"},
        "versions": {name: version(name) for name in ("dit_hf", "torch", "numpy")},
    }


def position(row, skipped):
    """The place in a set of the image that a row of features is of."""
    for image in sorted(skipped):
        row += image <= row
    return row


def update_card(args, found, recipe, protocol):
    """The metrics on a pipeline's model card; and on the Hub if asked."""
    pipe = DiTClassCondPipeline.from_pretrained(args.update_card)
    metrics = {name: result for name, result in found.items() if "value" in result}
    facts = CardFacts(results=card_results(metrics, recipe, args.dataset_title, PIPELINE_TAG, protocol))
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
    protocol = protocol_line(recipe)
    result = json.dumps(found | {"protocol": protocol, "recipe": recipe}, indent=2, ensure_ascii=False)
    if args.output:
        with writing(args.output) as partial:
            partial.write_text(result + "\n", "utf-8")
    print_text(result if args.json else f"{result_table(found, recipe['extractor']['name'])}\n\n{protocol}")
    if args.feature_extractor != PRECOMPUTED:
        print(f"Features: {args.cache_dir}", file=sys.stderr)
    if args.update_card:
        update_card(args, found, recipe, protocol)


if __name__ == "__main__":
    run(main)
