"""A result as a table for the terminal."""

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
    rows = [["metric", "", "samples", "±", *(["training images"] if real else [])]]
    for name, metric in zip(names, find_metrics(names, extractor), strict=True):
        arrow = "↑" if metric.higher_is_better else "↓"
        rows.append([name, arrow, _number(found[name], "value", 6), _number(found[name], "ci95", 2)])
        if real:
            rows[-1].append(_number(real.get(name, {}), "value", 6))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if "mean fdr" in found:
        mean = found["mean fdr"]
        lines.append(f"mean fdr of {', '.join(mean['extractors'])}: {mean['mean']:.6g}")
    if "fraction of suspects" in (nearest := found.get("nearest training image", {})):
        lines.append(
            f"samples as near to a training image as a copy: {nearest['fraction of suspects']:.3g} (0.01: none)"
        )
    return "\n".join(lines)


def _number(result, key, digits):
    return f"{result[key]:.{digits}g}" if key in result else ""
