"""Metrics against held-out images during training, and the best checkpoint by one of them."""

import math
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from testing_utils.training_runs import read_log, refused, run, train, train_command

from dit_hf import DiTClassCondPipeline
from dit_hf.commands.train import parse_args
from dit_hf.evaluation.extractors import EFFICIENTNET, extract, load_extractor
from dit_hf.evaluation.metrics import METRICS, compute_metrics
from dit_hf.evaluation.samples import sample_images
from dit_hf.training.checkpointing import list_checkpoints
from dit_hf.training.data import ImageData
from dit_hf.training.validation import HELD_OUT_METRICS, HeldOutMetrics


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation_metrics": "fid"}, "'fid' is not a metric of the validation"),
        ({"validation_metrics": "fd,accuracy"}, "'accuracy' is not a metric of the validation"),
        ({"validation_metrics": "fd,fd"}, "'fd,fd' must be names separated by commas, each once"),
        ({"validation_metrics": "kid", "validation_split": None}, "no effect without --validation_split"),
        ({"metric_for_best_model": "kid"}, "kid is none of --validation_metrics fd; add it there"),
        ({"load_best_model_at_end": ""}, "no effect without --metric_for_best_model"),
        ({"validation_metrics": "is"}, "is needs at least 10 images; there are 8 (samples); hold out more images"),
    ],
)
def test_metrics_that_there_is_nothing_for_are_refused(workspace, tmp_path, flags, message, monkeypatch, capsys):
    error = refused(
        train_command(workspace, tmp_path / "run", **{"validation_split": "test"} | flags), monkeypatch, capsys
    )
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_direction_is_that_of_the_table(tmp_path, monkeypatch):
    assert len(METRICS) - len(HELD_OUT_METRICS) == 2
    for name, expected in (("fd", ("fd_efficientnet_lite0", False)), ("recall", ("recall", True))):
        flags = {"validation_split": "test", "validation_metrics": "fd,recall", "metric_for_best_model": name}
        monkeypatch.setattr(sys, "argv", [str(part) for part in train_command(tmp_path, tmp_path, **flags)[1:]])
        args = parse_args()
        assert (args.metric_for_best_model, args.greater_is_better) == expected


def test_the_network_of_the_metrics_takes_no_random_numbers():
    state = torch.get_rng_state()
    HeldOutMetrics(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_model_is_saved_with_its_metrics(workspace, tmp_path):
    """What is logged and on the card is what `dit-hf metrics` computes of the samples of the saved pipeline."""
    names = ["sfd", "kid", "recall", "nearest_accuracy"]
    flags = {"max_train_steps": 2, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "validation_steps": 1}
    flags |= {"validation_split": "test", "validation_metrics": ",".join(names), "metric_for_best_model": "recall"}
    flags |= {"learning_rate": 0.05, "ema_decay": 0.1, "lr_warmup_steps": 0}
    output = run(train_command(workspace, tmp_path, **flags)).stdout
    first, last = read_log(tmp_path)
    assert first["recall"] >= last["recall"]  # of equally good ones the first
    assert f"Best recall: {first['recall']:.6g} at step 1, kept as checkpoint-1." in output
    assert "run the same command with --load_best_model_at_end" in output
    check_saved(workspace, tmp_path, last, names)
    run(train_command(workspace, tmp_path, **flags, load_best_model_at_end=""))
    check_saved(workspace, tmp_path, first, names)
    assert "| weights of step | 1 |" in (tmp_path / "pipeline" / "README.md").read_text()


def check_saved(workspace, folder, logged, names):
    """The pipeline of a run is that of a logged step: its metrics, its card, its grid."""
    pipe = DiTClassCondPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images, labels = ImageData(32, str(workspace / "data")).held_out("test", ["dark", "light"], torch.arange(2), 1000)
    samples = sample_images(pipe, labels, 0, guidance_scale=3.0, num_inference_steps=2)
    extractor = load_extractor(EFFICIENTNET)
    seen, reference = (extract(part, extractor) for part in (samples, images))
    seen.labels = reference.labels = [pipe.config.id2label[label] for label in labels.tolist()]
    full_names = [HELD_OUT_METRICS[name].full_name(EFFICIENTNET) for name in names]
    for name, found in compute_metrics(seen, reference, full_names).items():
        assert logged[name] == pytest.approx(found["value"], rel=1e-5, abs=1e-7), name
    card = (folder / "pipeline" / "README.md").read_text()
    assert all(f"| {logged[name]:.6g} |" in card for name in full_names)
    grid = folder / "samples" / f"step-{logged['step']:06d}.png"
    assert (folder / "pipeline" / "samples.png").read_bytes() == grid.read_bytes()


def validation_of(values):
    """A validation that gives these scores, step by step, and is killed where there is none."""

    def validate(step):
        if step not in values:
            raise KeyboardInterrupt
        return {"score": values[step]}

    return validate


def steps_of(folder):
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


def test_the_best_checkpoint_outlives_later_ones_and_a_kill(tmp_path):
    flags = {"max_train_steps": 8, "validation_steps": 1, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    flags |= {"metric_for_best_model": "score", "greater_is_better": True, "ema_profiles": True}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, validate=validation_of({1: math.nan, 2: 1.0, 3: 7.0, 4: 7.0}), **flags)
    assert steps_of(tmp_path) == [3, 4]  # 3 between the regular ones, 4 is no better
    kept = load_file(tmp_path / "checkpoint-3" / "states.safetensors")
    values = dict.fromkeys(range(5, 9), 2.0) | {6: math.nan, 7: math.inf}
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = train(tmp_path, validate=validation_of(values), **flags)
    assert steps_of(tmp_path) == [3, 8]
    assert [line["snapshot"] for line in read_log(tmp_path) if "snapshot" in line] == [2, 3, 4, 6, 8]
    assert trainer.load_best_model() == 3
    assert all(torch.equal(kept[f"ema.shadow_params.{i}"], w) for i, w in enumerate(trainer.ema.shadow_params))


def test_a_better_step_takes_the_place_of_the_best(tmp_path):
    flags = {"validation_steps": 1, "checkpointing_steps": 4, "checkpoints_total_limit": 1}
    train(tmp_path, validate=validation_of({1: 3.0, 2: 2.0, 3: 5.0, 4: 5.0}), metric_for_best_model="score", **flags)
    assert steps_of(tmp_path) == [2, 4]


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    with pytest.raises(ValueError, match="`metric_for_best_model` is 'fd', which is not logged; choose from .*score"):
        train(tmp_path, validate=validation_of({1: 1.0}), validation_steps=1, metric_for_best_model="fd")
