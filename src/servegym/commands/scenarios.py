"""`servegym scenarios`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.commands.console import make_console
from servegym.scenario import load_scenario, scenario_names
from servegym.workflow_scenario import load_workflow_scenario, workflow_scenario_names


@dataclass(frozen=True)
class Scenarios:
    """List the bundled scenarios, those of jobs last."""

    def run(self) -> None:
        """Print the list."""
        table = Table()
        for heading in ("scenario", "fleet", "at load 1", "what it is"):
            table.add_column(heading)
        for name in scenario_names():
            s = load_scenario(name)
            fleet = ", ".join(f"{e.count} {e.gpu}" for e in s.fleet)
            table.add_row(name, fleet, s.workload.pace, s.description)
        for name in workflow_scenario_names():
            w = load_workflow_scenario(name)
            entries = [f"{e.count} {e.gpu}" for e in w.engines]
            entries += [f"{e.count} {e.name}" for e in w.devices]
            rate = "all at 0" if w.rate_jobs_per_s is None else f"{w.rate_jobs_per_s:g} jobs/s"
            table.add_row(name, ", ".join(entries), rate, w.description)
        make_console().print(table)
