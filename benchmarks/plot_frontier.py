#!/usr/bin/env python
"""Plots docs/speed.png, speed vs. quality, from the results of bench.py.

python benchmarks/plot_frontier.py --results benchmarks/results/epyc.json --output docs/speed.png
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("agg")
import matplotlib.pyplot as plt
from sampling import ROUNDING

from dit_hf.command_line import run


FD = "fd_efficientnet_lite0"
PRESETS = {
    "DDIM, compiled (exact)": "exact",
    "DDIM, int8 compiled (int8)": "int8",
    "balanced": "balanced",
    "fastest": "fastest",
}


# Whose words go below the point, as others' are above.
BELOW = ("DDIM, compiled (exact)", "UniPC, 8 steps, shift 1.5")


def points(results: dict) -> dict[str, tuple[float, float]]:
    """Times as fast as the stock pipeline at the largest batch, and distance over 50-step DDIM's, of each setting."""
    times, quality = list(results["sampling"]["rows"].values())[-1], results["quality"]["rows"]
    # Of those that only round differently, the presets are shown.
    shown = {name: ROUNDING.get(name, name) for name in times if name in PRESETS or name not in ROUNDING}
    return {
        name: (1 / times[name]["ratio"], quality[measured][FD] / quality["DDIM"][FD])
        for name, measured in shown.items()
        if measured in quality
    }


def draw(found, batch, path):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(1.02, color="0.7", linewidth=1, linestyle="--")
    axes.text(1, 1.023, "2 % above 50-step DDIM", color="0.4", fontsize=8)
    for name, (speed, distance) in found.items():
        label = PRESETS.get(name)
        axes.scatter(speed, distance, color="tab:orange" if label else "tab:blue", zorder=3)
        words = f"{label} (preset)" if label else name
        below = name in BELOW
        axes.annotate(
            words, (speed, distance), xytext=(5, -11 if below else 4), textcoords="offset points", fontsize=7
        )
    axes.set_xscale("log")
    ticks = [1, 2, 4, 8, 16, 32, 64, 128]
    axes.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes.set_xlabel(f"times as fast as diffusers' DiTPipeline with 50 DDIM steps, images per call: {batch}")
    axes.set_ylabel("Fréchet distance over DDIM's (less is better)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default="benchmarks/results/epyc.json", help="Of bench.py.")
    parser.add_argument("--output", type=Path, default="docs/speed.png", help="The plot.")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    if missing := {"sampling", "quality"} - set(results):
        raise ValueError(f"{args.results} has no {' and no '.join(sorted(missing))}; bench.py measures them.")
    draw(points(results), list(results["sampling"]["rows"])[-1], args.output)


if __name__ == "__main__":
    run(main)
