"""Whether published measurements lie in the bands of their predictions.

The band of a row is made of how far its kernels may be off, by a few runs in worlds in which they
are, and of what no kernel explains: the spread of its engine family, taken from the rows of all
other sources, so that no row has a say in its own band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from servegym.costs.uncertainty import EngineSpread, World
from servegym.errors import ConfigError
from servegym.validate.engine import EngineConstants
from servegym.validate.experiments import play
from servegym.validate.published import Row, experiment
from servegym.validate.score import METRICS, RowScore, score_row

NUM_WORLDS = 6
#: Standard deviations on either side of a band that nine of ten lie in.
WIDTH = 1.645
_FEWEST_ROWS = 20


class Banded(NamedTuple):
    """A replayed row, and how far its kernels let its figures be off.

    Attributes:
        score: As it is replayed.
        kernels: Standard deviation of the logarithm of each figure over worlds.
    """

    score: RowScore
    kernels: dict[str, float]

    def off(self, metric: str) -> float:
        """Logarithm of measured over simulated."""
        figure = self.score.figures[metric]
        return math.log(figure.measured / figure.simulated)

    @property
    def family(self) -> str:
        """Its engine family; where prefill and decode are apart, one of its own."""
        plan = self.score.plan
        return plan.family if plan.prefill is None else f"{plan.family}, disaggregated"

    @property
    def main_metric(self) -> str:
        """Name of the figure that speaks most of the step time."""
        score = self.score
        return next(name for name, figure in score.figures.items() if figure is score.main)


class Coverage(NamedTuple):
    """How many rows of a group lie in their bands.

    Attributes:
        metric: Which figure.
        family: Engine family, or `all`.
        num_rows: Of the group.
        kernels: Share within what kernels alone allow.
        whole: Share within the whole band, its source left out.
        width: Median of the whole band's upper end over the prediction.
    """

    metric: str
    family: str
    num_rows: int
    kernels: float
    whole: float
    width: float


def banded_rows(
    rows: Sequence[Row],
    num_worlds: int = NUM_WORLDS,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Banded]:
    """Replay rows of grade A and B as predicted and in worlds; what cannot be is left out."""
    found = []
    for i, row in enumerate(rows):
        progress(i / len(rows))
        if row.quality not in ("A", "B"):
            continue
        try:
            plan = experiment(row)
            score = score_row(row, plan, EngineConstants())
        except ConfigError:
            continue
        worlds = [play(plan, EngineConstants(), World(seed))[0] for seed in range(num_worlds)]
        kernels = {
            name: math.sqrt(
                float(np.mean([math.log(w[name] / figure.simulated) ** 2 for w in worlds]))
            )
            for name, figure in score.figures.items()
        }
        found.append(Banded(score, kernels))
    return found


def engine_spread(rows: Sequence[Banded]) -> EngineSpread:
    """Say what kernels do not explain: the 90th percentile of what is left, over its quantile."""
    step = _left([(one.off(one.main_metric), one.kernels[one.main_metric]) for one in rows])
    ttft = [
        (one.off("ttft_s"), math.hypot(one.kernels["ttft_s"], step))
        for one in rows
        if "ttft_s" in one.kernels
    ]
    return EngineSpread(step, _left(ttft))


def _left(known: Sequence[tuple[float, float]]) -> float:
    """Spread beside a known one, of `(logarithm off, known spread)`."""
    if not known:
        return 0.0
    left = [math.sqrt(max(off**2 - (WIDTH * kernels) ** 2, 0.0)) for off, kernels in known]
    return float(np.percentile(left, 90)) / WIDTH


def family_spreads(rows: Sequence[Banded]) -> dict[str, EngineSpread]:
    """Spread of every engine family of enough rows."""
    families = sorted({one.family for one in rows})
    groups = {name: [one for one in rows if one.family == name] for name in families}
    return {
        name: engine_spread(group) for name, group in groups.items() if len(group) >= _FEWEST_ROWS
    }


def coverage(rows: Sequence[Banded]) -> list[Coverage]:
    """Count who lies in a band of 90 %, of every figure and engine family, and of all."""
    spreads = {place: _without(rows, *place) for place in {_place(one) for one in rows}}
    found = []
    for metric in METRICS:
        having = [one for one in rows if metric in one.score.figures]
        families = sorted({one.family for one in having})
        for family in ("all", *families) if having else ():
            group = [one for one in having if family in ("all", one.family)]
            off = np.array([abs(one.off(metric)) for one in group])
            kernels = np.array([WIDTH * one.kernels[metric] for one in group])
            rest = np.array([_rest(spreads[_place(one)], metric) for one in group])
            whole = np.hypot(kernels, WIDTH * rest)
            found.append(
                Coverage(
                    metric,
                    family,
                    len(group),
                    float((off <= kernels).mean()),
                    float((off <= whole).mean()),
                    float(np.median(np.exp(whole))),
                )
            )
    return found


def _place(one: Banded) -> tuple[str, str]:
    return one.family, one.score.row.source


def _without(rows: Sequence[Banded], family: str, source: str) -> EngineSpread:
    """Spread of a family without one source; the widest of any if too few rows are left."""
    others = family_spreads([one for one in rows if one.score.row.source != source])
    widest = EngineSpread(*(max((s[i] for s in others.values()), default=0.0) for i in (0, 1)))
    return others.get(family, widest)


def _rest(spread: EngineSpread, metric: str) -> float:
    return math.hypot(spread.step, spread.ttft) if metric == "ttft_s" else spread.step
