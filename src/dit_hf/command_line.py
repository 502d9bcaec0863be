"""How a command ends when it was given something it can't use, or was interrupted."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """
    Runs a command. Bad input or a missing extra ends it with one line on stderr and exit code 2, and Ctrl-C with 130,
    not with a traceback.

    Args:
        main (`Callable`):
            The command's main function; it raises `ValueError`, `OSError` or `ImportError` with a message for users.
    """
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
