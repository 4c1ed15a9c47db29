"""`servegym policies`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.baselines.registry import describe, names, policy
from servegym.commands.console import make_console


@dataclass(frozen=True)
class Policies:
    """List the dispatch rules; parameters are given as `name:key=value,key=value`."""

    def run(self) -> None:
        """Print the list."""
        table = Table()
        for heading in ("policy", "information", "parameters", "rule", "source"):
            table.add_column(heading)
        for name in names():
            params, text, source = describe(name)
            table.add_row(name, policy(name).information, params, text, source)
        make_console().print(table)
