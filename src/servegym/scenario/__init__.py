"""Scenarios: what episodes of requests are drawn from."""

from servegym.scenario.scenario import (
    Scenario,
    load_scenario,
    open_loop,
    parse_scenario,
    scenario_names,
)

__all__ = ["Scenario", "load_scenario", "open_loop", "parse_scenario", "scenario_names"]
