"""Reading and writing files of the user."""

import errno
import os
import platform
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dit_hf.files import (
    check_apart,
    check_file,
    check_links,
    check_writable,
    content_of,
    is_occupied,
    partial_path,
    printable,
    read_json,
    reading,
    remove_leftovers,
    writing,
    writing_folder,
)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "loop").symlink_to("loop")
    assert check_file(tmp_path / "file") == tmp_path / "file"
    for path, reason in {
        tmp_path / "missing": "There is no file",
        tmp_path / "file" / "inside": "There is no file",
        tmp_path: "is a folder, not a file",
        tmp_path / "pipe": "is a pipe, socket or device",
        "/dev/zero": "is a pipe, socket or device",
        tmp_path / "loop": "can't be opened",
        "a\0b": "can't be opened",
        tmp_path / ("n" * 300): "can't be opened",
    }.items():
        with pytest.raises(ValueError, match=reason):
            check_file(path)
    with pytest.raises(ValueError, match="has 5 bytes; at most 4 are read"):
        check_file(tmp_path / "file", max_bytes=4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1, 2", "can't be read as JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b"[]", "must hold an object; it holds a list"),
        (b"[" * 100_000, "can't be read as JSON: RecursionError|can't be read as JSON: maximum recursion"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path, content, reason):
    file = tmp_path / "index.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"index.json {reason}"):
        read_json(file)


@pytest.mark.parametrize("error", [KeyError("a"), SafetensorError("bad header"), RecursionError(), EOFError()])
def test_any_error_of_a_library_names_the_file(error):
    with (
        pytest.raises(ValueError, match="^weights.pt can't be read as checkpoint: "),
        reading("weights.pt", "checkpoint"),
    ):
        raise error


def test_a_failed_write_keeps_what_was_there(tmp_path):
    file = tmp_path / "grid.png"
    file.write_text("before")
    with (
        pytest.raises(OSError, match="the disk is full; what was there before is unchanged"),
        writing(file) as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert file.read_text() == "before"
    with writing(file) as partial:
        assert partial.name == "grid.png"
        partial.write_text("after")
    assert file.read_text() == "after"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), SafetensorError("bad header"), KeyError("a")],
)
def test_an_error_of_the_caller_is_its_own(error, tmp_path):
    with pytest.raises(type(error)) as raised, writing(tmp_path / "grid.png"):
        raise error
    assert raised.value is error


def test_the_libraries_write_errors_are_known(tmp_path):
    """A limit on files ends a write as a full disk does."""
    weights = torch.zeros(5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writers = (
        ("the disk is full, or the file larger than is allowed", lambda path: torch.save(weights, path)),
        ("File too large", lambda path: torch.save(weights, path, _use_new_zipfile_serialization=False)),
        ("File too large", lambda path: save_file({"a": weights}, path)),
        ("Parent directory .* does not exist", lambda path: torch.save(weights, path / "missing" / "a.pt")),
        ("No such file or directory", lambda _: torch.save(weights, "/proc/a.pt")),
    )
    for reason, write in writers:
        reason = f"^{tmp_path / 'a.pt'} can't be written: {reason}\\.*$"
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match=reason), writing(tmp_path / "a.pt") as partial:
                write(partial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_threads_write_the_same_file_apart(tmp_path):
    with writing(tmp_path / "a.json") as mine, ThreadPoolExecutor() as pool:
        assert pool.submit(partial_path, tmp_path / "a.json").result() != mine
        mine.write_text("{}")


def test_leftovers_of_a_process_with_the_same_id_are_not_written_to(tmp_path):
    """As after the restart of a container."""
    leftover = partial_path(tmp_path / "pipe")
    leftover.mkdir()
    (leftover / "old").write_text("")
    with writing_folder(tmp_path / "pipe") as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["pipe"]


FILL = """
import os, sys
from pathlib import Path
from dit_hf.files import writing_folder
if sys.argv[2] == "moving":
    def replace(source, target):
        move(source, target)
        os.kill(os.getpid(), 9)
    move, os.replace = os.replace, replace
with writing_folder(sys.argv[1]) as partial:
    partial.mkdir()
    for name in ("model_index.json", "weights", "a"):
        (partial / name).write_text("new")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("killed", "left"), [("writing", []), ("moving", ["a"])])
def test_a_folder_that_exists_is_filled_after_a_kill(killed, left, tmp_path):
    """What makes it look complete comes last."""
    (tmp_path / "lost+found").mkdir()
    subprocess.run([sys.executable, "-c", FILL, str(tmp_path), killed], check=False)
    assert content_of(tmp_path) == left and is_occupied(tmp_path) == bool(left)
    assert len(list(tmp_path.glob(".dit_hf-partial-*"))) == 1
    subprocess.run([sys.executable, "-c", FILL, str(tmp_path), "no"], check=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "lost+found", "model_index.json", "weights"]


def test_what_occupies_a_folder(tmp_path):
    assert not is_occupied(tmp_path / "new")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert is_occupied(tmp_path / "dangling")
    folder = tmp_path / "folder"
    for name in (".dit_hf-partial-a-1-2-x", "lost+found", ".lock", ".lock_holder", ".DS_Store", "ours"):
        (folder / name).mkdir(parents=True)
    assert not is_occupied(folder, ours=("ours",))
    assert is_occupied(folder) and content_of(folder) == ["ours"]


def test_text_from_outside_stays_on_its_line():
    assert printable("a\nb\x1b[31m\u2028c\u202e é 猫") == "a\\nb\\x1b[31m\\u2028c\\u202e é 猫"


KILLED = """
import os, sys
from dit_hf.files import writing
with writing(sys.argv[1]) as partial:
    partial.write_text("half")
    partial.with_name(".tmpAbC123").write_text("as safetensors does")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    file = tmp_path / "a[1].json"
    subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".tmpmine").write_text("of another program")
    with writing(file) as partial:
        partial.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmpmine", "a[1].json"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    """A process of that number has ended."""
    ended = f"{platform.node()}-4194303-1"
    names = [f".partial-{ended}-a", f".dit_hf-partial-{platform.node()}-a", f"dit_hf-partial-{ended}-a", "partial-a"]
    for name in (*names, f".dit_hf-partial-{ended}-a"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == content_of(tmp_path) == sorted(names)


def test_one_of_many_files_does_not_list_the_folder(tmp_path):
    """Leftovers of all are removed at once, those of running processes not."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "0.png")], check=False)
    with writing(tmp_path / "0.png", one_of_many=True) as partial:
        partial.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2
    with writing(tmp_path / "1.png", one_of_many=True) as partial:
        partial.write_text("whole")
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [partial.parent.name, "0.png"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("before")
    (tmp_path / "link.json").symlink_to("real.json")
    with writing(tmp_path / "link.json") as partial:
        partial.write_text("after")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "after"


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "new" / "folder" / "grid.png")
    check_writable(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    (tmp_path / "loop").symlink_to("loop")
    looped = (tmp_path / "loop", tmp_path / "loop" / "new")
    for path in (tmp_path / "file" / "grid.png", "/proc/grid.png", tmp_path / "pipe", "a\0b", *looped):
        with pytest.raises(ValueError, match="can't be|is a pipe"):
            check_writable(path)


def test_output_in_the_data_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    check_apart(tmp_path / "latents", tmp_path / "images")
    check_apart(tmp_path, tmp_path / "images")
    check_apart(tmp_path, None)
    check_apart("user/dataset/out", "user/dataset")  # on the Hub
    for output in ("images", "images/latents", "link/latents", "other/../images/x"):
        with pytest.raises(ValueError, match="is in the folder"):
            check_apart(tmp_path / output, tmp_path / "images")


def test_links_that_leave_a_folder_are_refused(tmp_path):
    cache = tmp_path / "models--user--name"
    snapshot = cache / "snapshots" / "abc"
    (snapshot / "vae").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1").write_text("{}")
    (snapshot / "vae" / "config.json").symlink_to("../../../blobs/1")
    check_links(snapshot, "vae", "vae/config.json")
    check_links(snapshot / "vae", "config.json")
    secret = tmp_path / "secret"
    secret.write_text("token")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "inside").symlink_to("config.json")
    check_links(folder, "inside", "missing")
    for parent in (snapshot / "vae", folder):
        for target in (secret, tmp_path, tmp_path / "not-yet"):
            (parent / "link").symlink_to(target)
            with pytest.raises(ValueError, match="link is a link to .*, outside of"):
                check_links(parent, "link")
            check_links(parent, "other")
            (parent / "link").unlink()


def test_a_lack_of_memory_is_not_the_files():
    with pytest.raises(MemoryError), reading("a.png", "an image"):
        raise MemoryError
