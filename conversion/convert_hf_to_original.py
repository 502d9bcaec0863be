#!/usr/bin/env python
"""Writes a pipeline's or model's weights as a checkpoint that an original code base loads strictly.

    python conversion/convert_hf_to_original.py --model_path dit-xl-2-256 --family dit --checkpoint_path back.pt

Expected: the time it takes to read and write the weights. `--family diffusers` with a name without ending writes a
folder for diffusers' own `DiTTransformer2DModel`.
"""

import argparse
from pathlib import Path

from diffusers import DDPMScheduler

from dit_hf import DiTTransformer2DModel
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.saving import ASIDE_FILE, STOCK_DIFFERS, save_original
from dit_hf.command_line import run
from dit_hf.hub import source_file
from dit_hf.schedulers import trained_prediction


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model_path", required=True, help="Folder of a pipeline or of a transformer, or Hub id of a pipeline."
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True, help="Code base that will load it.")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="New file, .pt or .safetensors.")
    return parser.parse_args()


def check_scheduler(model_path, family, timestep_scale):
    """That a pipeline's scheduler is for what the family's models are trained for."""
    try:
        config = DDPMScheduler.load_config(model_path, subfolder="scheduler")  # whichever it is
    except OSError:  # a pipeline without a scheduler
        return
    prediction = trained_prediction(config)
    if prediction not in ("epsilon", "velocity") and family.name != "diffusers":  # where the scheduler says it
        raise ValueError(f"{model_path} predicts {prediction}; {family.name}'s code would take it for something else.")
    if prediction != "velocity":
        return
    if timestep_scale == 1:
        raise ValueError(
            f"{model_path} is a flow-matching model with timestep_scale=1, as train_dit.py makes them; no original code "
            "base computes those."
        )
    if not family.flow_matching:
        raise ValueError(
            f"{model_path} is a flow-matching model, and {family.name}'s code would sample it as a diffusion model."
        )


def main():
    args = parse_args()
    folder = Path(args.model_path)
    is_model = (folder / "config.json").is_file()
    is_id = args.model_path.count("/") == 1 and not folder.parent.is_dir()
    if folder.is_file() or not (folder.exists() or is_id):
        raise ValueError(f"--model_path {folder} must be the folder of a pipeline or a transformer, or a Hub id.")
    if folder.is_dir() and not is_model and not (folder / "transformer" / "config.json").is_file():
        raise ValueError(f"--model_path {folder} is neither a pipeline nor a transformer: there is no config.json.")
    model = DiTTransformer2DModel.from_pretrained(args.model_path, subfolder=None if is_model else "transformer")
    if not is_model:
        check_scheduler(args.model_path, FAMILIES[args.family], model.config.timestep_scale)
    aside = source_file(model, ASIDE_FILE) or source_file(model, f"transformer/{ASIDE_FILE}")
    save_original(model, FAMILIES[args.family], args.checkpoint_path, aside)
    if args.family == "diffusers":
        print(f"Note: {STOCK_DIFFERS} Load it with dit_hf for the right images.")
    print(f"Checkpoint: {args.checkpoint_path}")


if __name__ == "__main__":
    run(main)
