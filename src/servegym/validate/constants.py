"""Constants of engine families: a proposal, fitted on published measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from servegym.errors import ConfigError
from servegym.validate.engine import EngineConstants
from servegym.validate.published import Experiment, Row, experiment
from servegym.validate.score import RowScore, aggregate, score_row

#: One set for each family, whatever the GPU, the model and the precision. No row, GPU or model
#: has a constant of its own. Fitted by `servegym validate --published FILE --refit`; taken over
#: from there only where they also help a source that was left out of the fit, which is so for
#: vLLM before V1. Its ROCm builds come from one source only: nothing holds them but that source.
#: Engines of 2025 and later get none: no constant of theirs helped the sources left out, and the
#: way from client to scheduler is the harness's, 0 to 60 ms, not the engine's.
PROPOSED: dict[str, EngineConstants] = {
    "vllm-v0": EngineConstants(step_s=2e-3, dense_factor=1.1, request_s=0.013),
    "vllm-v0-rocm": EngineConstants(step_s=4e-3, sequence_s=120e-6, dense_factor=1.5),
}

_GRIDS: dict[str, Sequence[float]] = {
    "step_s": (0.0, 0.5e-3, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 12e-3, 16e-3, 24e-3),
    "dense_factor": (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0),
    "sequence_s": (0.0, 10e-6, 20e-6, 40e-6, 60e-6, 80e-6, 120e-6, 160e-6, 240e-6, 400e-6),
}
_ROUNDS = 3
_MOST_ROWS = 80
#: With more clients TTFT is queueing, which says nothing of the way to the scheduler.
_FEW_CLIENTS = 8


class Fit(NamedTuple):
    """Constants of one family and what they are worth.

    Attributes:
        family: The engine family.
        constants: Fitted on all its rows.
        num_rows: Rows of grade A and B it has.
        before: Median absolute error of the main figure without constants.
        after: With constants fitted on the same rows.
        left_out: By source, the error with constants fitted on all other sources.
        left_out_before: By source, without constants.
    """

    family: str
    constants: EngineConstants
    num_rows: int
    before: float
    after: float
    left_out: dict[str, float]
    left_out_before: dict[str, float]


def fit_families(rows: list[Row]) -> list[Fit]:
    """Fit the constants of every engine family, and again with each source left out."""
    families: dict[str, list[tuple[Row, Experiment]]] = {}
    for row in rows:
        try:
            plan = experiment(row)
        except ConfigError:
            continue
        if row.quality in ("A", "B"):
            families.setdefault(plan.family, []).append((row, plan))
    fits = []
    for family, cases in sorted(families.items()):
        if len(cases) < 20:
            continue
        constants = fit(cases)
        sources = sorted({row.source for row, _ in cases})
        left_out, without = {}, {}
        for source in sources:
            test = [case for case in cases if case[0].source == source]
            train = [case for case in cases if case[0].source != source]
            without[source] = median_error(test, EngineConstants())
            if train:
                left_out[source] = median_error(test, fit(train))
        fits.append(
            Fit(
                family,
                constants,
                len(cases),
                median_error(cases, EngineConstants()),
                median_error(cases, constants),
                left_out,
                without,
            )
        )
    return fits


def fit(cases: list[tuple[Row, Experiment]]) -> EngineConstants:
    """Find the constants with the least mean error, one after the other over coarse grids.

    The error of a row is the absolute logarithm of simulated over measured, at most 1, so that
    doubtful rows cannot pull. Many rows are thinned out evenly.
    """
    few = cases[:: -(-len(cases) // _MOST_ROWS)]
    best = EngineConstants()
    least = _loss(few, best)
    for _ in range(_ROUNDS):
        before = least
        for name, grid in _GRIDS.items():
            for value in grid:
                tried = replace(best, **{name: value})
                loss = _loss(few, tried)
                if loss < least:
                    best, least = tried, loss
        if least == before:
            break
    waits = [
        figure.measured - figure.simulated
        for score in _scores(few, best)
        if (score.plan.loop == "open" or 0 < score.plan.concurrency <= _FEW_CLIENTS)
        and score.plan.loop != "batch"
        and (figure := score.figures.get("ttft_s"))
    ]
    return replace(best, request_s=max(0.0, float(np.median(waits)))) if waits else best


def median_error(cases: list[tuple[Row, Experiment]], constants: EngineConstants) -> float:
    """Return the median absolute relative error of the main figure."""
    return aggregate(score.main.error for score in _scores(cases, constants)).median


def _loss(cases: list[tuple[Row, Experiment]], constants: EngineConstants) -> float:
    ratios = [s.main.simulated / s.main.measured for s in _scores(cases, constants)]
    return float(np.minimum(np.abs(np.log(ratios)), 1.0).mean())


def _scores(cases: list[tuple[Row, Experiment]], constants: EngineConstants) -> list[RowScore]:
    scores = []
    for row, plan in cases:
        try:
            scores.append(score_row(row, plan, constants))
        except ConfigError:  # does not fit its GPU, with any constants
            continue
    return scores
