"""Metrics as model cards hold them."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .metrics import find_metrics


def card_results(
    metrics: dict[str, dict[str, Any]],
    recipe: dict[str, Any],
    dataset_name: str,
    task_type: str,
    protocol: str | None = None,
) -> list[EvalResult]:
    """
    Results for a model card, each with the recipe it was computed by.

    Args:
        metrics (`dict[str, dict[str, Any]]`): From [`compute_metrics`]: the name of each metric and its `value`.
        recipe (`dict[str, Any]`): How they were computed, with `extractor`; paths of this machine become file names.
        dataset_name (`str`): What the card calls the reference.
        task_type (`str`): The Hub's name of the task.
        protocol (`str`, *optional*): From [`protocol_line`]; the card shows it below the results.

    Returns:
        `list[EvalResult]`: of type `fid` for Inception's features, `fd_efficientnet_lite0` for EfficientNet-Lite0's.

    Raises:
        ValueError: if a metric is unknown.
    """
    extractor = recipe["extractor"]["name"]
    results = []
    for (name, found), metric in zip(metrics.items(), find_metrics(list(metrics), extractor), strict=True):
        result = EvalResult(task_type, "images", dataset_name, name, float(f"{found['value']:.6g}"))
        result.metric_name = f"{metric.title} ({_without_path(extractor)})"
        result.metric_args = _public(recipe) | ({"protocol": protocol} if protocol else {})
        results.append(result)
    return results


def _public(value):
    """A recipe without the folders of this machine, and without what the model's own configuration says."""
    if isinstance(value, dict):
        private = ("scheduler_config", "classes")
        return {name: _public(part) for name, part in value.items() if name not in private}
    return _without_path(value) if isinstance(value, str) else value


def _without_path(text):
    is_path = Path(text).is_absolute() or text.count("/") > 1 or Path(text).exists()
    return Path(text).name if text and is_path else text
