"""`servegym scenarios`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.commands.console import make_console
from servegym.scenario import load_scenario, scenario_names


@dataclass(frozen=True)
class Scenarios:
    """List the bundled scenarios."""

    def run(self) -> None:
        """Print the list."""
        table = Table()
        for heading in ("scenario", "fleet", "rate at load 1", "what it is"):
            table.add_column(heading)
        for name in scenario_names():
            s = load_scenario(name)
            fleet = ", ".join(f"{e.count} {e.gpu}" for e in s.fleet)
            table.add_row(name, fleet, f"{s.workload.rate_rps:g}/s", s.description)
        make_console().print(table)
