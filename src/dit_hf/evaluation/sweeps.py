"""Grids of sampling settings: their cells, the table of their metrics, and a plot."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# What follows the name of a metric in a row, for half the width of its 95 % interval.
INTERVAL = " ±"
# How a setting is shown, and as which number it is plotted.
AXES = {
    "guidance_scale": ("guidance scale", float),
    "guidance_interval": ("end of the guidance interval", lambda interval: float(interval[1])),
    "num_inference_steps": ("steps", float),
    "sigma_rel": ("relative width of the average", float),
}


def grid(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """
    Every combination of the values of some settings.

    Args:
        settings (`Mapping[str, Sequence]`): The values of each.

    Returns:
        `list[dict]`: the last setting changes fastest.
    """
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]


def cell_name(cell: Mapping[str, Any]) -> str:
    """The name of a cell's folder, such as `guidance_scale=2.0,num_inference_steps=25`."""
    return ",".join(f"{name}={shown(value)}" for name, value in cell.items()) or "cell"


def shown(value: Any) -> str:
    """A setting in a table or a name; an interval is `0.0-0.5`."""
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """
    The cells of a sweep with their metrics, the best first.

    Args:
        rows (`Sequence[Mapping]`): Settings and metrics of each cell.
        metrics (`Sequence[str]`): Names of the metrics.

    Returns:
        `str`: a table in Markdown.
    """
    settings = [name for name in rows[0] if name.removesuffix(INTERVAL) not in metrics]
    lines = [[*settings, *metrics], ["---"] * (len(settings) + len(metrics))]
    lines += [[shown(row[name]) for name in settings] + [_measured(row, name) for name in metrics] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(row, name):
    """A value with its interval, if there is one."""
    interval = row.get(name + INTERVAL)
    return f"{row[name]:.4g}" if interval is None else f"{row[name]:.4g} ± {interval:.2g}"


def best(rows: Sequence[Mapping[str, Any]], metric: str, higher_is_better: bool = False) -> list[dict[str, Any]]:
    """The rows in the order of a metric, the best first; NaN comes last."""
    sign = -1 if higher_is_better else 1
    return sorted(map(dict, rows), key=lambda row: (math.isnan(row[metric]), sign * row[metric]))


def plot(rows: Sequence[Mapping[str, Any]], metric: str, path: str | Path) -> bool:
    """
    Plots a metric over the two settings that have the most values: contours, or a curve if one alone has several. Of
    the cells at one place the best is shown.

    Args:
        rows (`Sequence[Mapping]`): Settings and metrics of each cell, the best first.
        metric (`str`): The metric.
        path (`str` or `Path`): Where the PNG is written.

    Returns:
        `bool`: whether there was a setting with several values to plot it over.
    """
    from matplotlib.figure import Figure

    places = {name: sorted({AXES[name][1](row[name]) for row in rows}) for name in AXES if name in rows[0]}
    names = sorted((name for name in places if len(places[name]) > 1), key=lambda name: -len(places[name]))[:2]
    if not names:
        return False
    shown_at: dict[tuple[float, ...], float] = {}
    for row in rows:
        shown_at.setdefault(tuple(AXES[name][1](row[name]) for name in names), row[metric])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(AXES[names[0]][0])
    if len(names) == 1:
        axes.plot(places[names[0]], [shown_at[place,] for place in places[names[0]]], marker="o")
        axes.set_ylabel(metric)
    else:
        axes.set_ylabel(AXES[names[1]][0])
        values = [[shown_at[x, y] for x in places[names[0]]] for y in places[names[1]]]
        axes.set_xticks(places[names[0]])
        axes.set_yticks(places[names[1]])
        contours = axes.contourf(places[names[0]], places[names[1]], values, levels=12, cmap="viridis")
        figure.colorbar(contours, label=metric)
        axes.plot(*zip(*shown_at, strict=True), ".", color="white")
        axes.plot(*next(iter(shown_at)), "*", color="red", markersize=14, clip_on=False)
        axes.set_title("the best is starred", fontsize=9)
    figure.savefig(path, dpi=130)
    return True
