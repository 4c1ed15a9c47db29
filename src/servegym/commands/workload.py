"""Options that say what is played; shared by several commands."""

from __future__ import annotations

from pathlib import Path

import yaml

from servegym.commands.console import make_console
from servegym.scenario import Scenario, load_scenario, with_trace
from servegym.workloads.config import TraceConfig
from servegym.workloads.readers import OnBadRow


def chosen_scenario(
    scenario: str,
    trace: str | None = None,
    rate_rps: float | None = None,
    on_bad_row: OnBadRow = "error",
) -> Scenario:
    """Load a scenario, with its workload replaced if a trace is given; say what was skipped."""
    loaded = load_scenario(scenario)
    if not trace:
        return loaded
    chosen = with_trace(loaded, trace, rate_rps, on_bad_row)
    if isinstance(chosen.workload, TraceConfig):
        read = chosen.workload.read()
        if read.num_skipped:
            make_console().print(f"skipped {read.num_skipped} rows; the first: {read.first_bad}")
    return chosen


def trace_scenario(scenario: str, trace: str, rate_rps: float | None, folder: Path) -> str:
    """Write a scenario with its workload replaced by a trace into a folder; return its path.

    A trained policy is exported and judged on the scenario it was trained on: it must be a file.
    """
    chosen = chosen_scenario(scenario, str(Path(trace).resolve()), rate_rps)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scenario.yaml"
    text = yaml.safe_dump(chosen.model_dump(mode="json", exclude_none=True), sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return str(path)
