"""A table that says what a step costs and which term dominates."""

from __future__ import annotations

from rich.table import Table

from servegym.costs.pipeline import PipelineCost
from servegym.costs.step import StepCost


def costs_table(title: str, cost: StepCost, *, context: int = 1024) -> Table:
    """Tabulate steps of several sizes.

    Args:
        title: Names the replica.
        cost: Its step cost.
        context: KV tokens of each decoding sequence.
    """
    table = Table(title=f"{title} — ms per step, {context} tokens of context a sequence")
    rows = [(name, cost.terms(**case)) for name, case in _cases(context)]
    table.add_column("step")
    for term in rows[0][1]:
        table.add_column(term, justify="right")
    table.add_column("total", justify="right")
    table.add_column("dominated by")
    for name, terms in rows:
        total = sum(terms.values())
        most = max(terms, key=lambda term: terms[term])
        table.add_row(
            name,
            *(f"{1e3 * s:.2f}" for s in terms.values()),
            f"{1e3 * total:.2f}",
            f"{most} ({terms[most] / total:.0%})",
        )
    return table


def stages_table(title: str, pipeline: PipelineCost, *, context: int = 1024) -> Table:
    """Tabulate the stages' work in steps of several sizes, and rounds of such steps.

    Neighbours that take the same times share a column.

    Args:
        title: Names the replica.
        pipeline: Its stages.
        context: KV tokens of each decoding sequence.
    """
    table = Table(title=f"{title} — ms per batch, {context} tokens of context a sequence")
    table.add_column("batch")
    cases = _cases(context)
    times = list(zip(*(pipeline.stage_s(**case) for _, case in cases), strict=True))
    begins = [i for i, one in enumerate(times) if i == 0 or one != times[i - 1]]
    for begin, stop in zip(begins, [*begins[1:], len(times)], strict=True):
        name = f"stage {stop}" if stop - begin == 1 else f"stages {begin + 1} to {stop}"
        table.add_column(name, justify="right")
    for heading in ("transfer", "one batch, all stages", f"round of {pipeline.pp} batches"):
        table.add_column(heading, justify="right")
    for row, (name, case) in enumerate(cases):
        seconds = (
            *(times[begin][row] for begin in begins),
            pipeline.handover_s(case["tokens"]),
            pipeline.latency_s(**case),
            pipeline.round_s(pipeline.pp, **case),
        )
        table.add_row(name, *(f"{1e3 * s:.2f}" for s in seconds))
    return table


def _cases(context: int) -> list[tuple[str, dict[str, int]]]:
    """Steps of several sizes, as arguments of `StepCost.terms`."""
    cases = [
        (f"decode {b}", {"tokens": b, "batch": b, "kv_tokens": b * context})
        for b in (1, 8, 32, 128)
    ]
    cases += [(f"prefill {c}", {"tokens": c, "chunk": c}) for c in (256, 2048)]
    mixed = {"tokens": 2048, "chunk": 1984, "batch": 64, "kv_tokens": 64 * context}
    return [*cases, ("prefill 1984 + decode 64", mixed)]


def evidence_table(cost: StepCost | PipelineCost) -> Table:
    """Tabulate what stands behind every operator.

    Args:
        cost: A replica's step cost, or its stages.
    """
    table = Table(title=f"{cost.status}: what stands behind these times")
    for heading in ("operator", "kind", "error %", "source or reason"):
        table.add_column(heading)
    for evidence in cost.evidence:
        error = "{:g} / {:g}".format(*evidence.error) if evidence.error else "-"
        table.add_row(evidence.operator, evidence.kind, error, evidence.note)
    return table
