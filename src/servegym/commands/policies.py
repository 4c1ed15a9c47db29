"""`servegym policies`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.commands.console import make_console
from servegym.export.shipped import shipped_names, shipped_text
from servegym.problems.registry import PROBLEMS, find_problem


@dataclass(frozen=True)
class Policies:
    """List the rules of all problems, and the learned policies that come with servegym.

    Parameters are given as `name:key=value,key=value`.
    """

    problem: str | None = None
    """Only those of `dispatch`, `order` or `workflow`; see `servegym scenarios`."""

    def run(self) -> None:
        """Print the list."""
        problems = PROBLEMS.values() if self.problem is None else [find_problem(self.problem)]
        table = Table()
        for heading in ("problem", "policy", "information", "parameters", "rule", "source"):
            table.add_column(heading)
        for problem in problems:
            for name in problem.rules.names():
                information = problem.rules.make(name).information
                table.add_row(problem.name, name, information, *problem.rules.describe(name))
            if problem.name == "dispatch":
                for name in shipped_names():
                    text = shipped_text(name)
                    table.add_row(problem.name, name, "predictive", "", text, "assets/policies")
        make_console().print(table)
