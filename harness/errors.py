"""The one exception for bad input: the command line prints it as a single line and exits with status 2."""

from __future__ import annotations

import sys


class InputError(Exception):
    """What the user asked for cannot be done; the message names the key or file and what would be right."""


def complain(error: Exception) -> None:
    """The error as the one line that a user sees."""
    print(f"harness: {' '.join(str(error).split())}", file=sys.stderr)
