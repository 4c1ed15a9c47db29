"""What `servegym schedule --benchmark` does."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import track
from rich.table import Table

import servegym
from servegym.baselines.workflow.registry import WorkflowRule
from servegym.commands.console import make_console
from servegym.errors import ConfigError
from servegym.evaluate.job_shop import JobShopRow, job_shop_gaps, mean_gaps
from servegym.evaluate.tardiness import TardinessRow, tardiness_gaps, total_gaps
from servegym.whole_files import write_whole
from servegym.workflow.taillard import taillard_instance
from servegym.workflow.tardiness import tardiness_instance

Benchmark = Literal["taillard", "tardiness"]
SCHEMA = "servegym-schedule-benchmark-1"


def run_benchmark(
    benchmark: Benchmark,
    instances: str,
    policies: Mapping[str, WorkflowRule],
    time_limit_s: float,
    path: Path | None,
) -> None:
    """Schedule instances with policies, print the mean gaps by size and write all numbers.

    Args:
        benchmark: Which.
        instances: Numbers and ranges of them, e.g. `1-10,21`.
        policies: By name.
        time_limit_s: Of cp-sat, for each instance.
        path: File for the numbers.
    """
    numbers = parse_numbers(instances)
    gaps = _taillard if benchmark == "taillard" else _tardiness
    table, rows = gaps(numbers, policies, time_limit_s)
    console = make_console()
    console.print(table)
    if path:
        document = {
            "schema": SCHEMA,
            "servegym_version": servegym.__version__,
            "command": " ".join(sys.argv[1:]),
            "benchmark": benchmark,
            "rows": rows,
        }
        write_whole({path: (jsonlib.dumps(document, indent=1) + "\n").encode()})
        console.print(f"numbers: {path}")


def parse_numbers(text: str) -> list[int]:
    """Read numbers and ranges, e.g. `1-3,7` as 1, 2, 3, 7.

    Raises:
        ConfigError: If the text is something else, or a number occurs twice.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ConfigError(f"instances must be numbers and ranges such as 1-10,21, got {text!r}")
        found += range(int(first), int(last or first) + 1)
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"instances must name each number once, got {text!r}")
    return found


def _taillard(
    numbers: Sequence[int], policies: Mapping[str, WorkflowRule], time_limit_s: float
) -> tuple[Table, list[dict[str, Any]]]:
    instances = [taillard_instance(number) for number in numbers]
    gaps = job_shop_gaps(instances, policies, time_limit_s)
    rows: list[JobShopRow] = list(
        track(gaps, "scheduling", len(instances) * len(policies), transient=True)
    )
    title = f"{len(instances)} job shops of Taillard: makespan over the best known, less 1, in %"
    found = {
        policy: {
            **mean,
            "mean flow, s": float(np.mean([r.mean_flow_s for r in rows if r.policy == policy])),
            "optimal": sum(r.status == "optimal" for r in rows if r.policy == policy),
        }
        for policy, mean in mean_gaps(rows).items()
    }
    return _table(title, found), [row._asdict() for row in rows]


def _tardiness(
    numbers: Sequence[int], policies: Mapping[str, WorkflowRule], _: float
) -> tuple[Table, list[dict[str, Any]]]:
    instances = [tardiness_instance(number) for number in numbers]
    gaps = tardiness_gaps(instances, policies)
    rows: list[TardinessRow] = list(
        track(gaps, "scheduling", len(instances) * len(policies), transient=True)
    )
    title = (
        f"{len(instances)} single machines by number of jobs: total tardiness over the least,"
        " less 1, in %"
    )
    found = {
        policy: {
            **gap,
            "late jobs": sum(r.scores.num_late for r in rows if r.policy == policy),
            "optimal": sum(
                r.scores.tardiness_s <= r.least_s * (1 + 1e-12) for r in rows if r.policy == policy
            ),
        }
        for policy, gap in total_gaps(rows).items()
    }
    flat = [{**row._asdict(), "scores": row.scores._asdict()} for row in rows]
    return _table(title, found), flat


def _table(title: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    """One line a policy; gaps are those columns that are named for a size."""
    table = Table(title=title)
    table.add_column("policy")
    headers = list(next(iter(found.values())))
    gaps = [h for h in headers if h == "all" or h[0].isdecimal()]
    order = [h for h in gaps if h != "all"] + ["all"] + [h for h in headers if h not in gaps]
    for header in order:
        table.add_column(header, justify="right")
    for policy, values in found.items():
        cells = [f"{100 * values[h]:.1f}" if h in gaps else f"{values[h]:,.0f}" for h in order]
        table.add_row(policy, *cells)
    return table
