"""The guard of the loss, the lock of a folder, the end by signal."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from copy import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from testing_utils.training_runs import HOLD

from dit_hf.training.guard import MIN_HISTORY, LossGuard, TrainingStopped, check_losses
from dit_hf.training.running import lock_folder, run_on_main, start_accelerator


def settled(policy="skip", **options):
    """A guard with a history of losses around 1."""
    guard = LossGuard(policy, **options)
    for step in range(MIN_HISTORY):
        assert judge(guard, step + 1, 1 + 0.01 * (step % 3), 1.0) == "step"
    return guard


def judge(guard, step, loss, norm):
    """As the trainer that reads a verdict at once."""
    return guard.verdict(step, guard.measure(torch.tensor(loss), torch.tensor(norm)).tolist())


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("policy", ["skip", "rewind", "stop"])
def test_what_is_not_finite_is_left_out_whatever_the_policy(policy, loss, norm):
    guard = settled(policy)
    assert judge(guard, 51, loss, norm) == "skip"
    assert guard.skipped == 1
    assert judge(guard, 52, 1.0, 1.0) == "step"


def test_a_spike_is_what_leaves_the_recent_losses_far_behind():
    assert judge(settled(), 51, 1.05, 1.0) == "step"
    assert judge(settled(), 51, 2.0, 1.0) == "skip"
    assert judge(settled("rewind"), 51, 2.0, 1.0) == "rewind"
    with pytest.raises(TrainingStopped, match="step 51: loss 2 above 1.0"):
        judge(settled("stop"), 51, 2.0, 1.0)
    assert judge(LossGuard(), 1, 1e9, 1.0) == "step"  # a fresh run has no history


def test_a_spike_does_not_move_the_bound():
    guard = settled()
    bound = guard.bound
    judge(guard, 51, 100.0, 1.0)
    assert guard.bound == bound


def test_bad_steps_without_end_stop_with_a_diagnosis():
    guard = settled(max_in_a_row=2)
    assert [judge(guard, step, math.nan, 1.0) for step in (51, 52)] == ["skip", "skip"]
    with pytest.raises(TrainingStopped, match="3 bad steps in a row, the last at step 53.*learning rate"):
        judge(guard, 53, math.nan, 1.0)


def test_state_survives_and_a_rewound_run_gets_other_batches():
    guard = settled("rewind")
    state = guard.state_dict()
    judge(guard, 51, 9.0, 1.0)
    before = copy(guard)
    guard.load_state_dict(state)
    assert (guard.skipped, guard.draw_offset) == (0, 0)
    guard.rewound(51, 40, before)
    assert (guard.skipped, guard.draw_offset) == (1, 11)
    again = LossGuard("rewind")
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()
    older = {name: value for name, value in guard.state_dict().items() if not name.startswith("rew")}
    again.load_state_dict(older)
    assert (again.draw_offset, again.bound) == (11, guard.bound)
    assert again.bound == guard.bound


def test_going_back_without_end_stops_with_a_diagnosis():
    """A rate that is too high leaps again some hundred good steps after each return."""
    guard = settled("rewind", max_in_a_row=2)

    def go_back(to_step):
        nonlocal guard
        state = guard.state_dict()
        assert judge(guard, 90, 9.0, 1.0) == "rewind"
        before = copy(guard)
        guard.load_state_dict(state)
        guard.rewound(90, to_step, before)
        assert judge(guard, to_step + 1, 1.0, 1.0) == "step"

    for to_step in (40, 40, 60, 60):
        go_back(to_step)
    with pytest.raises(TrainingStopped, match="step 90, after 2 returns to step 60"):
        go_back(60)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="'ignore'.*skip, rewind, stop"):
        LossGuard("ignore")


def test_processes_that_do_not_know_of_each_other_are_refused():
    """As from a configuration for GPUs where there are none."""
    code = "from dit_hf.training.running import start_accelerator; start_accelerator()"
    environment = os.environ | {"WORLD_SIZE": "2"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "WORLD_SIZE is 2" in result.stderr and "cpu.yaml" in result.stderr


def test_a_folder_is_one_runs_and_a_dead_run_leaves_no_lock(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use by another run"), lock_folder(tmp_path):
        pass
    other.kill()
    other.wait()
    with lock_folder(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for name in (".lock", ".lock_holder"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "mine.txt")
        with pytest.raises(ValueError, match=f"{name} is a link"), lock_folder(tmp_path):
            pass
        (tmp_path / name).unlink()
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"])
def test_bad_variables_of_accelerate_are_named(variable, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(ValueError, match=f"accelerate can't start: .*{variable}"):
        start_accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_that_made_things_worse_is_no_success(caplog):
    check_losses([1.0] * 9)  # too short to tell
    check_losses([-1.0] * 300)
    assert "did not fall" in caplog.text
    check_losses([1.0 + 0.1 * (step % 7) for step in range(300)])  # fine-tuning of good weights
    check_losses([1.0, 9.0] * 20 + [2.5, 9.0] * 20)  # noise
    for losses in ([1.0] * 100 + [3.0] * 200, [10.0**step for step in range(20)], [1.0] * 10 + [math.inf] * 10):
        with pytest.raises(TrainingStopped, match="no better: the loss was 1.* The result is not saved"):
            check_losses(losses)


@pytest.mark.parametrize(
    ("must_fall", "losses", "refused"),
    [(True, [1.0] * 250, True), (True, [1.0] * 125 + [1.2] * 125, True), (False, [1.0] * 125 + [1.2] * 125, False),
     (True, [1.0] * 100, False), (True, [1.0] * 125 + [0.9] * 125, False)],
)  # fmt: skip
def test_a_long_run_from_scratch_has_to_improve(must_fall, losses, refused):
    with pytest.raises(TrainingStopped, match="no better") if refused else nullcontext():
        check_losses(losses, must_fall)


def test_noise_does_not_refuse_a_run():
    """Losses with 30 % noise that fall by 5 %, in 100 runs of 200 steps."""
    generator = torch.Generator().manual_seed(0)
    falling = torch.linspace(1, 0.95, 200)
    for _ in range(100):
        check_losses((falling * (1 + 0.3 * torch.randn(200, generator=generator))).tolist(), must_fall=True)


def test_what_the_main_process_refuses_ends_it():
    def refuse():
        raise TrainingStopped("no")

    with pytest.raises(TrainingStopped, match="no"):
        run_on_main(start_accelerator(), refuse)
