"""Options that say what is played; shared by several commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from servegym.commands.console import make_console, print_remarks
from servegym.errors import ConfigError
from servegym.problems.problem import AnyProblem
from servegym.problems.registry import load_problem
from servegym.scenario import Scenario, load_scenario, open_loop
from servegym.traced_scenario import with_trace
from servegym.whole_files import write_whole
from servegym.workloads.config import MAX_CONTEXT_TOKENS, TraceConfig
from servegym.workloads.dialect import TimeUnit
from servegym.workloads.readers import OnBadRow
from servegym.workloads.shortening import TooLong

#: What means nothing without a trace.
TRACE_OPTIONS = (
    "on_bad_row",
    "time_unit",
    "hash_block_tokens",
    "max_context_tokens",
    "too_long",
    "wait_for_answers",
    "rate_rps",
)


@dataclass(frozen=True)
class Played:
    """What is played: a scenario, or its fleet with a trace."""

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file; gives the fleet."""
    trace: str | None = None
    """Replay this trace instead of the scenario's workload."""
    on_bad_row: OnBadRow = "error"
    """`skip` leaves malformed rows of the trace out and says how many; `error` refuses the file."""
    time_unit: TimeUnit | None = None
    """What the trace's column of times counts, where its columns do not say."""
    hash_block_tokens: int | None = None
    """Tokens of a prefix hash of the trace, where its columns do not say."""
    max_context_tokens: int = MAX_CONTEXT_TOKENS
    """Longest prompt and output of the trace together; at most what the largest replica takes."""
    too_long: TooLong = "error"
    """Longer requests of the trace: `error` refuses the file, `cut` and `skip` shorten or leave
    them out and say how many."""
    wait_for_answers: bool = True
    """Requests wait for the answers they followed: in sessions of a scenario, and where a trace
    says what followed what (a router's log, a column `after`); without, all come at their times."""
    rate_rps: float | None = None
    """Rate of the trace at load 1; by default 80 % of what the fleet can bear."""

    def posed(self) -> tuple[AnyProblem, Any]:
        """Find out what problem is posed, and load what is to be played.

        Raises:
            ConfigError: If there is none, or an option means nothing for it.
        """
        problem, scenario = load_problem(self.scenario)
        if problem.takes_trace:
            return problem, self.chosen()
        why = f"is for scenarios of requests, and {self.scenario} is one of {problem.unit}"
        self.refuse(("trace", *TRACE_OPTIONS), why)
        return problem, scenario

    def chosen(self) -> Scenario:
        """Load what requests are to be played, and say what was done to a trace."""
        if self.trace is None:
            options = [name for name in TRACE_OPTIONS if name != "wait_for_answers"]
            self.refuse(options, "is for a trace, and none is given with --trace")
            scenario = chosen_scenario(self.scenario)
            return scenario if self.wait_for_answers else open_loop(scenario)
        given = {name: getattr(self, name) for name in TRACE_OPTIONS}
        return chosen_scenario(self.scenario, self.trace, **given)

    def chosen_file(self, folder: Path) -> str:
        """As `chosen`, with what options changed as a scenario file in a folder; return its path.

        A trained policy is exported and judged on the scenario it was trained on: that must be a
        file, which names the trace wherever a command is started. A scenario as it is needs none:
        then its own name or path is returned.
        """
        if self.trace is None and self.wait_for_answers:
            self.chosen()
            return self.scenario
        trace = None if self.trace is None else str(Path(self.trace).resolve())
        chosen = replace(self, trace=trace).chosen()
        path = folder / "scenario.yaml"
        text = yaml.safe_dump(chosen.model_dump(mode="json", exclude_none=True), sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{path} is another scenario than {chosen.name}: give another --out")
        write_whole({path: text.encode()})
        return str(path)

    def refuse(self, options: Sequence[str], why: str) -> None:
        """Refuse options that were given and mean nothing here.

        Raises:
            ConfigError: If one is not at its default.
        """
        usual = {f.name: f.default for f in fields(self)}
        for option in options:
            if getattr(self, option) != usual[option]:
                raise ConfigError(f"--{option.replace('_', '-')} {why}: leave it out")


def chosen_scenario(scenario: str, trace: str | None = None, **options: Any) -> Scenario:
    """Load a scenario, with its workload replaced if a trace is given; say what was done to it.

    Args:
        scenario: Name or file.
        trace: File.
        options: Of `with_trace`.
    """
    chosen = load_scenario(scenario)
    if trace is not None:
        chosen = with_trace(chosen, trace, **options)
    played = chosen.played_workload
    if isinstance(played, TraceConfig):
        read = played.read()
        print_remarks(make_console(), [read.headline(), *read.remarks()])
    return chosen
