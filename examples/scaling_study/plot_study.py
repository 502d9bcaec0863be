#!/usr/bin/env python
"""Plots the results of `run_study.py`, and fits distance vs. compute.

    python examples/scaling_study/plot_study.py --results outputs/scaling_study/results.csv \
        --output_dir docs/scaling_study

Expected: seconds. Prints the correlation of distance with the logarithm of Gflops and the slope of the fit as JSON.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype
from scipy.stats import linregress

from dit_hf.command_line import ArgumentParser, run
from dit_hf.files import check_file, check_folder, reading, writing


NUMBERS = ["steps", "guidance_scale", "gflops", "sampling_gflops", "fd_efficientnet_lite0", "precision", "recall"]
MAX_BYTES = 2**26


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="CSV of run_study.py.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where PNGs and a copy of the CSV go.")
    return parser.parse_args()


def plot_scaling(axes, rows):
    """Distance against compute of the twelve models, and the fit."""
    logarithm = np.log10(rows.gflops)
    fit = linregress(logarithm, rows.fd_efficientnet_lite0)
    axes.scatter(rows.gflops, rows.fd_efficientnet_lite0)
    for row in rows.itertuples():
        axes.annotate(row.model.removesuffix("-adaln_zero").replace("-", "/"), (row.gflops, row.fd_efficientnet_lite0))
    axes.plot(rows.gflops, fit.intercept + fit.slope * logarithm, linewidth=0.8)
    axes.set(xscale="log", xlabel="Gflops of a forward pass", title=f"correlation {fit.rvalue:.2f}")
    return {"correlation with log Gflops": round(fit.rvalue, 3), "slope a decade": round(fit.slope, 1)}


def plot_conditioning(axes, rows):
    """Distance of the four designs, as bars."""
    names = [model.split("-")[-1] for model in rows.model]
    axes.bar(names, rows.fd_efficientnet_lite0)
    axes.tick_params(axis="x", labelrotation=20)
    return dict(zip(names, rows.fd_efficientnet_lite0.round(1), strict=True))


def plot_sampling(axes, rows):
    """Distance against sampling compute, a line a model."""
    for model, part in rows.groupby("model", sort=False):
        axes.plot(part.sampling_gflops, part.fd_efficientnet_lite0, marker="o", label=model.split("-")[0])
    axes.set(xscale="log", xlabel="Gflops of an image")
    axes.legend()
    return {model: part.fd_efficientnet_lite0.min().round(1) for model, part in rows.groupby("model", sort=False)}


def plot_guidance(axes, rows):
    """Distance, precision and recall against guidance."""
    axes.plot(rows.guidance_scale, rows.fd_efficientnet_lite0, marker="o", color="black")
    shares = axes.twinx()
    for name in ("precision", "recall"):
        shares.plot(rows.guidance_scale, rows[name], marker=".", linestyle="--", label=name)
    shares.set_ylabel("precision, recall")
    shares.legend()
    axes.set(xlabel="guidance scale", title="distance: solid line")
    return {"best scale": float(rows.guidance_scale[rows.fd_efficientnet_lite0.idxmin()])}


PLOTS: dict[str, Callable] = {
    "scaling": plot_scaling,
    "conditioning": plot_conditioning,
    "sampling": plot_sampling,
    "guidance": plot_guidance,
}


def main():
    args = parse_args()
    check_folder(args.output_dir, "--output_dir")
    with reading(check_file(args.results, MAX_BYTES), "CSV"):
        results = pandas.read_csv(args.results)
    numbers = results.get(NUMBERS)
    if numbers is None or "study" not in results or "model" not in results:
        raise ValueError(f"{args.results} is no table of run_study.py, which has {', '.join(NUMBERS)}.")
    if not (all(map(is_numeric_dtype, numbers.dtypes)) and np.isfinite(numbers).all(axis=None)):
        raise ValueError(f"{args.results} is damaged: a value is no finite number.")
    copy = args.output_dir / "results.csv"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, plot in PLOTS.items():
        rows = results[results.study == name]
        if name in ("conditioning", "guidance"):  # of one size; a folder may have been begun with a smaller one
            shape = rows.model.str.rsplit("-", n=1).str[0]
            rows = rows[shape == shape.iloc[-1]] if len(rows) else rows
        if len(rows) < 2:
            continue
        axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
        axes.set_ylabel("FD (EfficientNet-Lite0)")
        found[name] = plot(axes, rows)
        figure.savefig(args.output_dir / f"{name}.png", dpi=120)
    if not (copy.exists() and copy.samefile(args.results)):
        with writing(copy) as partial:
            shutil.copyfile(args.results, partial)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    run(main)
