"""What keeps a GPU busy: batches made ahead, verdicts read late, no waiting for the device, float8, caches."""

import json
import math
import pickle
import sys
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import FIXTURES, ROOT, tiny_transformer
from testing_utils.scripts import run_forked
from testing_utils.training_runs import read_log
from torch.utils._python_dispatch import TorchDispatchMode

from dit_hf.data.latents import CachedLatents
from dit_hf.data.shards import RowReader
from dit_hf.training.batches import SeededBatches, draw_batch
from dit_hf.training.config import TrainingConfig
from dit_hf.training.guard import TrainingStopped
from dit_hf.training.objectives import EpsilonObjective, VelocityObjective
from dit_hf.training.prefetch import Prefetcher
from dit_hf.training.trainer import Trainer


LATENTS = FIXTURES / "emoji_latents"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def build(folder, precision="no", objective=VelocityObjective(), **settings):
    torch.manual_seed(0)
    options = {"learn_sigma": objective.name == "epsilon", "attention_head_dim": 16}
    model = tiny_transformer(sample_size=16, in_channels=8, **options)
    options = {"max_train_steps": 60, "checkpointing_steps": 20, "lr_warmup_steps": 0, "ema_profiles": True}
    config = TrainingConfig(folder, 4, **options | {"ema_decay": 0.5} | settings)
    accelerator = Accelerator(mixed_precision=precision)
    return Trainer(config, model, CachedLatents(LATENTS), objective, accelerator=accelerator)


def spoil(trainer, factors):
    """Draws in which the data of some steps are multiplied, by the number of the draw."""
    draw = trainer.draw

    def spoiled(step):
        batch = draw(step)
        return batch | {"x_start": batch["x_start"] * factors.get(step + trainer.guard.draw_offset, 1.0)}

    trainer.draw = spoiled
    return trainer


def logged(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_verdicts_that_are_read_late_are_the_same(policy, tmp_path):
    """A step that is not finite and one that leaps, read at once or with others; also without a fused optimizer."""
    factors = {3: math.nan, 52: 1e4} | dict.fromkeys(range(53, 57), math.nan)
    trainers = {}
    for name, settings in {"at once": {"logging_steps": 1}, "late": {"logging_steps": 7}}.items():
        trainer = spoil(build(tmp_path / name, on_spike=policy, **settings), factors)
        assert trainer.train() == 60
        trainers[name] = trainer
        AcceleratorState._reset_state(reset_partial_state=True)
    host = spoil(build(tmp_path / "host", on_spike=policy), factors)
    host.skips_by_itself = False
    host.train()
    expected = logged(tmp_path / "at once")
    assert [line["step"] for line in expected] == [*range(1, 61)]
    # After going back from step 53 to 40 the draws go on, and the bad ones come again as steps 41 to 44.
    skipped = {"skip": [4, *range(53, 58)], "rewind": [4, *range(41, 45)]}[policy]
    assert [line["step"] for line in expected if line.get("skipped")] == skipped
    for name, trainer in (("late", trainers["late"]), ("host", host)):
        assert str(logged(tmp_path / name)) == str(expected), name  # NaN is not itself
        for kept, other in zip(trainers["at once"].ema.shadow_params, trainer.ema.shadow_params, strict=True):
            assert torch.equal(kept, other)
        for kept, other in zip(trainers["at once"].trainable(), trainer.trainable(), strict=True):
            assert torch.equal(kept, other)
        assert trainer.guard.skipped == trainers["at once"].guard.skipped
        assert trainer.ema.optimization_step == trainer.profiles.steps == trainers["at once"].ema.optimization_step
    assert trainers["late"].guard.draw_offset == (0 if policy == "skip" else 13)


class Reads(TorchDispatchMode):
    """Counts what a host waits for a device for: reading a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_what_was_read_is_logged_before_an_error(tmp_path):
    """A spike that ends the run, and data that can't be read."""
    with pytest.raises(TrainingStopped, match="spiked at step 56"):
        spoil(build(tmp_path / "stop", on_spike="stop", logging_steps=20), {55: 1e4}).train()
    assert [line["step"] for line in read_log(tmp_path / "stop")] == [*range(1, 56)]
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = build(tmp_path / "data", logging_steps=20)
    draw = trainer.draw

    def broken(step):
        if step == 13:
            raise ValueError("sample 7 is not finite")
        return draw(step)

    trainer.draw = broken
    with pytest.raises(ValueError, match="sample 7"):
        trainer.train()
    assert [line["step"] for line in read_log(tmp_path / "data")] == [*range(1, 14)]


@pytest.mark.parametrize("objective", [VelocityObjective(), EpsilonObjective()])
@pytest.mark.parametrize("settings", [{}, {"ema_warmup": True, "gradient_accumulation_steps": 2}])
def test_a_step_reads_nothing_from_the_device(settings, objective, tmp_path):
    trainer = build(tmp_path, objective=objective, **settings)
    trainer.transformer._check_class_ids = lambda ids: None  # it reads ids that are on a CPU alone
    batch = trainer.draw(0)
    trainer._step(0, batch)  # the optimizer makes its state
    with Reads() as reads:
        trainer._step(1, batch)
    assert reads.count == 0
    trainer.skips_by_itself = False
    with Reads() as reads:
        trainer._step(2, batch)
    assert reads.count  # so it would be noticed


def test_batches_that_are_made_ahead_are_the_same(tmp_path):
    trainer = build(tmp_path)
    for workers in (0, 1, 3):
        with Prefetcher(trainer.draw, workers, 9) as batches:
            taken = {step: batches.take(step) for step in (0, 1, 2, 5, 6, 2, 8)}  # as after going back
        for step, batch in taken.items():
            for name, values in trainer.draw(step).items():
                assert torch.equal(batch[name], values)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_a_worker_raises_is_raised_where_its_batch_is_taken():
    def draw(step):
        if step == 2:
            raise ValueError("sample 7 is not finite")
        return {"step": torch.tensor(step)}

    with Prefetcher(draw, 2, 9) as batches:
        assert [batches.take(step)["step"] for step in (0, 1)] == [0, 1]
        with pytest.raises(ValueError, match="sample 7"):
            batches.take(2)


def test_the_loop_does_not_wait_for_batches_that_take_less_than_its_steps():
    def draw(step):
        time.sleep(0.03)
        return {"step": torch.tensor(step)}

    waited = []
    with Prefetcher(draw, 1, 20) as batches:
        for step in range(12):
            started = time.perf_counter()
            batches.take(step)
            waited.append(time.perf_counter() - started)
            time.sleep(0.06)
    assert waited[0] > 0.02 and sorted(waited[1:])[5] < 0.01


def test_a_share_of_a_batch_is_drawn_alone():
    """The same as that part of the whole batch, whatever else is drawn."""
    latents, batches = CachedLatents(LATENTS), SeededBatches(100, 8, seed=3)

    def draw(part):
        return draw_batch(latents, VelocityObjective(), batches, 5, part, 0.5, 0.5)

    whole, share = draw(slice(0, 8)), draw(slice(2, 4))
    for name, values in share.items():
        assert torch.equal(values, whole[name][2:4])
    noise = whole["noise"].flatten(1)
    assert len(noise.unique(dim=0)) == len(noise)  # no two samples have the same
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_batches_can_be_pickled():
    batches = SeededBatches(100, 10)
    assert torch.equal(pickle.loads(pickle.dumps(batches)).indices(3), batches.indices(3))


def test_orders_of_two_epochs_are_kept():
    batches = SeededBatches(100, 10)
    expected = [batches.indices(step) for step in range(20)]
    other = SeededBatches(100, 10)
    for step in (9, 10, 9, 10, 0, 19):
        assert torch.equal(other.indices(step), expected[step])
    assert set(other._orders) == {0, 1}


def test_a_shard_that_is_cut_is_named(tmp_path):
    content = (LATENTS / "shard-00000.safetensors").read_bytes()
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(content)
    rows = RowReader(shard)
    read = {name: torch.zeros(1, *rows.shapes[name][1:], dtype=rows.dtypes[name]) for name in ("mean", "std")}
    rows.read_into(read, [0], [3], [False])
    shard.write_bytes(content[:3000])
    with pytest.raises(ValueError, match="shard-00000.safetensors has changed since it was opened"):
        rows.read_into(read, [0], [99], [True])


def test_float8_trains_as_bfloat16_does(tmp_path, caplog):
    losses = {}
    for name, settings in {"bf16": {}, "float8": {"float8": True}}.items():
        trainer = build(tmp_path / name, precision="bf16", **settings)
        trainer.train()
        losses[name] = torch.tensor([line["loss"] for line in read_log(tmp_path / name)])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "A CPU has no float8: it is emulated" in caplog.text
    assert not torch.equal(losses["bf16"], losses["float8"])
    torch.testing.assert_close(losses["float8"].mean(), losses["bf16"].mean(), rtol=0.01, atol=0)


def test_settings_of_speed_that_do_not_exist_are_named(tmp_path):
    reasons = {"nothing": "can't be used: ", "_native_cudnn": "does not run on cpu in torch.float32: "}  # for GPUs
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"--attention_backend {name} {reason}.*[^.]\\.( |$)"):
            build(tmp_path, attention_backend=name)
    with pytest.raises(ValueError, match="`compile_blocks` is 'yes'; it must be True, False or None"):
        TrainingConfig(tmp_path, compile_blocks="yes")
    trainer = build(tmp_path, attention_backend="native")
    assert trainer.logging_steps == trainer.num_workers == 1  # of a CPU


def test_a_cache_of_a_million_images_in_small():
    result = run_forked([sys.executable, ROOT / "benchmarks" / "latents_cache.py", "--count", "5000", "--size", "8"])
    found = json.loads(result.stdout)
    assert found["images"] == 5000 and found["open_seconds"] < 5 and found["draw_ms"] > 0
