"""`servegym estimate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.table import Table

from servegym.commands.console import make_console
from servegym.export.resolve import resolve_policy
from servegym.replay.dataset import read_dataset
from servegym.replay.off_policy import Estimate as Found
from servegym.replay.off_policy import Metric, estimate
from servegym.workloads.readers import OnBadRow

_WHAT = {
    "e2e": "mean E2E s",
    "ttft": "mean TTFT s",
    "in-time": "share in time",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate what policies would have brought, from the log of a router that explores.

    Nothing is simulated. The estimates are of one choice among the logged policy's: they do not
    know what the policy's other choices would make of the fleet (docs/standards.md).
    """

    log: tyro.conf.Positional[tuple[Path, ...]]
    """Files of the log, or its folder; written with `observations: true` and `explored` above 0."""
    policies: tuple[str, ...] = ("added-delay",)
    """Rules (see `servegym policies`) and files of learned policies."""
    metric: Metric = "e2e"
    """Mean seconds to the end or to the first token of finished requests, or the share of requests
    within the limits of their class."""
    on_bad_row: OnBadRow = "error"
    """`skip` leaves malformed rows out; `error` refuses the log."""

    def run(self) -> None:
        """Estimate and print."""
        data = read_dataset(self.log, on_bad_row=self.on_bad_row)
        table = Table()
        headings = ("policy", f"{_WHAT[self.metric]}, sampled", "doubly robust", "same choices")
        for heading in (*headings, "worth requests"):
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        console = make_console()
        for text in self.policies:
            policy = resolve_policy(text)
            found = estimate(data, policy, metric=self.metric)
            if not table.rows:
                table.add_row("as logged", _shown(found.logged), "", "", f"{found.num_requests:,}")
            table.add_row(
                policy.name,
                _shown(found.sampled),
                _shown(found.robust),
                f"{found.agreed:.0%}",
                f"{found.effective:,.0f}",
            )
            if found.unsupported > 0:
                console.print(
                    f"{policy.name} would hold or reject {found.unsupported:.1%} of the requests"
                    " that were not, and no log says what that brings"
                )
        console.print(table)
        if found.num_left_out:
            console.print(
                f"{found.num_left_out:,} requests do not count: the fallback decided, or they have"
                " no outcome"
            )


def _shown(found: Found) -> str:
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
