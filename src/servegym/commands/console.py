"""The console that commands print on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from servegym.errors import ConfigError

#: Width of the output where it is no terminal, such as a file or a CI log.
PLAIN_WIDTH = 132


def require_writable(*paths: Path | None) -> None:
    """Refuse an output file that cannot be written before any work is done for it."""
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fits = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
        except OSError:
            fits = False
        if not fits:
            raise ConfigError(f"{path} cannot be written: give the name of a file in a folder")


class _PipedConsole(Console):
    """Leaves to the program how it ends when its reader has gone; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console() -> Console:
    """Return a console as wide as the terminal."""
    return _PipedConsole(width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=False)


def print_remarks(console: Console, remarks: Iterable[str]) -> None:
    """Print sentences as they are: they name files, which are no markup."""
    for remark in remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
