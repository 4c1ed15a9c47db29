"""Where commands print."""

from __future__ import annotations

import sys

from rich.console import Console

#: Width of the output where it is no terminal, such as a file or a CI log.
PLAIN_WIDTH = 132


def make_console() -> Console:
    """Return a console as wide as the terminal."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=False)
