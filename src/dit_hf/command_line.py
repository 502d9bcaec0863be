"""What every command shares: flags with ranges, and how it ends when it was given something it can't use."""

import argparse
import math
import numbers
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .files import first_line, is_write_error, printable, write_problem


# How torch says so, on a CPU and on a GPU; an error of its own type only for the latter.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, without the list of all flags."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | options)
        self.register("type", Path, _path)  # what `type=Path` calls

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's, which before Python 3.13 takes `--flag=--` for an empty list, past the flag's type."""
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            if arg.startswith("--") and arg.endswith("=--"):
                self.error(f"argument {arg.removesuffix('=--')}: expected a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)} ({self.prog} --help lists all flags)\n")


def _path(text):
    if not text:  # `Path("")` is the working folder
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


@dataclass(frozen=True)
class Range:
    """
    The values of a number: the type of a flag, for `add_argument(type=…)`, and the check of a setting in Python.

    Args:
        whole (`bool`): Whether it counts something.
        at_least, at_most, above, below (`float`, *optional*): The ends; infinity is no value.
        or_infinite (`bool`, defaults to `False`): Except where it stands for no bound.
    """

    whole: bool
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    or_infinite: bool = False

    def __str__(self):
        ends = {"at least": self.at_least, "at most": self.at_most, "above": self.above, "below": self.below}
        words = " and ".join(f"{word} {end}" for word, end in ends.items() if end is not None)
        what = "a whole number" if self.whole else "a finite number"
        return f"{what}{words and f' {words}'}{', or inf' if self.or_infinite else ''}"

    def __contains__(self, value: float) -> bool:
        ok = -math.inf < value < math.inf or (self.or_infinite and value == math.inf)
        ok = ok and (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        return ok and (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below)

    def __call__(self, text: str) -> Any:
        """The number that a flag is given."""
        with suppress(ValueError, OverflowError):
            if (value := int(text) if self.whole else float(text)) in self:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {self}")

    def check(self, name: str, value: Any) -> Any:
        """A setting as Python's own number, also if it is numpy's; `ValueError` if it is none, or out of range."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, kind) and not isinstance(value, bool):
            with suppress(OverflowError):
                number = int(value) if self.whole else float(value)  # type: ignore[call-overload]
                if number in self:
                    return number
        raise ValueError(f"`{name}` is {value!r}; it must be {self}.")


def integer(at_least: int | None = None, at_most: int | None = None) -> Range:
    """The whole numbers of a range, both ends included."""
    return Range(True, at_least, at_most)


def print_text(text: str) -> None:
    """Prints lines on a terminal of any encoding; what could change the terminal is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in text.splitlines():
        print(printable(line).encode(encoding, "replace").decode(encoding))


def names(text: str) -> list[str]:
    """The names of a flag, separated by commas, each once."""
    found = [name.strip() for name in text.split(",")]
    if len(set(found)) < len(found) or "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} must be names separated by commas, each once")
    return found


def real(
    at_least: float | None = None, at_most: float | None = None, above: float | None = None, below: float | None = None
) -> Range:
    """The finite numbers of a range: `at_least` and `at_most` are included, `above` and `below` are not."""
    return Range(False, at_least, at_most, above, below)


def run(main: Callable[[], None]) -> None:
    """
    Runs a command. Bad input, a missing extra, a full disk or too little memory ends it with one line on stderr and
    exit code 2, not with a traceback; so do Ctrl-C, SIGTERM and SIGHUP, with 128 + the signal's number.

    Args:
        main (`Callable`):
            The command's main function; it raises `ValueError`, `OSError` or `ImportError` with a message for users.
            Anything else is an error of the package, and shows its traceback.
    """
    try:
        with _signals_raised():
            main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        memory = isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
        )
        if not memory and not is_write_error(error):  # torch and safetensors have their own for a full disk
            raise
        what = "There is not enough memory." if memory else "A file can't be written:"
        reason = first_line(error) if memory else write_problem(error)
        print(f"error: {what} {printable(reason)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = error.args[0] if isinstance(error, Terminated) else signal.SIGINT
        _say_stopped(number)
        sys.exit(128 + number)


class Terminated(KeyboardInterrupt):
    """A signal, whose number it holds, that ends a command."""


@contextmanager
def _signals_raised():
    """Where nothing else handles Ctrl-C, SIGTERM and SIGHUP, they raise, so that what is half-written is removed."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows no handlers elsewhere
        found = (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
        before = {number: signal.getsignal(number) for number in found}
    before = {number: old for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _terminate(number, frame):
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # libraries catch what their imports raise
            _say_stopped(number)
            os._exit(128 + number)
        frame = frame.f_back
    raise Terminated(number)


def _say_stopped(number):
    with suppress(OSError):  # of a terminal that is closed
        print(f"Stopped by {signal.Signals(number).name}.", file=sys.stderr, flush=True)
