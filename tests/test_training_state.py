"""Checkpoints of others: nothing in one runs code, damage is named before anything is loaded, older ones resume."""

import json
import os
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import FIXTURES, ROOT, tiny_transformer
from safetensors.torch import load_file
from testing_utils.training_runs import Code, losses, read_log, train

from dit_hf.data.latents import CachedLatents
from dit_hf.training.checkpointing import load_checkpoint, save_checkpoint
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import VelocityObjective
from dit_hf.training.records import check_written_links
from dit_hf.training.saved_state import (
    MANIFEST,
    STATES,
    TENSORS,
    check_checkpoint,
    read_json,
    weights_only,
    write_manifest,
)
from dit_hf.training.trainer import Trainer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, with checkpoints 1 and 2."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("state") / "run"
    train(folder, max_train_steps=2, checkpointing_steps=1, lr_scheduler="constant", ema_profiles=True)
    return folder


def of_version_02(checkpoint):
    """The same checkpoint as version 0.2 wrote it: accelerate's pickles of our states, and no list of files."""
    plain, tensors = read_json(checkpoint / STATES), load_file(checkpoint / TENSORS)

    def filled(value):
        if isinstance(value, dict):
            return tensors[value["tensor"]] if value.keys() == {"tensor"} else {k: filled(v) for k, v in value.items()}
        return [filled(item) for item in value] if isinstance(value, list) else value

    states = filled(plain)
    if "profiles" in states:
        states["profiles"]["averages"] = {float(key): kept for key, kept in states["profiles"]["averages"].items()}
    for index, name in enumerate(name for name in ("ema", "schedule", "guard", "profiles") if name in states):
        torch.save(states[name], checkpoint / f"custom_checkpoint_{index}.pkl")
    for name in (MANIFEST, STATES, TENSORS):
        (checkpoint / name).unlink()


PICKLES = (
    *("custom_checkpoint_0.pkl", "custom_checkpoint_9.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"),
    *("sampler.bin", "pytorch_model.bin", "scaler.pt", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
    *("pytorch_model/mp_rank_00_model_states.pt", "dl_state_dict.bin"),
)


@pytest.mark.parametrize("older", [False, True], ids=["0.3", "0.2"])
def test_no_pickle_of_a_checkpoint_runs_code(run, tmp_path, older):
    """Neither as a training resumes nor in any checkpoint that is loaded, whichever library would open the file."""
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    if older:
        of_version_02(checkpoint)
    for name in PICKLES:
        marker, path = tmp_path / "marker", checkpoint / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        if path.name == ".metadata":
            path.write_bytes(pickle.dumps(Code(marker)))
        else:
            torch.save(Code(marker), path)
        for manifest in (False, True) if not older else (False,):  # the list, too, may be the attacker's
            if manifest:
                files = read_json(run / "checkpoint-2" / MANIFEST)
                files["files"][name] = {"bytes": path.stat().st_size, "sha256": ""}
                (checkpoint / MANIFEST).write_text(str(files).replace("'", '"'))
            with pytest.raises(ValueError, match=name.replace(".", r"\.")) as refused:
                train(tmp_path / "run", max_train_steps=3, lr_scheduler="constant", ema_profiles=True)
            assert "To resume from checkpoint-1, move checkpoint-2" in str(refused.value)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                load_checkpoint(Accelerator(), checkpoint, {})
            assert not marker.exists(), name
        shutil.copyfile(run / "checkpoint-2" / MANIFEST, checkpoint / MANIFEST) if not older else None
        path.unlink() if before is None else path.write_bytes(before)
    torch.save(Code(tmp_path / "marker"), tmp_path / "any.pkl")
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "any.pkl", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "any.pkl", weights_only=False)
    assert (tmp_path / "marker").exists()  # it would have run


def list_again(checkpoint):
    """The list of a checkpoint's files, too, may be the attacker's."""
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, 2)


def forge(checkpoint, name, key, value):
    states = read_json(checkpoint / STATES)
    states[name][key] = value
    (checkpoint / STATES).write_text(json.dumps(states))
    list_again(checkpoint)


def shrink(state):
    """Moments smaller than their weights: the fused kernel would write past their end."""
    for entry in state["state"].values():
        entry |= {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (shrink, r"exp_avg of torch.Size\(\[1\]\) for a parameter of"),
        (lambda state: state["param_groups"][0]["params"].reverse(), "exp_avg of .* for a parameter of"),
        (lambda state: state["param_groups"][0].update(maximize=True), "has maximize of another run"),
        (lambda state: state["param_groups"][0].update(betas=None), "has betas of another run"),
        (lambda state: state["param_groups"][0].update(lr=-1.0), "has the learning rate -1.0"),
        (lambda state: state["param_groups"][0].update(lr="x"), "has the learning rate 'x'"),
        (lambda state: state["state"][0].update(step=torch.tensor(9.0)), "has step 9.0; it must be 2"),
        (lambda state: state["param_groups"][0].update(lr=0.1), "has the learning rate 0.1 .* at most 0.001"),
    ],
)
def test_a_forged_optimizer_is_refused(run, tmp_path, forge, message):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    forge(state)
    torch.save(state, checkpoint / "optimizer.bin")
    list_again(checkpoint)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", max_train_steps=3, lr_scheduler="constant", ema_profiles=True)


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("schedule", "base_lrs", [5.0] * 4, r"\[0.001, 0.001, 0.001, 0.001\]"),
        ("schedule", "last_epoch", 1, "2"),
        ("schedule", "_step_count", 9, "3"),
        ("ema", "decay", 0.9, "0.5"),
        ("ema", "power", 0.5, "0.75"),
        ("ema", "optimization_step", 900, "a whole number at least 0 and at most 2"),
        ("guard", "skipped", 1, "a whole number at least 0 and at most 0"),
        ("guard", "skipped", 2**60, "a whole number at least 0 and at most 0"),
        ("guard", "in_a_row", 5, "a whole number at least 0 and at most 0"),
        ("guard", "draw_offset", -4, "a whole number at least 0"),
        ("guard", "rewinds", 90, "a whole number at least 0 and at most 10"),
        ("guard", "recent", [0.0] * 60, "2 finite losses"),
        ("guard", "recent", [0.0, float("nan")], "2 finite losses"),
        ("profiles", "steps", 1, "2"),
    ],
)
def test_a_forged_state_is_refused(run, tmp_path, name, key, value, expected):
    shutil.copytree(run, tmp_path / "run")
    forge(tmp_path / "run" / "checkpoint-2", name, key, value)
    with pytest.raises(ValueError, match=f"states.json has {name}.{key} = .*; it must be {expected}"):
        train(tmp_path / "run", max_train_steps=3, lr_scheduler="constant", ema_profiles=True)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("guard", "draw_offset", 1.5), ("guard", "recent", "x"), ("schedule", "lr_lambdas", [{}] * 9)],
)
def test_a_state_of_another_kind_is_refused(run, tmp_path, name, key, value):
    shutil.copytree(run, tmp_path / "run")
    forge(tmp_path / "run" / "checkpoint-2", name, key, value)
    with pytest.raises(ValueError, match=f"states.json does not hold the state '{name}' of this run"):
        train(tmp_path / "run", max_train_steps=3, lr_scheduler="constant", ema_profiles=True)


def test_a_state_replaces_no_method(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for key in ("step", "optimizer"):
        forge(tmp_path / "run" / "checkpoint-2", "schedule", key, 1)
    assert train(tmp_path / "run", max_train_steps=3, lr_scheduler="constant", ema_profiles=True).ema


def test_a_rewind_opens_no_code(tmp_path):
    steps = {"max_train_steps": 6, "checkpointing_steps": 2, "dataloader_num_workers": 0}  # drawn when they are due
    config = TrainingConfig(tmp_path / "run", 4, **steps, on_spike="rewind")
    model = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False)
    trainer = Trainer(config, model, CachedLatents(FIXTURES / "emoji_latents"), VelocityObjective())
    draw = trainer.draw

    def plant(step):
        if step == 3:
            torch.save(Code(tmp_path / "marker"), tmp_path / "run" / "checkpoint-2" / "custom_checkpoint_0.pkl")
            # Whatever the next loss, it is a spike.
            trainer.guard.load_state_dict(trainer.guard.state_dict() | {"recent": [0.0] * 200})
        return draw(step)

    trainer.draw = plant
    with pytest.raises(ValueError, match=r"custom_checkpoint_0\.pkl does not belong"):
        trainer.train()
    assert not (tmp_path / "marker").exists()


def test_a_checkpoint_of_version_02_resumes_to_the_bit(run, tmp_path):
    flags = {"max_train_steps": 4, "lr_scheduler": "constant", "ema_profiles": True}
    for name in ("new", "old"):
        shutil.copytree(run, tmp_path / name)
        if name == "old":
            of_version_02(tmp_path / name / "checkpoint-2")
        train(tmp_path / name, **flags)
    assert torch.equal(losses(tmp_path / "old"), losses(tmp_path / "new"))
    for snapshot in (tmp_path / "new" / "ema").iterdir():
        kept, other = load_file(snapshot), load_file(tmp_path / "old" / "ema" / snapshot.name)
        assert all(torch.equal(kept[name], other[name]) for name in kept)
    final = [load_file(tmp_path / name / "checkpoint-4" / TENSORS) for name in ("new", "old")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def damage(path, kind):
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "missing":
        path.unlink()
    elif kind == "linked":
        path.rename(path.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent / "elsewhere")
    elif kind == "added":
        path.write_text("notes")
    elif kind == "renamed":
        path.parent.rename(path.parent.with_name("checkpoint-7"))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("model.safetensors", "cut", "model.safetensors is damaged: it has .* bytes of"),
        ("model.safetensors", "flipped", "model.safetensors is damaged: its checksum"),
        ("optimizer.bin", "flipped", "optimizer.bin is damaged: its checksum"),
        ("states.safetensors", "missing", "lacks states.safetensors"),
        ("states.json", "linked", "states.json is a link"),
        ("notes.txt", "added", "notes.txt does not belong"),
        ("checkpoint.json", "flipped", "checkpoint.json|checksum|bytes of|lacks|belong"),
        ("optimizer.bin", "renamed", "checkpoint-7 holds the checkpoint of step 2"),
    ],
)
def test_damage_is_named_with_the_way_out(run, tmp_path, name, kind, message):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-2" / name, kind)
    before = (tmp_path / "run" / "train_log.jsonl").read_bytes()
    settings = (tmp_path / "run" / "training_config.json").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path / "run", max_train_steps=9, lr_scheduler="constant", ema_profiles=True)
    assert "To resume from checkpoint-1, move checkpoint-" in str(error.value)
    assert (tmp_path / "run" / "train_log.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "training_config.json").read_bytes() == settings


def test_cut_pickles_of_version_02_are_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    of_version_02(checkpoint)
    check_checkpoint(checkpoint)
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        whole = (checkpoint / name).read_bytes()
        damage(checkpoint / name, "cut")
        with pytest.raises(ValueError, match=f"{name} can't be read"):
            check_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(whole)


def test_what_file_browsers_and_nfs_leave_is_no_damage(run, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs000000a1"):
        (tmp_path / "checkpoint-2" / name).write_bytes(b"x")
    check_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    write_manifest(tmp_path / "checkpoint-2", 2, ["only-there.bin"])
    check_checkpoint(tmp_path / "checkpoint-2")


def test_an_error_of_ours_is_not_the_files(run, tmp_path):
    """Neither a full disk nor a damaged file."""

    class Broken:
        def state_dict(self):
            raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="^CUDA error"):
        save_checkpoint(Accelerator(), tmp_path, 1, states={"broken": Broken()})


def test_a_damaged_log_or_record_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    flags = {"max_train_steps": 3, "lr_scheduler": "constant", "ema_profiles": True}
    for name, text, message in (
        ("train_log.jsonl", '{"step": 1}\n[]\n{"step": 2}\n', "train_log.jsonl is damaged: line 2"),
        ("training_config.json", "{", "training_config.json can't be read as JSON"),
        ("training_config.json", "[]", "training_config.json must hold an object"),
    ):
        before = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", **flags)
        (tmp_path / "run" / name).write_text(before)
    train(tmp_path / "run", **flags)


def test_a_run_without_its_checkpoints_is_not_overwritten(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for step in (1, 2):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "pipeline").mkdir()
    (tmp_path / "run" / "pipeline" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"no checkpoint .* ema/ema-1-0.05.* pipeline, train_log.jsonl, which"):
        train(tmp_path / "run", max_train_steps=1)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["train_log.jsonl", "samples/step-000006.png", "pipeline", "checkpoint-9"])
def test_links_that_a_run_would_write_through_are_refused(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    (tmp_path / "out" / "latents").symlink_to(tmp_path)  # not written by a run
    with pytest.raises(ValueError, match=f"{name} is a link to .*victim, outside of"):
        check_written_links(tmp_path / "out", ("train_log.jsonl", "samples", "pipeline"))
    path.unlink()
    check_written_links(tmp_path / "out", ("train_log.jsonl", "samples", "pipeline"))
    assert victim.read_text() == "mine"


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    def kill(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, validate=kill, validation_steps=1)
    leftover = tmp_path / ".dit_hf-partial-checkpoint-9"
    leftover.mkdir()  # of a kill while it was written
    mine = [tmp_path / name for name in ("partial-checkpoint-9", ".partial-mine.txt", ".dit_hf-partial-mine")]
    for path in mine:
        path.write_text("no leftover")
    train(tmp_path, max_train_steps=4)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4]
    assert not leftover.exists() and all(path.exists() for path in mine)
    shutil.rmtree(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="no checkpoint to resume from, but holds train_log.jsonl"):
        train(tmp_path)


def test_what_is_not_of_a_training_is_not_overwritten(tmp_path):
    (tmp_path / "training_config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="training_config.json is not of this package"):
        train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_config.json"]


def test_a_failed_validation_loses_no_step(tmp_path):
    def fail(step):
        raise ValueError("can't be sampled")

    with pytest.raises(ValueError, match="can't be sampled"):
        train(tmp_path, validate=fail, validation_steps=3)
    assert (tmp_path / "checkpoint-3").exists()
    train(tmp_path)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4]


def test_every_load_of_a_pickle_in_the_package_is_restricted():
    """`torch.load` only with `weights_only=True`, and no other reader of pickles but the one that vets an index."""
    allowed = {"saved_state.py"}
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        text = path.read_text()
        loads = text.count("torch.load(")
        assert loads == text.count("weights_only=True"), path
        if path.name not in allowed:
            assert "pickle.load" not in text and "Unpickler" not in text and "allow_pickle=True" not in text, path
