"""Writes a pipeline's or model's weights as a checkpoint that an original code base loads strictly.

    dit-hf export --pretrained_model_name_or_path dit-xl-2-256 --family dit --checkpoint_path back.pt

Expected: the time it takes to read and write the weights. `--family diffusers` with a name without ending writes a
folder for diffusers' own `DiTTransformer2DModel`.
"""

from pathlib import Path

from diffusers import DDPMScheduler

from ..bundled import resolve_pipeline
from ..checkpoints import FAMILIES, Family
from ..checkpoints.saving import TRAINING_ONLY_FILE, check_new_file, save_original
from ..command_line import ArgumentParser, run
from ..conversion import load_transformer
from ..hub import source_file
from ..schedulers import trained_prediction


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model_path",
        required=True,
        help="Folder of a pipeline or of a transformer, Hub id of a pipeline, or bundled name.",
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True, help="Code base that will load it.")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="New file, .pt or .safetensors.")
    return parser.parse_args()


def check_prediction(name: str, family: Family, timestep_scale: float) -> None:
    """That a pipeline's scheduler is for what the family's models are trained for."""
    try:
        config = DDPMScheduler.load_config(resolve_pipeline(name), subfolder="scheduler")  # whichever it is
    except OSError:  # a pipeline without a scheduler
        return
    prediction = trained_prediction(config)
    if prediction == "velocity" and timestep_scale == 1:
        raise ValueError(
            f"{name} is a flow-matching model with timestep_scale=1, as `dit-hf train` makes them; no original code "
            "base computes those."
        )
    if prediction not in family.predictions:
        expected = " or ".join(family.predictions)
        raise ValueError(f"{name} predicts {prediction}, and {family.name}'s code would take it for {expected}.")


def main():
    args = parse_args()
    name, family = args.pretrained_model_name_or_path, FAMILIES[args.family]
    check_new_file(args.checkpoint_path, family)
    model, is_pipeline = load_transformer(name)
    if is_pipeline:
        check_prediction(name, family, model.config.timestep_scale)
    training_only = source_file(model, f"transformer/{TRAINING_ONLY_FILE}" if is_pipeline else TRAINING_ONLY_FILE)
    save_original(model, family, args.checkpoint_path, training_only)
    if family.writing_note:
        print(f"Note: {family.writing_note}.")
    print(f"Checkpoint: {args.checkpoint_path}")


if __name__ == "__main__":
    run(main)
