"""Writes a pipeline's or model's weights as a checkpoint that an original code base loads strictly.

    dit-hf export --pretrained_model_name_or_path dit-xl-2-256 --family dit --checkpoint_path back.pt

Expected: the time it takes to read and write the weights. `--family diffusers` with a name without a suffix writes a
folder for diffusers' own `DiTTransformer2DModel`.
"""

from pathlib import Path

from diffusers import DDPMScheduler

from ..bundled import resolve_pipeline
from ..checkpoints import FAMILIES, Family
from ..checkpoints.autoencoders import AUTOENCODERS, AutoencoderFamily, original_autoencoder
from ..checkpoints.latents_stats import FORMS, original_latents_stats
from ..checkpoints.saving import (
    TRAINING_ONLY_FILE,
    check_new_file,
    fitting_families,
    save_original,
    save_weights,
)
from ..command_line import ArgumentParser, run
from ..conversion import load_transformer
from ..data.autoencoders import load_autoencoder
from ..files import read_json
from ..hub import source_file
from ..model_folders import check_autoencoder
from ..models import PackagedModel
from ..schedulers import trained_prediction


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model_path",
        required=True,
        help="Folder of a pipeline, transformer or autoencoder, Hub id of a pipeline, or bundled name.",
    )
    parser.add_argument(
        "--family",
        choices=tuple(dict.fromkeys((*FAMILIES, *FORMS))),
        required=True,
        help="Code base that will load it.",
    )
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="New file, .pt or .safetensors.")
    parser.add_argument(
        "--latents_stats", type=Path, help="New file, .pt, for the statistics of an autoencoder's latents."
    )
    return parser.parse_args()


def check_prediction(name: str, family: Family, model: PackagedModel) -> None:
    """That a pipeline's scheduler is for what the family's models are trained for."""
    try:
        config = DDPMScheduler.load_config(resolve_pipeline(name), subfolder="scheduler")  # whichever it is
    except OSError:  # a pipeline without a scheduler
        return
    prediction = trained_prediction(config)
    if prediction == "velocity" and model.config.get("timestep_scale") == 1:
        raise ValueError(
            f"{name} is a flow-matching model with timestep_scale=1, as `dit-hf train` makes them; no original code "
            "base computes those."
        )
    if prediction not in family.predictions:
        expected = " or ".join(family.predictions)
        raise ValueError(
            f"{name} predicts {prediction}, and {family.name}'s code would take it for {expected}; "
            f"{fitting_families(model, prediction)}."
        )


def find_autoencoder_family(name: str) -> AutoencoderFamily | None:
    """The family of the autoencoder in a folder; None if it holds something else."""
    file = Path(name, "config.json")
    class_name = read_json(file).get("_class_name") if file.is_file() else None
    return next((family for family in AUTOENCODERS.values() if family.model.__name__ == class_name), None)


def export_autoencoder(args):
    """Writes an autoencoder's weights and, if asked for, the statistics of its latents."""
    name = args.pretrained_model_name_or_path
    family = find_autoencoder_family(name)
    if family is None:
        classes = " or ".join(family.model.__name__ for family in AUTOENCODERS.values())
        raise ValueError(f"{name} must be the folder of an {classes}, such as the folder vae of a pipeline.")
    if args.family not in family.stats_forms:
        raise ValueError(f"{name} is an {family.model.__name__}; pass --family {' or '.join(family.stats_forms)}.")
    check_new_file(args.checkpoint_path)
    if args.latents_stats:
        check_new_file(args.latents_stats, suffixes=(".pt",))
        if args.latents_stats.resolve() == args.checkpoint_path.resolve():
            raise ValueError(f"--latents_stats and --checkpoint_path are both {args.checkpoint_path}.")
    check_autoencoder(Path(name, "config.json"), family.model)
    vae = load_autoencoder(name)
    weights = original_autoencoder(vae)
    statistics = original_latents_stats(vae, args.family) if args.latents_stats else None
    save_weights(weights, args.checkpoint_path)
    print(f"Checkpoint: {args.checkpoint_path}")
    if statistics:
        save_weights(statistics, args.latents_stats)
        print(f"Statistics of the latents: {args.latents_stats}")


def main():
    args = parse_args()
    name = args.pretrained_model_name_or_path
    if args.family not in FAMILIES or find_autoencoder_family(name):
        export_autoencoder(args)
        return
    if args.latents_stats:
        raise ValueError(f"--latents_stats is for the folder of an autoencoder, and {name} is none; omit it.")
    family = FAMILIES[args.family]
    check_new_file(args.checkpoint_path, family)
    model, is_pipeline = load_transformer(name)
    if is_pipeline:
        check_prediction(name, family, model)
    training_only = source_file(model, f"transformer/{TRAINING_ONLY_FILE}" if is_pipeline else TRAINING_ONLY_FILE)
    save_original(model, family, args.checkpoint_path, training_only)
    if family.writing_note:
        print(f"Note: {family.writing_note}.")
    print(f"Checkpoint: {args.checkpoint_path}")


if __name__ == "__main__":
    run(main)
