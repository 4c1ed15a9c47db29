"""The comparison as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from servegym.evaluate.harness import Evaluation
from servegym.problems.problem import Column


def comparison_table(result: Evaluation, load: float, width: int = 132) -> Table:
    """Tabulate one load, best first by the scenario's objective.

    Args:
        result: A comparison.
        load: One of its loads.
        width: Of the terminal; a narrow one gets fewer columns.
    """
    measuring = Console(width=1000)
    columns = result.problem.columns
    dispensable = sorted((c for c in columns if c.dispensable), key=lambda c: c.dispensable)
    for dropped in range(len(dispensable) + 1):
        table = _comparison(result, load, [c for c in columns if c not in dispensable[:dropped]])
        if measuring.measure(table).maximum <= width:
            break
    return table


def _comparison(result: Evaluation, load: float, columns: Sequence[Column]) -> Table:
    best, objective = result.best_heuristic(load), result.objective
    table = Table(
        title=f"{result.scenario.name}, load {load:g}: {result.averaged}",
        caption=f"{objective.heading}: {objective.label} {objective.relation} that of {best}"
        f" (best rule, no oracle){result.interval_suffix}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("policy", overflow="fold", max_width=36)  # parameters make names long
    table.add_column("knows", no_wrap=True)
    bounded = result.bound_budget > 0
    for heading in (
        *(column.heading for column in columns),
        objective.heading,
        *["headroom %"] * bounded,
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, information in result.ranking(load):
        cells = [column.cell(result.mean(name, load, column.metric)) for column in columns]
        against = result.against_text(name, best, load)
        style = "bold" if name in result.learned else ("dim" if information == "oracle" else "")
        if bounded:
            gained = result.headroom_text(name, load)
            table.add_row(name, information, *cells, against, gained, style=style)
        else:
            table.add_row(name, information, *cells, against, style=style)
    return table


def stability_table(result: Evaluation, load: float) -> Table:
    """Tabulate in what bands metrics lie over worlds, and how often each policy is first."""
    heads, rows = stability_cells(result, load)
    stability = result.stability
    count = stability.num_worlds if stability else 0
    table = Table(
        title=f"{result.scenario.name}, load {load:g}: 90 % bands over {count} worlds with other "
        "kernels and engines",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def stability_cells(result: Evaluation, load: float) -> tuple[list[str], list[list[str]]]:
    """Return headings of the metrics, and a row for each policy that was played in worlds."""
    stability = result.stability
    assert stability is not None
    columns = [
        c
        for c in result.problem.columns
        if c.metric in stability.metrics[stability.policies[0], load][0]
        and c.dispensable in (0, 4, 5, 6)
    ]
    rows = []
    for name in [n for n, _ in result.ranking(load) if n in stability.policies]:
        bands = [stability.band(name, load, column.metric) for column in columns]
        cells = [
            f"{c.cell(b.low)} to {c.cell(b.high)}" for c, b in zip(columns, bands, strict=True)
        ]
        rows.append([name, *cells, f"{stability.first(name, load)} of {stability.num_worlds}"])
    return ["policy", *(column.heading for column in columns), "first in"], rows


def saturation_table(result: Evaluation) -> Table:
    """Tabulate the largest loads at which shares of an episode are as they should be."""
    heads, rows = saturation_cells(result)
    table = Table(title="largest load within the limits", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def saturation_cells(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Return headings of the shares, and a row for each policy, the best first."""
    shares = sorted({share for loads in result.saturation.values() for share in loads})
    what = result.problem.saturation.what if result.problem.saturation else ""
    ranked = sorted(result.saturation.items(), key=lambda item: -item[1][shares[0]])
    heads = [f"{100 * share:g} % {what}" for share in shares]
    return heads, [[name, *(f"{loads[s]:.2f}" for s in shares)] for name, loads in ranked]
