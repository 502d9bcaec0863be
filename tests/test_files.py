"""Reading and writing files of the user."""

import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from dit_hf.files import (
    check_apart,
    check_file,
    check_links,
    check_writable,
    read_json,
    reading,
    remove_leftovers,
    writing,
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
        assert partial.suffix == ".png"
        partial.write_text("after")
    assert file.read_text() == "after"


KILLED = """
import os, sys
from dit_hf.files import writing
with writing(sys.argv[1]) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    file = tmp_path / "a[1].json"
    subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with writing(file) as partial:
        partial.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].json"]


def test_one_of_many_files_does_not_list_the_folder(tmp_path):
    """Leftovers of all are removed at once, those of running processes not."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "0.png")], check=False)
    with writing(tmp_path / "0.png", one_of_many=True) as partial:
        partial.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2
    with writing(tmp_path / "1.png", one_of_many=True) as partial:
        partial.write_text("whole")
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [partial.name, "0.png"]


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
    for path in (tmp_path / "file" / "grid.png", "/proc/grid.png", tmp_path / "pipe", "a\0b"):
        with pytest.raises(ValueError, match="can't be|is a pipe"):
            check_writable(path)


def test_output_in_the_data_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    check_apart(tmp_path / "latents", tmp_path / "images")
    check_apart(tmp_path, tmp_path / "images")
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
    check_links(snapshot)
    check_links(snapshot / "vae")
    secret = tmp_path / "secret"
    secret.write_text("token")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "inside").symlink_to("config.json")
    check_links(folder)
    for parent in (snapshot / "vae", folder):
        for target in (secret, tmp_path, tmp_path / "not-yet"):
            (parent / "link").symlink_to(target)
            with pytest.raises(ValueError, match="link is a link to .*, outside of"):
                check_links(parent)
            (parent / "link").unlink()
