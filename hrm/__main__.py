"""The command `hrm`, which is `python -m hrm` too."""

import sys

from hrm.interrupt import leave_on_interrupt


def main() -> int:
    """Runs the words of the command line and returns the exit status; from here on Ctrl-C leaves no traceback."""
    leave_on_interrupt()
    from hrm.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
