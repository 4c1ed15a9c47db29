"""The comparison as a table in the terminal."""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.table import Table

from servegym.evaluate.compare import with_interval
from servegym.evaluate.harness import Evaluation

#: Column heading, metric, factor and digits.
COLUMNS = (
    ("TTFT ms", "ttft_mean_s", 1e3, 0),
    ("p99", "ttft_p99_s", 1e3, 0),
    ("TPOT ms", "tpot_mean_s", 1e3, 1),
    ("E2E s", "e2e_mean_s", 1, 2),
    ("p99", "e2e_p99_s", 1, 1),
    ("SLO %", "slo_attainment", 100, 1),
    ("goodput/s", "goodput_rps", 1, 1),
    ("preempted", "preemptions", 1, 0),
    ("hit %", "prefix_hit_rate", 100, 0),
)
#: What a narrow terminal does without, first to go first.
_DISPENSABLE = (
    "preemptions",
    "goodput_rps",
    "prefix_hit_rate",
    "tpot_mean_s",
    "e2e_p99_s",
    "ttft_p99_s",
)


def comparison_table(result: Evaluation, load: float, width: int = 132) -> Table:
    """Tabulate one load, best first by the scenario's objective.

    Args:
        result: A comparison.
        load: One of its loads.
        width: Of the terminal; a narrow one gets fewer columns.
    """
    measuring = Console(width=1000)
    for dropped in range(len(_DISPENSABLE) + 1):
        table = _comparison(result, load, _DISPENSABLE[:dropped])
        if measuring.measure(table).maximum <= width:
            break
    return table


def _comparison(result: Evaluation, load: float, without: Collection[str]) -> Table:
    best = result.best_heuristic(load)
    columns = [column for column in COLUMNS if column[1] not in without]
    table = Table(
        title=f"{result.scenario.name}, load {load:g}: {result.averaged}",
        caption=f"ratio: {result.judged_name} over that of {best} (best rule, no oracle)"
        f"{result.interval_suffix}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("policy", overflow="fold", max_width=36)  # parameters make names long
    table.add_column("knows", no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for name, information in result.ranking(load):
        r = result.ratio(name, best, load)
        cells = [f"{k * result.mean(name, load, m):,.{d}f}" for _, m, k, d in columns]
        style = "bold" if name in result.learned else ("dim" if information == "oracle" else "")
        table.add_row(name, information, *cells, with_interval(r), style=style)
    return table


def saturation_table(result: Evaluation, what: str = "requests") -> Table:
    """Tabulate the largest loads at which shares of `what` meet their limits, best first."""
    shares = sorted({share for loads in result.saturation.values() for share in loads})
    table = Table(title="largest load within the limits", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for share in shares:
        table.add_column(f"{100 * share:g} % of {what}", justify="right")
    for name, loads in sorted(result.saturation.items(), key=lambda x: -x[1][shares[0]]):
        table.add_row(name, *(f"{loads[share]:.2f}" for share in shares))
    return table
