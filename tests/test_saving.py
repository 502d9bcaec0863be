"""Saving over a folder that holds an older save: it is replaced atomically, and other files stay."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_transformer, tiny_vae

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.files import writing_folder
from dit_hf.hub import CardFacts
from dit_hf.training.result import save_pipeline


@contextmanager
def file_size_limit(size):
    """Files larger than this can't be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_pipeline(**config):
    return DiTClassCondPipeline(tiny_transformer(**config), make_scheduler("ddim"), tiny_vae())


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_transformer], ids=["pipeline", "transformer"])
@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "150KB"}])
@pytest.mark.parametrize("limit", [20_000, 140_000])
def test_a_save_that_fails_changes_nothing(make, options, limit, tmp_path):
    """Neither in a folder that loads nor beside one that does not exist."""
    folder = tmp_path / "saved"
    make().save_pretrained(folder)
    before = content(tmp_path)
    new = make(num_layers=3, seed=1)
    for target in (folder, tmp_path / "new"):
        with file_size_limit(limit), pytest.raises(OSError, match=f"^{target} can't be written: [^/]*$"):
            new.save_pretrained(target, **options)
        assert content(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["saved"]
    new.save_pretrained(folder, **options)
    saved = type(new).from_pretrained(folder)
    pair = (saved, new) if isinstance(new, DiTTransformer2DModel) else (saved.transformer, new.transformer)
    assert_same_weights(*pair)


SHARDS = {"max_shard_size": "150KB"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (SHARDS, {}),
        ({}, SHARDS),
        (SHARDS, {"max_shard_size": "300KB"}),
        ({}, {"safe_serialization": False}),
        (SHARDS, {"safe_serialization": False}),
        ({"safe_serialization": False}, {}),
        (SHARDS | {"variant": "fp16"}, {"variant": "fp16"}),
    ],
)
def test_a_save_replaces_the_one_before_and_nothing_else(old, new, tmp_path):
    kept = tiny_transformer(seed=2)
    kept.save_pretrained(tmp_path, variant="other", **SHARDS)
    for name in ("notes.txt", "diffusion_pytorch_model.mine.safetensors", "diffusion_pytorch_model.txt"):
        (tmp_path / name).write_text("mine")
    others = content(tmp_path)
    tiny_transformer().save_pretrained(tmp_path, **old)
    model = tiny_transformer(num_layers=2, seed=1)
    model.save_pretrained(tmp_path, **new)
    variant = new.get("variant")
    assert_same_weights(DiTTransformer2DModel.from_pretrained(tmp_path, variant=variant), model)
    assert_same_weights(DiTTransformer2DModel.from_pretrained(tmp_path, variant="other"), kept)
    after = content(tmp_path)
    assert {path: after.pop(path, None) for path in others} == others
    model.save_pretrained(tmp_path / "fresh", **new)
    assert after.keys() == content(tmp_path / "fresh").keys() - others.keys()


def test_a_run_leaves_a_whole_pipeline_or_none(tmp_path):
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-000002.png").write_bytes(b"grid")
    before, facts = sorted(tmp_path.rglob("*")), CardFacts(recipe={"seed": 0})
    with file_size_limit(140_000), pytest.raises(OSError, match="pipeline can't be written"):
        save_pipeline(tiny_pipeline(), tmp_path, facts, 2)
    assert sorted(tmp_path.rglob("*")) == before
    card = (save_pipeline(tiny_pipeline(), tmp_path, facts, 2) / "README.md").read_text()
    assert f"# {tmp_path.name}\n" in card and "(samples.png)" in card and "(loss.png)" in card


def test_a_card_is_built_on_and_names_the_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "samples.png").write_bytes(b"")
    (tmp_path / "mine" / "README.md").write_text("My words.\n")
    tiny_pipeline().save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "My words." in card and "# mine" in card and "(samples.png)" in card


def test_what_can_not_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {"file": "is a file, not a folder", "loop": "symbolic links"}.items():
        for model in (tiny_transformer(), tiny_pipeline()):
            with pytest.raises(ValueError, match=message):
                model.save_pretrained(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_noticed_before_anything_moves(tmp_path):
    folder = tmp_path / "saved"
    (folder / "b").mkdir(parents=True)
    (folder / "a").write_text("old")
    error = pytest.raises(OSError, match="b is a folder; what was there before is unchanged")
    with error, writing_folder(folder) as new:
        new.mkdir()
        (new / "a").write_text("new")
        (new / "b").write_text("new")
    assert (folder / "a").read_text() == "old" and sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_a_signal_waits_until_all_files_have_moved(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    folder.mkdir()
    replace, before = os.replace, signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(source, target):
        replace(source, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), writing_folder(folder) as new:
        new.mkdir()
        for name in ("a", "b", "config.json"):
            (new / name).write_text("new")
    signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "config.json"]


def test_files_of_the_package_that_are_not_written_again_go(tmp_path):
    folder = tmp_path / "saved"
    (folder / "transformer").mkdir(parents=True)
    for name in ("transformer/projectors.safetensors", "transformer/notes.txt"):
        (folder / name).write_text("old")
    with writing_folder(folder, ("transformer/projectors.safetensors", "scheduling_*.py")) as new:
        new.mkdir()
        (new / "model_index.json").write_text("new")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"model_index.json", "transformer/notes.txt"}
