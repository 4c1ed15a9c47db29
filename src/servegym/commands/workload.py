"""Options that say what is played; shared by several commands."""

from __future__ import annotations

from servegym.scenario import Scenario, load_scenario, with_trace


def chosen_scenario(scenario: str, trace: str | None, rate_rps: float | None) -> Scenario:
    """Load a scenario, with its workload replaced if a trace is given."""
    loaded = load_scenario(scenario)
    return with_trace(loaded, trace, rate_rps) if trace else loaded
