#!/usr/bin/env python
"""All results of benchmarks/README.md, each a ratio to a baseline of the same run.

    python benchmarks/bench.py --output outputs/bench.json

Expected: two hours on 2 CPU cores, and as long again for `quality`; `--parts` picks some, `--quick` tries everything
in small in some minutes. A part that is done is written at once and replaces what the file held of it, but rows of
`quality` are kept and not generated again, if setting, weights, versions, samples and held-out images are the same.
Tables of all parts go to stdout at the end. Quality needs the held-out emoji of examples/train_autoencoder
(`--reference`). Runs on a GPU as it is (`--device cuda`).
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import networks
import sampling
import torch
from tables import markdown
from timing import Product, environment

from dit_hf.command_line import run
from dit_hf.presets import PRESETS


# Memory first: a process that has trained XL/2 leaves little of 24 GB to those that are measured.
PARTS = ("memory", "forward", "compiled", "training", "sampling", "growth", "quality")


def measure(part, args, known, save):
    """The results of one part; a long part passes `save` what it has, and continues from what is `known`."""
    device = torch.device(args.device)
    sizes = ["DiT-S/8"] if args.quick else args.sizes
    largest = "DiT-S/8" if args.quick else "DiT-XL/2"
    overrides = {"num_layers": 2} if args.quick else {}
    seconds = 0.2 if args.quick else 3.0
    product = Product(device, 512 if args.quick else 4096)
    if part == "forward":
        return networks.forward(sizes, product, device, seconds, **overrides)
    if part == "compiled":
        precisions = ("int8",) if args.quick else ("float32", "int8", "bfloat16")
        return networks.compiled(largest, precisions, product, device, seconds, **overrides)
    if part == "training":
        return networks.training(sizes, product, device, seconds, **overrides)
    if part == "memory":
        trained = [largest] if args.quick else ["DiT-B/2", largest]
        ways = ["plain"] if args.quick else ["plain", "checkpointing"]
        presets = ["plain"] if args.quick else ["plain", "exact", "int8", "fastest"]
        return networks.measure_memory(largest, 10 * seconds) | {
            "training": networks.private_memory("train", trained, ways),
            "drawing": networks.private_memory("draw", [largest], presets),
        }
    if part == "sampling":
        return sampling.times(device, seconds, args.settings, args.quick)
    if part == "growth":
        return sampling.growth(device, seconds, args.quick)
    count = 16 if args.quick else args.num_samples
    return sampling.quality(device, args.reference, count, args.settings, known, save, args.quick)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default="outputs/bench.json", help="JSON, part by part.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="What to measure.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where.")
    parser.add_argument("--reference", type=Path, default="outputs/emoji64", help="Held-out images.")
    parser.add_argument("--num_samples", type=int, default=2000, help="Samples per value of quality.")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        choices=PRESETS,
        default=list(PRESETS),
        help="Of forward passes and training.",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        choices=sampling.SETTINGS,
        default=list(sampling.SETTINGS),
        help="Of sampling, quality.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="Runs a small version of everything; the results mean nothing."
    )
    args = parser.parse_args()
    if "quality" in args.parts and not args.reference.exists():
        raise ValueError(
            f"--reference {args.reference} is not there: examples/train_autoencoder/README.md tells how to make the "
            "held-out emoji; or leave 'quality' out of --parts."
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}

    def save(part, found):
        results[part] = {"environment": environment(torch.device(args.device))} | found
        whole = args.output.with_suffix(".part")
        whole.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        whole.replace(args.output)

    now = environment(torch.device(args.device))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # or a first call finds what an earlier run has compiled
        for part in args.parts:
            print(f"== {part}", file=sys.stderr, flush=True)
            known = results.get(part, {})
            same = known.get("environment", {}).get("versions") == now["versions"]
            save(part, measure(part, args, known if same else {}, partial(save, part)))
    print(markdown(results))


if __name__ == "__main__":
    run(main)
