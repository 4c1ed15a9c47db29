"""Constants of engine families: a proposal, fitted on published measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import FloatArray
from servegym.validate.engine import EngineConstants
from servegym.validate.published import Experiment, Row, experiment
from servegym.validate.score import RowScore, aggregate, score_row

#: One set for each family, whatever the GPU, the model and the precision. No row, GPU or model
#: has a constant of its own. Fitted by `servegym validate --published FILE --refit`; taken over
#: from there only where they also help a source that was left out of the fit and harm none, which
#: is so for SGLang. ROCm builds of vLLM before V1 come from one source but for a few rows: nothing
#: holds theirs but that source. The way from client to scheduler is the harness's, not the
#: engine's: no constant for it is taken over.
PROPOSED: dict[str, EngineConstants] = {
    "sglang": EngineConstants(step_s=0.5e-3, sequence_s=20e-6),
    "vllm-v0-rocm": EngineConstants(step_s=6e-3, sequence_s=60e-6, dense_factor=1.5),
}

_GRIDS: dict[str, Sequence[float]] = {
    "step_s": (0.0, 0.5e-3, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 12e-3, 16e-3, 24e-3),
    "dense_factor": (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0),
    "sequence_s": (0.0, 10e-6, 20e-6, 40e-6, 60e-6, 80e-6, 120e-6, 160e-6, 240e-6, 400e-6),
}
#: Constants with which each row is replayed once more, to see how its times depend on them.
_TRIED = (
    EngineConstants(step_s=2e-3),
    EngineConstants(dense_factor=1.2),
    EngineConstants(sequence_s=60e-6),
)
_ROUNDS = 3
_FEWEST_ROWS = 20
#: With more clients TTFT is queueing, which says nothing of the way to the scheduler.
_FEW_CLIENTS = 8
_FEWEST_OF_STRATUM = 3


@dataclass(frozen=True)
class Case:
    """A row and how its figures depend on the constants.

    Attributes:
        row: As published.
        plan: How it is replayed.
        scores: Without constants, then with each of `_TRIED`.
    """

    row: Row
    plan: Experiment
    scores: tuple[RowScore, ...]

    @property
    def gpu(self) -> str:
        """What it ran on."""
        return self.plan.setup.gpu

    def times_s(self, metric: str) -> FloatArray:
        """Return a simulated figure without constants and with each of `_TRIED`, as a time."""
        simulated = np.array([score.figures[metric].simulated for score in self.scores])
        return 1.0 / simulated if metric == "output_tokens_per_s" else simulated

    @property
    def main_metric(self) -> str:
        """Name of the figure that speaks most of the step time."""
        score = self.scores[0]
        return next(name for name, figure in score.figures.items() if figure is score.main)


class LeftOut(NamedTuple):
    """Rows of one source or GPU, and constants fitted on all others of their family.

    Attributes:
        name: Source or GPU.
        before: Median absolute error of the main figure without constants.
        after: With those fitted on the others; None if there are no others.
    """

    name: str
    before: float
    after: float | None


class Fit(NamedTuple):
    """Constants of one family and what they are worth.

    Attributes:
        family: The engine family.
        constants: Fitted on all its rows.
        num_rows: Rows of grade A and B it has.
        before: Median absolute error of the main figure without constants.
        after: With constants fitted on the same rows.
        sources: Each source left out in turn.
        gpus: Each GPU left out in turn.
    """

    family: str
    constants: EngineConstants
    num_rows: int
    before: float
    after: float
    sources: list[LeftOut]
    gpus: list[LeftOut]


#: Rows by the constants they are scored with: `none`, `family`, `source` or `GPU` left out.
Variants = dict[str, list[RowScore]]
VARIANTS = ("none", "family", "source", "GPU")


def sample(rows: list[Row], size: int, seed: int = 0) -> list[Row]:
    """Draw rows of grade A and B that can be replayed, by source and GPU in proportion.

    Args:
        rows: Of the table.
        size: About how many to draw; of each source and GPU three at least, if there are.
        seed: Of the draw.
    """
    strata: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        try:
            plan = experiment(row)
        except ConfigError:
            continue
        if row.quality in ("A", "B"):
            strata.setdefault((row.source, plan.setup.gpu), []).append(i)
    total = sum(len(members) for members in strata.values())
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    for members in strata.values():
        count = max(_FEWEST_OF_STRATUM, round(size * len(members) / total))
        drawn += rng.permutation(members)[:count].tolist()
    return [rows[i] for i in sorted(drawn)]


def fit_families(
    rows: list[Row], progress: Callable[[float], None] = lambda share: None
) -> tuple[list[Fit], Variants]:
    """Fit the constants of every engine family, and again with each source and GPU left out.

    Args:
        rows: Of the table; those of grade A and B count.
        progress: Told the share that is done.

    Returns:
        The fits, and every row scored without constants, with those of its family, and with those
        fitted without its source or its GPU. A family of few rows has none.
    """
    families: dict[str, list[Case]] = {}
    for i, row in enumerate(rows):
        progress(0.6 * i / len(rows))
        case = _case(row) if row.quality in ("A", "B") else None
        if case is not None:
            families.setdefault(case.plan.family, []).append(case)
    fits: list[Fit] = []
    variants: Variants = {name: [] for name in VARIANTS}
    for i, (family, cases) in enumerate(sorted(families.items())):
        progress(0.6 + 0.4 * i / len(families))
        enough = len(cases) >= _FEWEST_ROWS
        constants = fit(cases) if enough else EngineConstants()
        none = [case.scores[0] for case in cases]
        scored = {"none": none, "family": _scores(cases, constants)}
        left_out = {}
        for name, key in (("source", _source), ("GPU", _gpu)):
            scored[name], left_out[name] = _leave_out(cases, key) if enough else (none, [])
        for name in VARIANTS:
            variants[name] += scored[name]
        if enough:
            before, after = median_error(none), median_error(scored["family"])
            kinds = left_out["source"], left_out["GPU"]
            fits.append(Fit(family, constants, len(cases), before, after, *kinds))
    return fits, variants


def fit(cases: list[Case]) -> EngineConstants:
    """Find the constants with the least mean error, one after the other over coarse grids.

    Times are taken as linear in the constants, as steps are. The error of a row is the absolute
    logarithm of simulated over measured, at most 1, so that doubtful rows cannot pull.
    """
    measured_s = np.array([_measured_s(case) for case in cases])
    lines = np.array([_line(case.times_s(case.main_metric)) for case in cases])

    def loss(constants: EngineConstants) -> float:
        ratio = np.maximum(lines @ _along(constants), 1e-9) / measured_s
        return float(np.minimum(np.abs(np.log(ratio)), 1.0).mean())

    best = EngineConstants()
    least = loss(best)
    for _ in range(_ROUNDS):
        before = least
        for name, grid in _GRIDS.items():
            for value in grid:
                tried = replace(best, **{name: value})
                if loss(tried) < least:
                    best, least = tried, loss(tried)
        if least == before:
            break
    waits = [
        figure.measured - float(_line(case.times_s("ttft_s")) @ _along(best))
        for case in cases
        if (case.plan.loop == "open" or 0 < case.plan.concurrency <= _FEW_CLIENTS)
        and case.plan.loop != "batch"
        and (figure := case.scores[0].figures.get("ttft_s"))
    ]
    return replace(best, request_s=max(0.0, float(np.median(waits)))) if waits else best


def median_error(scores: list[RowScore]) -> float:
    """Return the median absolute relative error of the main figure."""
    return aggregate(score.main.error for score in scores).median


def _case(row: Row) -> Case | None:
    try:
        plan = experiment(row)
        if plan.prefill is not None:  # two kinds of engines, each with times of its own
            return None
        tried = (EngineConstants(), *_TRIED)
        return Case(row, plan, tuple(score_row(row, plan, constants) for constants in tried))
    except ConfigError:  # cannot be replayed, or does not fit its GPU
        return None


def _source(case: Case) -> str:
    return case.row.source


def _gpu(case: Case) -> str:
    return case.gpu


def _leave_out(
    cases: list[Case], key: Callable[[Case], str]
) -> tuple[list[RowScore], list[LeftOut]]:
    """Score the rows of each group with constants fitted on the other groups."""
    scores, groups = [], []
    for name in sorted({key(case) for case in cases}):
        test = [case for case in cases if key(case) == name]
        rest = [case for case in cases if key(case) != name]
        none = [case.scores[0] for case in test]
        scored = _scores(test, fit(rest)) if rest else none
        after = median_error(scored) if rest else None
        groups.append(LeftOut(name, median_error(none), after))
        scores += scored
    return scores, groups


def _measured_s(case: Case) -> float:
    measured = case.scores[0].main.measured
    return 1.0 / measured if case.main_metric == "output_tokens_per_s" else measured


def _line(times_s: FloatArray) -> FloatArray:
    """Return the time without constants, and what each adds for one `_TRIED` of it."""
    return np.concatenate((times_s[:1], times_s[1:] - times_s[0]))


def _along(constants: EngineConstants) -> FloatArray:
    """Return what `_line` is multiplied by to have the time with given constants."""
    step, dense, sequence = _TRIED
    return np.array(
        [
            1.0,
            constants.step_s / step.step_s,
            (constants.dense_factor - 1.0) / (dense.dense_factor - 1.0),
            constants.sequence_s / sequence.sequence_s,
        ]
    )


def _scores(cases: list[Case], constants: EngineConstants) -> list[RowScore]:
    if constants == EngineConstants():
        return [case.scores[0] for case in cases]
    return [score_row(case.row, case.plan, constants) for case in cases]
