"""`servegym scenarios`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.commands.console import make_console
from servegym.problems.registry import load_problem, scenario_names


@dataclass(frozen=True)
class Scenarios:
    """List the bundled scenarios, problem by problem."""

    def run(self) -> None:
        """Print the list."""
        table = Table()
        for heading in ("scenario", "problem", "fleet", "at load 1", "what it is"):
            table.add_column(heading)
        for name in scenario_names():
            problem, scenario = load_problem(name)
            fleet, pace = problem.fleet(scenario), problem.pace(scenario)
            table.add_row(name, problem.name, fleet, pace, scenario.description)
        make_console().print(table)
