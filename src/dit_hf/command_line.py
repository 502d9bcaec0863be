"""How every script of this package ends when it was given something it can't use."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """
    Runs a script; bad input ends it with one line on stderr and exit code 2, Ctrl-C with 130, not with a traceback.

    Args:
        main (`Callable`): The script's main function; it raises `ValueError` or `OSError` with a message for the user.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
