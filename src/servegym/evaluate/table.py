"""The comparison as a table in the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from servegym.evaluate.harness import Evaluation

#: Column heading, metric, factor, digits and the least terminal width at which it is shown.
COLUMNS = (
    ("TTFT ms", "ttft_mean_s", 1e3, 0, 0),
    ("p99", "ttft_p99_s", 1e3, 0, 90),
    ("TPOT ms", "tpot_mean_s", 1e3, 1, 100),
    ("E2E s", "e2e_mean_s", 1, 2, 0),
    ("p99", "e2e_p99_s", 1, 1, 90),
    ("SLO %", "slo_attainment", 100, 1, 0),
    ("goodput/s", "goodput_rps", 1, 1, 115),
    ("preempt", "preemptions", 1, 0, 115),
    ("hit %", "prefix_hit_rate", 100, 0, 100),
)


def comparison_table(result: Evaluation, load: float, width: int = 120) -> Table:
    """Tabulate one load, best first by the scenario's objective.

    Args:
        result: A comparison.
        load: One of its loads.
        width: Of the terminal; a narrow one gets fewer columns.
    """
    goodput = result.scenario.objective == "goodput"
    metric = "goodput_rps" if goodput else "e2e_mean_s"
    best = result.best_heuristic(load)
    columns = [column for column in COLUMNS if column[-1] <= width]
    table = Table(
        title=f"{result.scenario.name}, load {load:g}: means over {len(result.seeds)} seeds",
        caption=f"ratio: mean E2E over that of {best} (best rule, no oracle), paired, 95 % interval",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    if width >= 100:
        table.add_column("knows", no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    order = sorted(
        result.policies, key=lambda p: (-1 if goodput else 1) * result.mean(p[0], load, metric)
    )
    for name, information in order:
        r = result.ratio(name, best, load, "e2e_mean_s")
        cells = [f"{k * result.mean(name, load, m):,.{d}f}" for _, m, k, d, _ in columns]
        if width >= 100:
            cells.insert(0, information)
        style = "bold" if name in result.learned else ("dim" if information == "oracle" else "")
        table.add_row(name, *cells, f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]", style=style)
    return table


def saturation_table(result: Evaluation) -> Table:
    """Tabulate the largest loads that meet the limits, best first."""
    shares = sorted({share for loads in result.saturation.values() for share in loads})
    table = Table(title="largest load within the limits", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for share in shares:
        table.add_column(f"{100 * share:g} % of requests", justify="right")
    for name, loads in sorted(result.saturation.items(), key=lambda x: -x[1][shares[0]]):
        table.add_row(name, *(f"{loads[share]:.2f}" for share in shares))
    return table
