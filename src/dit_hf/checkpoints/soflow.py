"""SoFlow (https://github.com/zlab-princeton/SoFlow): MeanFlow's network under another name, and its own sampler."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from diffusers.utils import logging

from ..files import check_file, reading
from .dit import DIT
from .meanflow import INTERVAL_LAYERS, MEANFLOW
from .reference import reference_forward


logger = logging.get_logger(__name__)

PREFIX = "network."
# Beside the folder of checkpoints.
CONFIG_FILE = "config.yaml"
MAX_CONFIG_BYTES = 2**20


def read_run_config(checkpoint: Path) -> dict:
    """
    The options of the run that wrote a checkpoint.

    Args:
        checkpoint (`Path`): A file in the folder `ckpts` of a run.

    Returns:
        `dict`: its numbers and words; empty if there is no `config.yaml` of SoFlow in the run's folder.
    """
    file = checkpoint.absolute().parent.parent / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        with reading(check_file(file, MAX_CONFIG_BYTES), "YAML"):
            options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except ValueError as error:  # perhaps of another program
        logger.warning(f"{error} It is not used.")
        return {}
    if not isinstance(options, dict) or "l_schedule" not in options:
        return {}
    return {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}


def trained_guidance(options: dict) -> dict:
    """Without label dropout the class table has no null class; a scale above 1 was trained into the weights."""
    told = {}
    if "cfg_drop_rate" in options:
        told["has_null_class"] = options["cfg_drop_rate"] != 0
    if "cfg_scale" in options:
        told["guidance_in_weights"] = options["cfg_scale"] != 1
    return told


def soflow_reference_forward(weights: dict[str, torch.Tensor], *inputs) -> torch.Tensor:
    """As [`reference_forward`], of weights with SoFlow's keys."""
    renamed = {key.removeprefix(PREFIX).replace("s_embedder.", "r_embedder."): value for key, value in weights.items()}
    return reference_forward(renamed, *inputs)


SOFLOW = replace(
    MEANFLOW,
    name="soflow",
    keys={PREFIX + key: ours for key, ours in DIT.keys.items()}
    | {f"{PREFIX}s_embedder.{layer}": ours for layer, ours in INTERVAL_LAYERS.items()},
    blocks=PREFIX + MEANFLOW.blocks,
    tables={PREFIX + key: table for key, table in MEANFLOW.tables.items()},
    marks=(PREFIX + "s_embedder.",),
    trained_with={"noising_type": ("Linear",), "coefficient_type": ("Euler",)},
    wrapper="ema_model",
    scheduler="flow_lcm",
    read_arguments=read_run_config,
    trained_options=trained_guidance,
    scaling_factor=None,
    reference_forward=soflow_reference_forward,
)
