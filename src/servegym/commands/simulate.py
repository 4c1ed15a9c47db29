"""`servegym simulate`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.commands.console import make_console, print_remarks
from servegym.commands.evaluate import stability
from servegym.commands.workload import Played
from servegym.costs.explain import costs_table
from servegym.evaluate.harness import evaluate
from servegym.evaluate.tune import resolve


@dataclass(frozen=True)
class Simulate(Played):
    """Play one policy on a scenario or trace and print all metrics."""

    policy: str | None = None
    """Rule (see `servegym policies`) or file of a learned policy; by default prefix-load, inside
    one engine fcfs, for jobs srpt-cp."""
    load: float = 1.0
    """Factor on the arrival rate, or on the number of clients."""
    seeds: int = 3
    """Episodes."""
    num_requests: int | None = None
    """Requests (or jobs) per episode, instead of the scenario's own number."""
    uncertainty: int = 0
    """Worlds in which kernels and engines are off as far as they may be, for bands; 0: none."""
    explain: bool = False
    """Also show what the steps of each replica type cost."""

    def run(self) -> None:
        """Simulate and print."""
        problem, scenario = self.posed()
        console = make_console()
        if self.explain:
            for replica, cost in problem.step_costs(scenario).items():
                console.print(costs_table(replica, cost))
        text = problem.default_policy if self.policy is None else self.policy
        policy = resolve(problem, scenario, text, (self.load,), self.num_requests)
        result = evaluate(
            scenario,
            [policy],
            loads=[self.load],
            num_seeds=self.seeds,
            num_units=self.num_requests,
        )
        print_remarks(console, result.notes)
        table = Table(title=f"{policy.name} on {scenario.name}, load {self.load:g}")
        table.add_column("metric")
        table.add_column(
            "mean over seeds" if len(result.seeds) > 1 else "one episode", justify="right"
        )
        found = None
        if self.uncertainty:
            found = stability(result, [policy], self.uncertainty, self.num_requests)
            table.add_column(f"90 % band, {self.uncertainty} worlds", justify="right")
        for key in result.runs[0].metrics:
            cells = [f"{result.mean(policy.name, self.load, key):.5g}"]
            if found is not None:
                low, high = found.band(policy.name, self.load, key)
                cells.append(f"{low:.5g} to {high:.5g}")
            table.add_row(key, *cells)
        console.print(table)
