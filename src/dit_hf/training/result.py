"""What a finished training leaves: a pipeline folder with its card, or adapters, and its copy on the Hub."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..evaluation.cards import card_results
from ..evaluation.extractors import EFFICIENTNET
from ..evaluation.metrics import METRICS
from ..files import first_line, writing_folder
from ..hub import CardFacts, write_card
from ..hub.connection import check_answers, hub_answers, unreachable
from ..hub.model_card import PIPELINE_TAG
from .objectives import OBJECTIVES
from .records import read_log
from .settings import LOG_FILE
from .validation import grid_path, plot_losses


# What a model card shows of the settings, in this order.
ON_CARD = (
    *("dataset_name", "train_data_dir", "holdout", "resolution", "recipe", "objective", "time_sampling", "snr_gamma"),
    *("flow_matching_ratio", "target_guidance_scale", "target_guidance_mix", "target_guidance_start"),
    *("target_guidance_end", "target_guided", "pretrained_teacher_model", "adversarial_weight"),
    *("cosine_loss", "proj_coeff", "alignment_encoder", "alignment_depth", "max_train_steps", "total_batch_size"),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta2", "weight_decay", "ema_decay", "ema_warmup"),
    *("class_dropout_prob", "flip_probability", "balance_classes", "mixed_precision", "seed"),
)

# The data of the metrics on the card: the default of `dit-hf metrics --dataset_title`, which then updates their rows.
HELD_OUT = "held-out images"


def training_facts(
    settings: Mapping[str, Any],
    skipped: int,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    best_step: int | None = None,
) -> CardFacts:
    """
    What the card of a trained pipeline says.

    Args:
        settings (`Mapping`): Of the run.
        skipped (`int`): Steps that the guard skipped.
        license (`str`, *optional*): The Hub's identifier of a licence.
        metrics (`Mapping[str, float]`, *optional*): Against held-out images, from [`logged_metrics`].
        best_step (`int`, *optional*): The step whose weights are saved, if they are not the last.

    Returns:
        `CardFacts`
    """
    own = OBJECTIVES.get(settings.get("objective", ""))
    of_others = {flag for row in OBJECTIVES.values() for flag in row.flags if own and flag not in own.flags}
    recipe = {name: settings[name] for name in ON_CARD if settings.get(name) is not None and name not in of_others}
    if not settings.get("holdout"):
        recipe.pop("holdout", None)
    if not settings.get("adversarial_weight"):
        recipe.pop("adversarial_weight", None)
    if not settings.get("proj_coeff"):
        recipe = {name: value for name, value in recipe.items() if not name.startswith("alignment_")}
    recipe["steps skipped by the guard"] = skipped
    if best_step is not None:
        recipe["weights of step"] = best_step
    measured = {name: {"value": value} for name, value in (metrics or {}).items()}
    results = card_results(measured, {"extractor": {"name": EFFICIENTNET}}, HELD_OUT, PIPELINE_TAG)
    return CardFacts(license=license, recipe=recipe, results=results)


def save_pipeline(pipe, output_dir: str | Path, facts: CardFacts, step: int) -> Path:
    """
    Writes the pipeline of a finished run, with the sample grid of its step and the loss curve.

    Args:
        pipe (`DiTClassCondPipeline`): With the weights to save.
        output_dir (`str` or `Path`): The run's folder.
        facts (`CardFacts`): For the card.
        step (`int`): The step of the weights.

    Returns:
        `Path`: `output_dir/pipeline`.
    """
    folder = Path(output_dir) / "pipeline"
    with writing_folder(folder) as partial:
        pipe.save_pretrained(partial)
        if (grid := grid_path(output_dir, step)).exists():
            shutil.copyfile(grid, partial / "samples.png")
        plot_losses(*loss_curve(output_dir), partial / "loss.png")
        write_card(pipe, partial, facts=facts, place=folder)
    return folder


def loss_curve(output_dir: str | Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's log."""
    records = [record for record in read_log(Path(output_dir) / LOG_FILE) if "loss" in record]
    return [record["step"] for record in records], [record["loss"] for record in records]


def logged_metrics(output_dir: str | Path, step: int) -> dict[str, float]:
    """The metrics against held-out images that a run has logged for a step."""
    records = [record for record in read_log(Path(output_dir) / LOG_FILE) if record["step"] == step]
    names = [metric.full_name(EFFICIENTNET) for metric in METRICS]
    return {name: record[name] for record in records for name in names if name in record}


def check_hub(repo_id: str) -> None:
    """
    Checks before a training that its result can be published: the name of the repository, the connection, the token.

    Args:
        repo_id (`str`): `"name"` or `"user/name"`.

    Raises:
        ValueError: if the name is none.
        OSError: if the Hub can't be reached, or refuses the token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id!r} is not the name of a repository: {first_line(error)}") from None
    try:
        check_answers()
        with hub_answers():
            HfApi().whoami()["name"]
    except OSError as error:
        reason = unreachable() or first_line(error)
        raise OSError(f"--push_to_hub can't publish to {repo_id}: {reason}. Nothing was started.") from None
