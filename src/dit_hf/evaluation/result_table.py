"""A result as a table for the terminal."""

import math
from typing import Any

from .metrics import find_metrics


def result_table(found: dict[str, Any], extractor: str) -> str:
    """
    The metrics of a result, one line each, and what the training images tell.

    Args:
        found (`dict[str, Any]`): From [`evaluate`].
        extractor (`str`): Name of the extractor.

    Returns:
        `str`: lines of text. An arrow points to better values, `±` is half the width of the 95 % interval.
    """
    real = found.get("training images", {})
    names = [name for name, result in found.items() if "value" in result]
    intervals = any("ci95" in found[name] for name in names)
    rows = [["metric", "", "samples", *(["±"] if intervals else []), *(["training images"] if real else [])]]
    for name, metric in zip(names, find_metrics(names, extractor), strict=True):
        arrow = "↑" if metric.higher_is_better else "↓"
        decimals = _decimals(found[name])
        rows.append([name, arrow, _number(found[name], "value", decimals)])
        if intervals:
            rows[-1].append(_number(found[name], "ci95", decimals))
        if real:
            rows[-1].append(_number(real.get(name, {}), "value", decimals))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if "mean fdr" in found:
        mean = found["mean fdr"]
        lines.append(f"mean fdr of {', '.join(mean['extractors'])}: {mean['mean']:.6g}")
    if "fraction of suspects" in (nearest := found.get("nearest training image", {})):
        lines.append(f"fraction of suspects (0.01 without copies): {nearest['fraction of suspects']:.3g}")
    return "\n".join(lines)


def _decimals(result):
    """Two significant digits of the interval, or five of the value."""
    unit, digits = (result["ci95"], 2) if result.get("ci95") else (result["value"], 5)
    finite = math.isfinite(unit) and unit != 0
    return max(0, digits - 1 - math.floor(math.log10(abs(unit)))) if finite else digits


def _number(result, key, decimals):
    return f"{result[key]:.{decimals}f}" if key in result else ""
