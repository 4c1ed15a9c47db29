"""`servegym tune`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import track

from servegym.commands.console import make_console, print_remarks
from servegym.errors import ConfigError
from servegym.evaluate.repeats import window_notes
from servegym.scenario import load_scenario
from servegym.train.tune import candidates, score


@dataclass(frozen=True)
class Tune:
    """Tune a rule's parameters on training seeds (never the held-out ones of `evaluate`)."""

    policy: str = "prefix-load"
    """Rule with tunable parameters."""
    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file."""
    loads: tuple[float, ...] = (0.8, 1.0)
    """Loads over which the scenario's objective is averaged."""
    budget: int = 200
    """Parameter settings to try."""
    seeds: int = 4
    """Training episodes per load."""

    def run(self) -> None:
        """Search and print the best setting."""
        scenario = load_scenario(self.scenario)
        for what, value in (("seeds", self.seeds), ("budget", self.budget)):
            if value < 1:
                raise ConfigError(f"{what} must be at least 1, got {value}")
        if not self.loads:
            raise ConfigError("there must be at least one load, got none")
        print_remarks(make_console(), window_notes(scenario, 1, None))
        best, best_score = "", float("inf")
        for text in track(candidates(self.policy, self.budget), "tuning", transient=True):
            got = score(scenario, text, self.loads, self.seeds)
            if got < best_score:
                best, best_score = text, got
        what = f"mean E2E {best_score:.3f} s"
        if scenario.objective == "goodput":
            what = f"{-best_score:.1%} of requests within their limits"
        make_console().print(f"{best}  ({what} on training seeds)")
