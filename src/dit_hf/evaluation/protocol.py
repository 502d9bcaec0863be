"""The protocol of a result: one line with all that must agree before two values compare."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .samples import LABEL_POLICIES


UNKNOWN = "not recorded"


def protocol_line(recipe: Mapping[str, Any]) -> str:
    """
    The protocol of a result. What the recipe does not hold is said to be "not recorded".

    Args:
        recipe (`Mapping[str, Any]`): Of the result, with `extractor`, and `sampling`, the samples' own recipe.

    Returns:
        `str`: one line, without folders of this machine.

    Example:

        >>> from dit_hf.evaluation.protocol import protocol_line
        >>> line = protocol_line({"num_samples": 1000, "sampling": {"labels": "balanced", "num_inference_steps": 30}})
        >>> line.split("; ")[0], line.split("; ")[-2:]
        ('labels: balanced', ['steps: 30', 'seed: not recorded'])
    """
    sampling = recipe.get("sampling") or {}
    parts = {
        "labels": _labels(sampling.get("labels")),
        "rounding to 8 bits": sampling.get("rounding", UNKNOWN),
        "resize": _resize(recipe),
        "extractor": _extractor(recipe.get("extractor", {})),
        "reference": _reference(recipe),
        "N": recipe.get("num_samples", UNKNOWN),
        "guidance": _guidance(sampling),
        "solver": _configured(sampling, "scheduler", "scheduler_config"),
        "steps": sampling.get("num_inference_steps", UNKNOWN),
        "seed": sampling.get("seed", UNKNOWN),
    }
    return "; ".join(f"{name}: {text}" for name, text in parts.items())


def _labels(policy):
    if policy is None:
        return UNKNOWN
    return policy if policy in LABEL_POLICIES else f"as in the dataset {Path(policy).name}"


def _resize(recipe):
    """The crop of all images, then the extractor's own rule."""
    rule = recipe.get("extractor", {}).get("resize", UNKNOWN)
    size = recipe.get("resolution")
    return rule if size is None else f"cropped to {size}×{size}, then {rule}"


def _extractor(extractor):
    name, weights = extractor.get("name"), extractor.get("weights", UNKNOWN)
    return UNKNOWN if name is None else f"{Path(name).name} (weights {weights})"


def _reference(recipe):
    """Where the means and covariances of the reference are from."""
    if "reference" not in recipe:
        return UNKNOWN
    name, count = Path(recipe["reference"]).name, recipe.get("num_reference", UNKNOWN)
    images = f"{count} images of {name}" if isinstance(count, int) else ""
    if images and Path(name).suffix not in (".npz", ".safetensors"):
        images += f", split {recipe.get('split', UNKNOWN)}"
        images += f", holdout {recipe['holdout']}" if recipe.get("holdout") else ""
    statistics = f"statistics in {name}" if recipe.get("statistics") == "file" else ""
    return " and ".join(part for part in (statistics, images) if part) or f"{name}, {UNKNOWN}"


def _configured(sampling, name, config):
    """A part of the recipe with a short hash of its configuration, if that is recorded."""
    found = sampling.get(name, UNKNOWN)
    if config not in sampling:
        return found
    return f"{found} (config {hashlib.sha256(json.dumps(sampling[config], sort_keys=True).encode()).hexdigest()[:8]})"


def _guidance(sampling):
    """Scale, channels, interval, and what is guided away from."""
    scale = sampling.get("guidance_scale", UNKNOWN)
    if scale == 1 and "guider" not in sampling:
        return sampling.get("guidance", "none")
    channels = sampling.get("guidance_channels", UNKNOWN)  # None stands for all
    interval = sampling.get("guidance_interval", UNKNOWN)
    between = interval if interval == UNKNOWN else f"{interval[0]:g} to {interval[1]:g}"
    kind = _configured({"guidance": f"null policy {UNKNOWN}"} | sampling, "guidance", "guider")
    return f"scale {scale}, channels {channels or 'all'}, interval {between}, {kind}"
