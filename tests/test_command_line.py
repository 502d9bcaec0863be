"""How commands end, and the ranges of their flags."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from dit_hf.command_line import ArgumentParser, integer, real, run


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (integer(at_least=0), "3", 3),
        (integer(at_least=0), "-1", None),
        (integer(), "1.5", None),
        (integer(at_most=2**63 - 1), "9" * 5000, None),
        (real(), "1e-4", 1e-4),
        (real(), "nan", None),
        (real(), "-inf", None),
        (real(), "1e999", None),
        (real(above=0), "0", None),
        (real(at_least=0, below=1), "1", None),
        (real(at_least=0, below=1), "0", 0.0),
    ],
)
def test_numbers_have_ranges(kind, text, value, capsys):
    parser = ArgumentParser(prog="dit-hf train")
    parser.add_argument("--number", type=kind)
    if value is not None:
        assert parser.parse_args([f"--number={text}"]).number == value
        return
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args([f"--number={text}"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --number: '")


def test_an_empty_path_is_not_the_working_folder(capsys):
    parser = ArgumentParser(prog="dit-hf train")
    parser.add_argument("--output_dir", type=Path)
    with pytest.raises(SystemExit):
        parser.parse_args(["--output_dir", ""])
    assert capsys.readouterr().err.startswith("error: argument --output_dir: the path is empty")
    with pytest.raises(SystemExit):
        parser.parse_args(["--output_dir=--"])
    assert capsys.readouterr().err.startswith("error: argument --output_dir: expected a value")
    assert parser.parse_args(["--output_dir", "a"]).output_dir == Path("a")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\nb"), 2),
        (OSError("a"), 2),
        (ImportError("a"), 2),
        (MemoryError(), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 2),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_bad_input_ends_with_one_line(error, code, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as exit_:
        run(command)
    assert exit_.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("main", ["write", "load"])
def test_a_signal_ends_with_one_line_and_the_shells_exit_code(number, main, tmp_path):
    """Nothing is left half-written, and no library that is imported can catch it."""
    (tmp_path / "library.py").write_text(f"import signal\ntry: signal.raise_signal({int(number)})\nexcept: pass\n")
    default = "default_int_handler" if number == signal.SIGINT else "SIG_DFL"  # a shell's background jobs ignore some
    script = f"""
import signal
signal.signal({int(number)}, signal.{default})
from dit_hf.command_line import run
from dit_hf.files import writing
def write():
    with writing("half") as partial:
        partial.write_text("half")
        signal.raise_signal({int(number)})
def load():
    import library
run({main})
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 128 + number
    assert result.stderr == f"Stopped by {number.name}.\n"
    assert not list(tmp_path.glob("*half*"))


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a"), RuntimeError("a"), AssertionError()])
def test_errors_of_the_package_keep_their_traceback(error):
    def command():
        raise error

    with pytest.raises(type(error)):
        run(command)


def test_settings_take_the_numbers_of_numpy():
    for value, allowed, expected in ((np.int64(3), integer(1), 3), (np.float32(0.5), real(below=1), 0.5)):
        found = allowed.check("name", value)
        assert found == expected and type(found) is type(expected)
    for value, allowed in ((np.float64(3), integer(1)), (True, integer(0)), ("1", real()), (10**400, real())):
        with pytest.raises(ValueError, match="`name` is .*; it must be a (whole|finite) number"):
            allowed.check("name", value)
