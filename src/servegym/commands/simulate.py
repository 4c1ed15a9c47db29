"""`servegym simulate`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.commands.console import make_console, print_remarks
from servegym.commands.workload import Played
from servegym.costs.explain import costs_table
from servegym.evaluate.harness import evaluate
from servegym.export.resolve import resolve_order, resolve_policy
from servegym.policy.ordering import OrderingPolicy
from servegym.policy.policy import Policy

DEFAULT_POLICY = "prefix-load"


@dataclass(frozen=True)
class Simulate(Played):
    """Play one policy on a scenario or trace and print all metrics."""

    policy: str = DEFAULT_POLICY
    """Rule (see `servegym policies`) or exported policy.onnx; for one engine that goes by
    priorities an order (docs/preemption.md) or ordering.npz, by default fcfs."""
    load: float = 1.0
    """Factor on the arrival rate, or on the number of clients."""
    seeds: int = 3
    """Episodes."""
    num_requests: int | None = None
    """Requests per episode, instead of the scenario's own number."""
    explain: bool = False
    """Also show what the steps of each replica type cost."""

    def run(self) -> None:
        """Simulate and print."""
        scenario = self.chosen()
        console = make_console()
        if self.explain:
            for entry in scenario.fleet:
                console.print(costs_table(entry.gpu, scenario.step_cost(entry)))
        policy: Policy | OrderingPolicy
        if scenario.orders_requests:
            policy = resolve_order("fcfs" if self.policy == DEFAULT_POLICY else self.policy)
        else:
            policy = resolve_policy(self.policy)
        result = evaluate(
            scenario,
            [policy],
            loads=[self.load],
            num_seeds=self.seeds,
            num_requests=self.num_requests,
        )
        print_remarks(console, result.notes)
        table = Table(title=f"{policy.name} on {scenario.name}, load {self.load:g}")
        table.add_column("metric")
        table.add_column(
            "mean over seeds" if len(result.seeds) > 1 else "one episode", justify="right"
        )
        for key in result.runs[0].metrics:
            table.add_row(key, f"{result.mean(policy.name, self.load, key):.5g}")
        console.print(table)
