"""Writing checkpoint files that the original code bases load."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel as StockDiTTransformer2DModel
from safetensors.torch import load_file, save_file

from . import FAMILIES, diffusers_dit
from .family import Family
from .loading import computed_tables


# Beside a converted model: what only the original's training needs.
ASIDE_FILE = "projectors.safetensors"
ENDINGS = (".pt", ".safetensors")
STOCK_DIFFERS = (
    "diffusers' own DiT computes these weights differently: its timestep embedding has a frequency shift of 1, and "
    "the weights were trained with 0."
)


def mismatch(model, family: Family) -> str | None:
    """
    Why a family's code can't build a model.

    Args:
        model (`DiTTransformer2DModel`): To be written.
        family (`Family`): To be written as.

    Returns:
        `str`: naming the option that does not fit; None if it can.
    """
    flexible = family.name == "lightningdit"
    allowed = {
        "conditioning": ("adaln_zero",),
        "position_embedding": ("sincos", "sincos+rope") if flexible else ("sincos",),
        "norm": ("layer_norm", "rms_norm") if flexible else ("layer_norm",),
        "qk_norm": (False, True) if flexible or family.name == "repa" else (False,),
        "ff": ("gelu", "swiglu") if flexible else ("gelu",),
        "modulation_shift": (True, False) if flexible else (True,),
        "learn_sigma": (False,) if family.name == "repa" else (True, False),
    }
    for name, options in allowed.items():
        if model.config[name] not in options:
            return f"it has {name}={model.config[name]!r}, where {' or '.join(map(repr, options))} is needed"
    scale = 0.001 if family.flow_matching else 1.0
    if model.config.timestep_scale != scale:
        kind = "flow matching with time in [0, 1]" if family.flow_matching else "diffusion with time in [0, 1000)"
        return f"{family.name} is {kind}, and the model has timestep_scale={model.config.timestep_scale}, not {scale}"
    if model.config.class_dropout_prob == 0 and family.name == "diffusers":
        return "it has no null class, which diffusers' own DiT always has"
    return None


def check_exportable(model, family: Family) -> None:
    """
    That a model is one that a family's code can build.

    Args:
        model (`DiTTransformer2DModel`): To be written.
        family (`Family`): To be written as.

    Raises:
        ValueError: naming the option that does not fit, and the families that do.
    """
    if reason := mismatch(model, family):
        fitting = [other.name for other in FAMILIES.values() if mismatch(model, other) is None]
        others = f"families that fit: {', '.join(fitting)}" if fitting else "no other family fits either"
        raise ValueError(f"The model can't be written as {family.name}: {reason}; {others}.")


def original_state_dict(model, family: Family, aside: str | Path | None = None) -> dict[str, torch.Tensor]:
    """
    A model's weights in a family's words, complete: with computed tables, and what was kept aside.

    Args:
        model (`DiTTransformer2DModel`): To be written.
        family (`Family`): To be written as.
        aside (`str` or `Path`, *optional*): File of the weights that only training needs.

    Returns:
        `dict[str, torch.Tensor]`

    Raises:
        ValueError: if the model is none of this family's, or the weights kept aside are needed and missing.
    """
    check_exportable(model, family)
    ours = model.state_dict()
    num_layers = model.config.num_layers
    if family.name == "diffusers":
        copies = diffusers_dit.give_embedders(ours, num_layers)
        ours = {key: value for key, value in ours.items() if key not in diffusers_dit.EMBEDDERS.values()}
        return family.to_original(ours, num_layers) | copies
    weights = family.to_original(ours, num_layers) | computed_tables(family, model)
    if family.aside:
        if aside is None or not Path(aside).is_file():
            raise ValueError(
                f"There is no {aside or ASIDE_FILE} with the {family.aside[:-1]} that {family.name}'s code loads with "
                "the model; export it as sit, which has none."
            )
        weights |= load_file(aside)
    return weights


def save_original(model, family: Family, path: str | Path, aside: str | Path | None = None) -> None:
    """
    Writes a checkpoint file, or for the stock diffusers format a model folder, whole or not at all.

    Args:
        model (`DiTTransformer2DModel`): To be written.
        family (`Family`): To be written as.
        path (`str` or `Path`):
            `.safetensors` or `.pt` (REPA's code wants the weights under `ema` in it). Without such an ending the
            stock diffusers format becomes a folder that `diffusers.DiTTransformer2DModel.from_pretrained` loads.
        aside (`str` or `Path`, *optional*): File of the weights that only training needs.

    Raises:
        ValueError: if the model is none of this family's, or the ending is unknown.
    """
    path = Path(path)
    is_folder = family.name == "diffusers" and path.suffix not in ENDINGS
    if path.suffix not in ENDINGS and not is_folder:
        raise ValueError(f"The file {path} must end in {' or '.join(ENDINGS)}.")
    if path.exists():
        raise ValueError(f"{path} exists; choose a new name.")
    weights = original_state_dict(model, family, aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        if path.suffix == ".safetensors":
            save_file({key: weight.contiguous() for key, weight in weights.items()}, partial)
        elif path.suffix == ".pt":
            torch.save({"ema": weights} if family.name == "repa" else weights, partial)
        else:
            stock = StockDiTTransformer2DModel(**diffusers_dit.stock_config(model.config))
            stock.load_state_dict(weights, strict=True, assign=True)
            stock.save_pretrained(partial)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
