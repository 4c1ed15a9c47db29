"""The comparison as a table in the terminal."""

from __future__ import annotations

from rich.table import Table

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
    ("preempt", "preemptions", 1, 0),
    ("hit %", "prefix_hit_rate", 100, 0),
)


def comparison_table(result: Evaluation, load: float) -> Table:
    """Tabulate one load, best first by the scenario's objective."""
    goodput = result.scenario.objective == "goodput"
    metric = "goodput_rps" if goodput else "e2e_mean_s"
    best = result.best_heuristic(load)
    table = Table(
        title=f"{result.scenario.name}, load {load:g}: means over {len(result.seeds)} seeds",
        caption=f"ratio: mean E2E over that of {best} (best rule without oracle), paired, 95 % CI",
    )
    table.add_column("policy", overflow="fold")
    table.add_column("information")
    for heading, *_ in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("ratio", justify="right")
    order = sorted(
        result.policies, key=lambda p: (-1 if goodput else 1) * result.mean(p[0], load, metric)
    )
    for name, information in order:
        r = result.ratio(name, best, load, "e2e_mean_s")
        cells = [f"{k * result.mean(name, load, m):,.{d}f}" for _, m, k, d in COLUMNS]
        style = "bold" if name in result.learned else ("dim" if information == "oracle" else "")
        table.add_row(
            name, information, *cells, f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]", style=style
        )
    return table
