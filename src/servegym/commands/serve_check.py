"""What `--check` of a server's file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from servegym.errors import ConfigError


def conclude_check(console: Console, path: Path, problems: Sequence[str], *, offline: bool) -> None:
    """Print what is wrong, a sentence each, or that the file is good.

    Args:
        console: To print on.
        path: Of the file.
        problems: What is wrong.
        offline: Whether the replicas were left out.

    Raises:
        ConfigError: If anything is wrong.
    """
    for problem in problems:
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise ConfigError(
            f"{path} names what is not as it should be ({len(problems)}, see above)"
            + ("" if offline else "; --offline leaves the replicas out of the check")
        )
    console.print(f"{path} is good")
