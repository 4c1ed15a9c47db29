"""Options that say what is played; shared by several commands."""

from __future__ import annotations

from pathlib import Path

import yaml

from servegym.commands.console import make_console
from servegym.errors import ConfigError
from servegym.scenario import Scenario, load_scenario, with_trace
from servegym.whole_files import write_whole
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
    path = folder / "scenario.yaml"
    text = yaml.safe_dump(chosen.model_dump(mode="json", exclude_none=True), sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path} is another scenario than {scenario} with {trace}: give another --out"
        )
    write_whole({path: text.encode()})
    return str(path)
