"""The trainer as a library: custom objectives, averages, resuming, and what is refused, without a command line."""

import json
import signal
import threading
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import FIXTURES, tiny_transformer
from testing_utils.training_runs import read_log, train

from dit_hf.data.latents import CachedLatents
from dit_hf.training.alignment import AlignmentHead
from dit_hf.training.batches import check_batch
from dit_hf.training.checkpointing import checkpoint_to_resume
from dit_hf.training.config import RANGES, TrainingConfig
from dit_hf.training.ema import WeightAverage
from dit_hf.training.guard import TrainingStopped
from dit_hf.training.objectives import LogitNormal, MinSNR, Objective, VelocityObjective
from dit_hf.training.records import check_same_settings, record_settings
from dit_hf.training.running import StopRequest, lock_folder
from dit_hf.training.trainer import Trainer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class DataObjective(Objective):
    """Predicts the data from a mixture that is never pure noise; all of it defined in this file."""

    largest: float = 0.9
    name: ClassVar[str] = "data"
    prediction: ClassVar[str] = "velocity"
    sampler: ClassVar[str] = "flow_euler"

    def draw_time(self, count, generator):
        return self.largest * torch.rand(count, generator=generator)

    def add_noise(self, x_start, noise, time):
        return torch.lerp(x_start, noise, time.view(-1, 1, 1, 1))

    def timestep(self, time):
        return 1000 * time

    def sample_losses(self, output, batch):
        return (output - batch["x_start"]).square().flatten(1).mean(dim=1)

    def settings(self):
        return {"objective": self.name, "largest": self.largest}


def logged_losses(folder):
    return [line["loss"] for line in read_log(folder)]


def test_an_objective_of_ones_own_trains_and_resumes(tmp_path):
    straight = train(tmp_path / "straight", DataObjective(), learning_rate=0.02, max_train_steps=30)
    losses = logged_losses(tmp_path / "straight")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    record = json.loads((tmp_path / "straight" / "training_config.json").read_text())
    assert (record["objective"], record["largest"], record["total_batch_size"]) == ("data", 0.9, 4)

    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {"learning_rate": 0.02, "lr_scheduler": "constant"}
    whole = train(tmp_path / "whole", DataObjective(), **flags)
    train(tmp_path / "parts", DataObjective(), max_train_steps=2, **flags)
    resumed = train(tmp_path / "parts", DataObjective(), seed=1, **flags)  # its weights are the checkpoint's
    assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
    for weight, other in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        assert torch.equal(weight, other)
    with pytest.raises(ValueError, match=r"largest was 0.9 and is 0.5"):
        train(tmp_path / "straight", DataObjective(0.5), learning_rate=0.02, max_train_steps=31)
    assert straight.stopped_by == 0


def test_validation_sees_the_averaged_weights_and_is_logged(tmp_path):
    seen = []

    def validate(step):
        seen.append((step, trainer_weights[0].clone()))
        return {"score": float(step)}

    config = TrainingConfig(tmp_path, 4, max_train_steps=3, validation_steps=2, ema_decay=0.5, lr_warmup_steps=0)
    model = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False)
    trainer = Trainer(config, model, CachedLatents(FIXTURES / "emoji_latents"), VelocityObjective())
    trainer_weights = trainer.trainable()
    trainer.train(validate)
    assert [step for step, _ in seen] == [2, 3]  # every second step, and the last
    assert torch.equal(seen[-1][1], trainer.ema.shadow_params[0])
    assert not torch.equal(seen[-1][1], trainer_weights[0])
    assert trainer.metrics == {"score": 3.0}
    assert [line.get("score") for line in read_log(tmp_path)] == [None, 2.0, 3.0]


def test_the_average_has_the_decay_it_is_given():
    """The closed form from the initial weights, with diffusers' warm-up only where it is asked for."""
    values = [1.0, -2.0, 0.5, 3.0, 8.0, 1.5]
    weight = torch.nn.Parameter(torch.tensor([4.0]))
    constant = WeightAverage([weight], decay=0.9)
    warmed = WeightAverage([weight], decay=0.9, use_ema_warmup=True, power=0.75)
    for value in values:
        weight.data.fill_(value)
        constant.step([weight])
        warmed.step([weight])
    constant.step([weight], taken=torch.tensor(0.0))  # a step that was not taken
    count = len(values)
    assert constant.optimization_step == warmed.optimization_step == count
    closed = 0.9**count * 4.0 + sum(0.1 * 0.9 ** (count - 1 - index) * value for index, value in enumerate(values))
    torch.testing.assert_close(constant.shadow_params[0], torch.tensor([closed]))
    average = 4.0
    for index, value in enumerate(values):
        decay = min(0.9, 1 - (1 + index) ** -0.75)
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(warmed.shadow_params[0], torch.tensor([average]))


def test_a_decay_too_slow_for_the_run_is_named(tmp_path, caplog):
    train(tmp_path / "slow", max_train_steps=1, ema_decay=0.99)
    assert "the initial weights are 99 % of the average after 1 steps" in caplog.text
    caplog.clear()
    trainer = train(tmp_path / "warmed", max_train_steps=1, ema_decay=0.99, ema_warmup=True)
    assert not caplog.text
    assert trainer.ema.use_ema_warmup


def test_a_warm_up_as_long_as_the_run_is_named(tmp_path, caplog):
    train(tmp_path / "long", max_train_steps=1, lr_warmup_steps=1, ema_decay=0.0)
    assert "never reaches its peak: --lr_warmup_steps 1 of --max_train_steps 1" in caplog.text
    caplog.clear()
    train(tmp_path / "short", max_train_steps=2, lr_warmup_steps=1, ema_decay=0.0)
    assert not caplog.text


def test_the_checkpoint_to_resume_from(tmp_path):
    assert checkpoint_to_resume(tmp_path / "none") is None
    assert checkpoint_to_resume(tmp_path / "none", "never") is None
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert checkpoint_to_resume(tmp_path).name == "checkpoint-4"
    assert checkpoint_to_resume(tmp_path, "checkpoint-4") == tmp_path / "checkpoint-4"
    assert checkpoint_to_resume(tmp_path, tmp_path / "checkpoint-4") == tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match="holds checkpoint-2, checkpoint-4; resume .* or use a new --output_dir"):
        checkpoint_to_resume(tmp_path, "never")
    with pytest.raises(ValueError, match="also holds checkpoint-4, which resuming from checkpoint-2 would overwrite"):
        checkpoint_to_resume(tmp_path, tmp_path / "checkpoint-2")
    for other in ("checkpoint-3", tmp_path / "elsewhere" / "checkpoint-4"):
        with pytest.raises(ValueError, match="is not a checkpoint of .*, which holds checkpoint-2, checkpoint-4"):
            checkpoint_to_resume(tmp_path, other)


def test_never_resumes_leaves_the_run_as_it_is(tmp_path):
    train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="holds checkpoint-2, checkpoint-4"):
        train(tmp_path, resume_from_checkpoint="never", learning_rate=0.1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_of_an_older_version_resumes(tmp_path):
    """A setting that its record lacks is as 0.1 had it: warm-up, else the default; the batch was named otherwise."""
    train(tmp_path, max_train_steps=2, ema_warmup=True)
    file = tmp_path / "training_config.json"
    record = json.loads(file.read_text())
    record["train_batch_size"] = record.pop("total_batch_size")
    for name in ("ema_warmup", "resume_from_checkpoint", "cosine_loss"):
        del record[name]
    record["latents"] = None
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="ema_warmup was True and is False"):
        train(tmp_path)
    with pytest.raises(ValueError, match="total_batch_size was 4 and is 2"):
        train(tmp_path, total_batch_size=2, ema_warmup=True)
    train(tmp_path, ema_warmup=True)
    assert len(logged_losses(tmp_path)) == 4


def test_settings_are_compared_as_far_as_they_are_known(tmp_path):
    record_settings(tmp_path / "record.json", {"rate": 1, "steps": 5})
    check_same_settings(tmp_path / "record.json", {"rate": 1, "steps": 6, "new": 2}, ("steps",))
    check_same_settings(tmp_path / "record.json", {"rate": 1, "new": 2}, (), {"new": 2})
    with pytest.raises(ValueError, match="rate was 1 and is 2; new was 2 and is 3"):
        check_same_settings(tmp_path / "record.json", {"rate": 2, "new": 3}, (), {"new": 2})


def test_signal_handlers_are_restored(hangup, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def validate(step):
        assert [signal.getsignal(number) for number in numbers] != before
        signal.raise_signal(signal.SIGTERM)
        return {}

    trainer = train(tmp_path / "stopped", validate=validate, validation_steps=1)
    assert trainer.stopped_by == signal.SIGTERM
    assert len(logged_losses(tmp_path / "stopped")) == 2  # the step after the signal is saved
    assert (tmp_path / "stopped" / "checkpoint-2").exists()
    assert [signal.getsignal(number) for number in numbers] == before
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)  # of a terminal that is closed
        assert stop.signal == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == 0
    signal.signal(signal.SIGHUP, before[-1])
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before
    thread = threading.Thread(target=train, args=(tmp_path / "thread",))  # where Python takes no handlers
    thread.start()
    thread.join()
    assert len(logged_losses(tmp_path / "thread")) == 4


def test_a_folder_can_be_held_twice_by_one_process(tmp_path):
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
    train(tmp_path)


def test_arguments_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match="`class_dropout_prob` is 0.1, but the transformer has no null class"):
        train(tmp_path, model={"class_dropout_prob": 0.0})
    with pytest.raises(ValueError, match="An alignment head and a positive `proj_coeff` go together"):
        train(tmp_path, proj_coeff=0.5)
    with pytest.raises(ValueError, match="--total_batch_size 6 can't be split evenly over 2 processes"):
        check_batch(6, 2, 2)
    for name, value, allowed in (
        ("max_train_steps", 0, "at least 1"),
        ("flip_probability", 1.5, "at least 0 and at most 1"),
        ("ema_decay", 1.0, "below 1"),
        ("on_spike", "ignore", "one of skip, rewind, stop"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is .*{allowed}"):
            TrainingConfig(tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())


def test_labels_are_dropped_by_the_trainer_alone(tmp_path):
    """Also with a probability of 0, where a model with a null class would draw for itself."""
    for probability, model in ((0.0, {"class_dropout_prob": 0.9}), (0.0, {"class_dropout_prob": 0.0}), (1.0, {})):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = TrainingConfig(tmp_path / str(len(model)), 4, max_train_steps=1, class_dropout_prob=probability)
        transformer, seen = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False, **model), []
        transformer.class_embed.register_forward_hook(lambda module, args, output: seen.append(args[0]))  # noqa: B023
        trainer = Trainer(config, transformer, CachedLatents(FIXTURES / "emoji_latents"), VelocityObjective())
        batch = trainer.draw(0)
        trainer.backward(batch)
        expected = torch.full_like(batch["label"], 10) if probability else batch["label"]
        assert torch.equal(seen[0], expected)


def test_alignment_is_logged(tmp_path):
    latents = CachedLatents(FIXTURES / "emoji_latents")
    read = latents.read
    latents.read = lambda indices, flipped: read(indices, flipped) | {"features": torch.ones(len(indices), 4, 2, 2)}
    transformer = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False)
    config = TrainingConfig(tmp_path, 4, max_train_steps=1, proj_coeff=0.5)
    Trainer(config, transformer, latents, VelocityObjective(), alignment=AlignmentHead(transformer, 1, 4)).train()
    (line,) = read_log(tmp_path)
    assert 0 < line["alignment"] < 2


def test_time_samplers_count_as_settings():
    assert VelocityObjective(LogitNormal(0.5, 1.0)).settings()["time_sampling"] == "logit_normal(0.5, 1.0)"


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = {
    "learning_rate": (-1e-3, NAN, INF, "1e-3", None, True),
    "layer_decay": (0.0, -1.0, 1.5, NAN),
    "lr_warmup_steps": (-1, 2.5),
    "adam_beta2": (-0.1, 1.0, NAN),
    "weight_decay": (-0.1, INF, NAN),
    "max_grad_norm": (0.0, -1.0, NAN, -INF),
    "ema_decay": (-0.1, 1.0, NAN),
    "class_dropout_prob": (-0.1, 1.1, NAN),
    "flip_probability": (-0.1, NAN),
    "proj_coeff": (-1.0, INF, NAN),
    "seed": (-1, 2**32, 0.5),
    "max_train_steps": (0, -5, 2.5, "2", True),
    "checkpoints_total_limit": (0, -1),
    "lr_scheduler": ("piecewise_constant", "steps"),
    "gradient_checkpointing": ("no", 1),
    "output_dir": ("a\0b",),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_every_setting_has_a_range(tmp_path, name):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            TrainingConfig(**({"output_dir": tmp_path} | {name: value}))


def test_values_at_the_ends_of_their_ranges(tmp_path):
    ends = {"learning_rate": 0, "layer_decay": 1, "adam_beta2": 0, "max_grad_norm": INF, "ema_decay": 0.0}
    TrainingConfig(tmp_path, seed=2**32 - 1, checkpoints_total_limit=None, class_dropout_prob=1, **ends)
    numbers = [entry.name for entry in fields(TrainingConfig) if entry.type in (int, float, int | None)]
    assert set(numbers) == RANGES.keys()  # none is forgotten


def test_parts_of_objectives_have_ranges():
    for part, options in ((MinSNR, {"gamma": 0.0}), (MinSNR, {"gamma": NAN}), (LogitNormal, {"std": -1.0}),
                          (LogitNormal, {"mean": INF})):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            part(**options)


def test_a_run_that_trained_nothing_is_no_success(tmp_path):
    """All steps skipped, or weights that are not finite: an error, and checkpoints of the good ones only."""
    latents = CachedLatents(FIXTURES / "emoji_latents")
    read = latents.read
    latents.read = lambda *parts: {
        name: values * NAN if name == "mean" else values for name, values in read(*parts).items()
    }
    config = TrainingConfig(tmp_path / "nan", 4, max_train_steps=3, lr_warmup_steps=0)
    trainer = Trainer(
        config, tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False), latents, VelocityObjective()
    )
    with pytest.raises(TrainingStopped, match="Every one of the 3 steps was skipped"):
        trainer.train()
    assert (tmp_path / "nan" / "checkpoint-3").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainingConfig(tmp_path / "inf", 4, max_train_steps=3, lr_warmup_steps=0, checkpointing_steps=1)
    latents = CachedLatents(FIXTURES / "emoji_latents")
    trainer = Trainer(
        config, tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False), latents, VelocityObjective()
    )
    trainer.ema.shadow_params[0].fill_(float("inf"))
    with pytest.raises(TrainingStopped, match="not finite after step 1; there is no checkpoint before"):
        trainer.train()
    assert not (tmp_path / "inf" / "checkpoint-1").exists()


def test_an_output_that_is_a_file_or_in_the_data_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for name, message in (("file", "is a file"), ("file/run", "is a file"), ("dangling", "is a link to")):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    train(tmp_path / "link", max_train_steps=1)
    assert (tmp_path / "empty" / "checkpoint-1").exists()
