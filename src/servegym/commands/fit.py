"""The command `servegym fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
import yaml
from rich.table import Table

from servegym.commands.console import make_console, print_remarks
from servegym.workloads.dialect import TimeUnit
from servegym.workloads.fit import QUANTILES, fit_quality, fit_workload
from servegym.workloads.readers import OnBadRow, read_trace


@dataclass(frozen=True)
class Fit:
    """Fit a workload generator to a trace, and print it beside the trace's quantiles."""

    trace: Annotated[str, tyro.conf.Positional]
    """Trace file."""
    on_bad_row: OnBadRow = "error"
    """`error` refuses the file at a malformed row, `skip` counts and leaves out."""
    time_unit: TimeUnit | None = None
    """What the column of times counts, where the columns do not say."""
    hash_block_tokens: int | None = None
    """Tokens of a prefix hash, where the columns do not say."""

    def run(self) -> None:
        """Fit a generator, print and write it."""
        trace = read_trace(
            self.trace,
            on_bad_row=self.on_bad_row,
            time_unit=self.time_unit,
            hash_block_tokens=self.hash_block_tokens,
            wait_for_answers=False,  # a generator is fitted to the arrivals as they were
        )
        console = make_console()
        print_remarks(console, trace.remarks())
        config = fit_workload(trace.table)
        console.print(yaml.safe_dump({"workload": config.model_dump(mode="json")}, sort_keys=False))
        table = Table(title=f"{trace.name}: {len(trace.table)} requests, {config.rate_rps:.3g}/s")
        for heading in ("quantity", "", *(f"p{q}" for q in QUANTILES), "Kolmogorov"):
            table.add_column(heading, justify="right")
        for row in fit_quality(trace.table, config):
            table.add_row(row.quantity, "trace", *(f"{x:.4g}" for x in row.trace), "")
            table.add_row("", "fit", *(f"{x:.4g}" for x in row.fit), f"{row.kolmogorov:.3f}")
        console.print(table)
