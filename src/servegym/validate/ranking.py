"""Whether the simulator puts configurations in the order in which they were measured."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.typing import FloatArray
from servegym.validate.score import RowScore


class Ranking(NamedTuple):
    """Agreement of orders within one source.

    Attributes:
        source: The source.
        metric: The figure ranked.
        num_rows: Configurations in all.
        tau: Kendall's tau-b over all rows, whatever their load.
        tau_same_work: Likewise over pairs of rows with the same model, lengths and load only,
            which differ in GPU, degree, precision or engine.
        num_pairs: Such pairs.
    """

    source: str
    metric: str
    num_rows: int
    tau: float
    tau_same_work: float
    num_pairs: int


def kendall_tau(
    measured: FloatArray, simulated: FloatArray, pairs: np.ndarray | None = None
) -> float:
    """Return Kendall's tau-b: 1 for equal orders, -1 for opposite ones, NaN without any order.

    Args:
        measured: `float64[n]`.
        simulated: `float64[n]`.
        pairs: Which pairs count, `bool[n, n]`; by default all.
    """
    first, second = np.triu_indices(len(measured), 1)
    if pairs is not None:
        kept = pairs[first, second]
        first, second = first[kept], second[kept]
    a = np.sign(measured[first] - measured[second])
    b = np.sign(simulated[first] - simulated[second])
    scale = np.sqrt(float(np.abs(a).sum()) * float(np.abs(b).sum()))
    return float((a * b).sum() / scale) if scale else float("nan")


def rankings(rows: list[RowScore]) -> list[Ranking]:
    """Rank the configurations of each source by its main figure."""
    found = []
    for source in sorted({score.row.source for score in rows}):
        mine = [score for score in rows if score.row.source == source]
        metric = max(
            ("tpot_s", "output_tokens_per_s", "ttft_s"),
            key=lambda name: sum(name in score.figures for score in mine),
        )
        mine = [score for score in mine if metric in score.figures]
        if len(mine) < 2:
            continue
        measured = np.array([score.figures[metric].measured for score in mine])
        simulated = np.array([score.figures[metric].simulated for score in mine])
        labels = [_work(score) for score in mine]
        work = np.unique(labels, return_inverse=True)[1]
        same = work[:, np.newaxis] == work
        found.append(
            Ranking(
                source,
                metric,
                len(mine),
                kendall_tau(measured, simulated),
                kendall_tau(measured, simulated, same),
                int(np.triu(same, 1).sum()),
            )
        )
    return found


def _work(score: RowScore) -> str:
    plan = score.plan
    load = (plan.loop, plan.concurrency, plan.rate_rps)
    return repr((plan.setup.model, plan.prompt_tokens, plan.output_tokens, load))
