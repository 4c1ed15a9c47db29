"""`servegym tune`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import track

from servegym.commands.console import make_console, print_remarks
from servegym.evaluate.tune import NUM_SEEDS, tune
from servegym.problems.registry import load_problem


@dataclass(frozen=True)
class Tune:
    """Tune a rule's parameters on training seeds (never the held-out ones of `evaluate`)."""

    policy: str = "prefix-load"
    """Rule with tunable parameters, of the scenario's problem; or a pair, `DISPATCH+ORDER`."""
    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file, of any problem."""
    loads: tuple[float, ...] = (0.8, 1.0)
    """Loads over which the scenario's objective is averaged."""
    budget: int = 200
    """Parameter settings to try."""
    seeds: int = NUM_SEEDS
    """Training episodes per load."""
    num_requests: int | None = None
    """Requests (or jobs) per episode, instead of the scenario's own number."""

    def run(self) -> None:
        """Search and print the best setting."""
        problem, scenario = load_problem(self.scenario)
        print_remarks(
            make_console(), problem.notes(scenario, [0], self.loads[:1], self.num_requests)
        )
        best = tune(
            problem,
            scenario,
            self.policy,
            self.loads,
            budget=self.budget,
            num_seeds=self.seeds,
            num_units=self.num_requests,
            track=lambda texts: track(texts, "tuning", transient=True),
        )
        what = problem.objective(scenario).loss_text(best.loss)
        make_console().print(f"{best.text}  ({what} on training seeds)")
