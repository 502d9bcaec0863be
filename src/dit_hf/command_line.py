"""What every command shares: flags with ranges, and how it ends when it was given something it can't use."""

import argparse
import math
import numbers
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .files import first_line, is_write_error, printable


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


def real(
    at_least: float | None = None, at_most: float | None = None, above: float | None = None, below: float | None = None
) -> Range:
    """The finite numbers of a range: `at_least` and `at_most` are included, `above` and `below` are not."""
    return Range(False, at_least, at_most, above, below)


def run(main: Callable[[], None]) -> None:
    """
    Runs a command. Bad input, a missing extra, a full disk or too little memory ends it with one line on stderr and
    exit code 2, and Ctrl-C with 130, not with a traceback.

    Args:
        main (`Callable`):
            The command's main function; it raises `ValueError`, `OSError` or `ImportError` with a message for users.
            Anything else is an error of the package, and shows its traceback.
    """
    try:
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
        print(f"error: {what} {printable(first_line(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
