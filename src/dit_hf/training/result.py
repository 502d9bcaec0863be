"""What a finished training leaves: a pipeline folder with its card, or adapters, and its copy on the Hub."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.cards import card_results
from ..evaluation.extractors import EFFICIENTNET
from ..hub import CardFacts
from ..hub.model_card import PIPELINE_TAG
from .trainer import LOG_FILE
from .validation import DISTANCE, plot_losses


# What a model card shows of the settings, in this order.
ON_CARD = (
    *("dataset_name", "train_data_dir", "holdout", "resolution", "recipe", "objective", "time_sampling", "snr_gamma"),
    *("cosine_loss", "proj_coeff", "alignment_encoder", "alignment_depth", "max_train_steps", "total_batch_size"),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta2", "weight_decay", "ema_decay", "ema_warmup"),
    *("class_dropout_prob", "flip_probability", "balance_classes", "mixed_precision", "seed"),
)

# The data of the distance on the card: the default of `dit-hf metrics --dataset_title`, which then updates its row.
HELD_OUT = "held-out images"


def training_facts(
    settings: Mapping[str, Any], skipped: int, license: str | None = None, distance: float | None = None
) -> CardFacts:
    """
    What the card of a trained pipeline says.

    Args:
        settings (`Mapping`): Of the run.
        skipped (`int`): Steps that the guard skipped.
        license (`str`, *optional*): The Hub's identifier of a licence.
        distance (`float`, *optional*): Fréchet distance to held-out images.

    Returns:
        `CardFacts`
    """
    recipe = {name: settings[name] for name in ON_CARD if settings.get(name) is not None}
    if not settings.get("holdout"):
        recipe.pop("holdout", None)
    if not settings.get("proj_coeff"):
        recipe = {name: value for name, value in recipe.items() if not name.startswith("alignment_")}
    recipe["steps skipped by the guard"] = skipped
    results = []
    if distance is not None:
        made_by = {"extractor": {"name": EFFICIENTNET}}
        results = card_results({DISTANCE: {"value": distance}}, made_by, HELD_OUT, PIPELINE_TAG)
    return CardFacts(license=license, recipe=recipe, results=results)


def save_pipeline(pipe, output_dir: str | Path, facts: CardFacts) -> Path:
    """
    Writes the pipeline of a finished run, with its last sample grid and its loss curve.

    Args:
        pipe (`DiTClassCondPipeline`): With the weights to save.
        output_dir (`str` or `Path`): The run's folder.
        facts (`CardFacts`): For the card.

    Returns:
        `Path`: `output_dir/pipeline`.
    """
    folder = Path(output_dir) / "pipeline"
    folder.mkdir(exist_ok=True)
    if grids := sorted((Path(output_dir) / "samples").glob("step-*.png")):
        shutil.copyfile(grids[-1], folder / "samples.png")
    plot_losses(*loss_curve(output_dir), folder / "loss.png")
    pipe.save_pretrained(folder, card=facts)
    return folder


def loss_curve(output_dir: str | Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's log."""
    lines = [json.loads(line) for line in (Path(output_dir) / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def logged_distance(output_dir: str | Path) -> float | None:
    """The Fréchet distance of a run's last step, if it was measured."""
    return json.loads((Path(output_dir) / LOG_FILE).read_text(encoding="utf-8").splitlines()[-1]).get(DISTANCE)
