"""What every command shares: flags with ranges, and how it ends when it was given something it can't use."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from .files import printable


# How torch says so, on a CPU and on a GPU; an error of its own type only for the latter.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, without the list of all flags."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)} ({self.prog} --help lists all flags)\n")


def integer(at_least: int | None = None, at_most: int | None = None) -> Callable[[str], int]:
    """
    The type of a flag: a whole number of a range.

    Args:
        at_least, at_most (`int`, *optional*): The range, both ends included.

    Returns:
        `Callable`: for `add_argument(type=…)`.
    """
    return _number(int, "a whole number", at_least=at_least, at_most=at_most)


def real(
    at_least: float | None = None, at_most: float | None = None, above: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """
    The type of a flag: a finite number of a range.

    Args:
        at_least, at_most (`float`, *optional*): Ends that are included.
        above, below (`float`, *optional*): Ends that are not.

    Returns:
        `Callable`: for `add_argument(type=…)`.
    """
    return _number(float, "a finite number", at_least=at_least, at_most=at_most, above=above, below=below)


def _number(kind, what, at_least=None, at_most=None, above=None, below=None):
    bounds = {"at least": at_least, "at most": at_most, "above": above, "below": below}
    range_ = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def parse(text: str):
        try:
            value = kind(text)
            ok = math.isfinite(value)
        except (ValueError, OverflowError):
            ok = False
        ok = ok and (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        ok = ok and (above is None or value > above) and (below is None or value < below)
        if not ok:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{range_ and f' {range_}'}")
        return value

    return parse


def run(main: Callable[[], None]) -> None:
    """
    Runs a command. Bad input, a missing extra or too little memory ends it with one line on stderr and exit code 2,
    and Ctrl-C with 130, not with a traceback.

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
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        print(f"error: There is not enough memory. {printable(str(error))}".rstrip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
