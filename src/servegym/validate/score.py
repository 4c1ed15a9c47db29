"""Scores: simulated against measured, run by run and row by row, and their aggregates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import FloatArray
from servegym.validate.engine import EngineConstants, EngineSetup
from servegym.validate.experiments import play
from servegym.validate.flags import extrapolations, guess
from servegym.validate.published import Experiment, Row, experiment, read_published
from servegym.validate.replay import Replay, replay_open
from servegym.validate.runs import RealRun, read_runs

Constants = dict[str, EngineConstants]
STATISTICS = ("mean", "p50", "p90", "p99")
METRICS = ("tpot_s", "ttft_s", "output_tokens_per_s", "e2e_s")


class Comparison(NamedTuple):
    """A measured and a simulated figure."""

    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative to the measured one; 0.1 is 10 % too much."""
        return self.simulated / self.measured - 1.0 if self.measured else float("nan")


class Skipped(NamedTuple):
    """What could not be simulated."""

    name: str
    source: str
    reason: str


@dataclass(frozen=True)
class RunScore:
    """How a replayed run compares with the real one.

    Attributes:
        run: The real one.
        setup: As simulated.
        replay: The simulated one.
        figures: By metric and statistic, e.g. `("ttft_s", "p99")`.
        series: Sampled at the times of the real run.
        extrapolated: Why it is no validation of the costs; empty: validated.
    """

    run: RealRun
    setup: EngineSetup
    replay: Replay
    figures: dict[tuple[str, str], Comparison]
    series: dict[str, FloatArray]
    extrapolated: list[str]


@dataclass(frozen=True)
class RowScore:
    """One replayed row; see `RunScore`."""

    row: Row
    plan: Experiment
    figures: dict[str, Comparison]
    extrapolated: list[str]
    guess: str

    @property
    def main(self) -> Comparison:
        """The figure that speaks most of the step time: TPOT, else throughput, else another."""
        order = ("tpot_s", "output_tokens_per_s", "e2e_s", "ttft_s")
        return next(self.figures[name] for name in order if name in self.figures)


@dataclass(frozen=True)
class Validation:
    """Everything one command scored.

    Attributes:
        runs: Of `--e2e`.
        rows: Of `--published`.
        skipped_files: Of `--e2e`.
        skipped_rows: Of `--published`.
        constants: Engine-family constants used.
    """

    runs: list[RunScore] = field(default_factory=list)
    rows: list[RowScore] = field(default_factory=list)
    skipped_files: list[Skipped] = field(default_factory=list)
    skipped_rows: list[Skipped] = field(default_factory=list)
    constants: Constants = field(default_factory=dict)


class Aggregate(NamedTuple):
    """Errors of a group of rows."""

    num_rows: int
    median: float
    p90: float
    bias: float


def score_runs(folder: Path, constants: Constants) -> tuple[list[RunScore], list[Skipped]]:
    """Replay every real run of a folder.

    Raises:
        ServeGymError: If the folder or a run cannot be used.
    """
    runs, rest = read_runs(folder)
    scores = [score_run(run, constants.get("vllm", EngineConstants())) for run in runs]
    return scores, [Skipped(name, folder.name, reason) for name, reason in rest]


def score_run(run: RealRun, constants: EngineConstants) -> RunScore:
    """Replay one real run under its own arrivals, lengths and engine settings."""
    setup = EngineSetup(
        gpu=run.gpu,
        model=run.model,
        tp=run.tp,
        precision=run.precision,
        kv_precision=run.kv_precision,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        block_size=run.block_size,
        num_blocks=run.num_blocks,
        memory_fraction=run.memory_fraction,
        expert_ranks=run.dp if run.expert_parallel else 1,
    )
    replay = replay_open(
        setup.replica(constants),
        run.arrival_s,
        run.prompt_tokens,
        run.output_tokens,
        block_size=run.block_size,
        prefix_caching=run.prefix_caching,
        num_replicas=run.dp,
        record=True,
    )
    added = {"ttft_s": constants.request_s, "e2e_s": constants.request_s}
    figures = {
        (metric, statistic): Comparison(
            summary(getattr(run, metric), statistic),
            summary(getattr(replay, metric), statistic) + added.get(metric, 0.0),
        )
        for metric in ("ttft_s", "tpot_s", "e2e_s")
        for statistic in STATISTICS
    }
    makespan = float((run.arrival_s + run.e2e_s).max())
    tokens = float(run.output_tokens.sum())
    figures["makespan_s", "whole"] = Comparison(makespan, replay.makespan_s)
    figures["output_tokens_per_s", "whole"] = Comparison(
        tokens / makespan, replay.output_tokens_per_s
    )
    series = {}
    if "t" in run.series:
        series = replay.series(run.series["t"])
        for name, values in series.items():
            if name in run.series and run.series[name].any():
                figures[name, "time mean"] = Comparison(
                    float(run.series[name].mean()), float(values.mean())
                )
    return RunScore(run, setup, replay, figures, series, extrapolations(setup, "vllm"))


def score_published(
    path: Path, constants: Constants, progress: Callable[[float], None] = lambda share: None
) -> tuple[list[RowScore], list[Skipped]]:
    """Replay every row of a table of published measurements that can be.

    Raises:
        WorkloadError: If the file is no such table.
    """
    return score_rows(read_published(path), constants, progress)


def score_rows(
    rows: list[Row], constants: Constants, progress: Callable[[float], None] = lambda share: None
) -> tuple[list[RowScore], list[Skipped]]:
    """Replay rows; those that cannot be are returned with the reason."""
    scores, skipped = [], []
    for i, row in enumerate(rows):
        progress(i / len(rows))
        try:
            plan = experiment(row)
            scores.append(score_row(row, plan, constants.get(plan.family, EngineConstants())))
        except ConfigError as error:
            skipped.append(Skipped(row.row_id, row.source, short_reason(str(error))))
    return scores, skipped


def score_row(row: Row, plan: Experiment, constants: EngineConstants) -> RowScore:
    """Replay a published row and compare its figures.

    Raises:
        ConfigError: If the model or a request does not fit.
    """
    simulated, replay = play(plan, constants)
    figures = {
        name: Comparison(value, simulated[name])
        for name, value in row.measured.items()
        if name in simulated
    }
    if not figures:
        raise ConfigError("nothing that was published can be simulated")
    return RowScore(
        row,
        plan,
        figures,
        extrapolations(plan.setup, plan.family, row.quality, apart=plan.prefill is not None),
        guess(row, plan, simulated, replay.num_preemptions),
    )


def short_reason(message: str) -> str:
    """Cut the list of allowed names off an error's message."""
    return message.split(": choose one of")[0]


def summary(values: FloatArray, statistic: str) -> float:
    """Return `mean` or a percentile such as `p99` of the values that are not NaN."""
    values = values[~np.isnan(values)]
    if statistic == "mean":
        return float(values.mean())
    return float(np.percentile(values, int(statistic[1:])))


def aggregate(errors: Iterable[float]) -> Aggregate:
    """Summarise relative errors: median and 90th percentile of their size, median with sign."""
    values = np.array(list(errors))
    size = np.abs(values)
    return Aggregate(
        len(values),
        float(np.median(size)),
        float(np.percentile(size, 90)),
        float(np.median(values)),
    )


def aggregates(
    rows: list[RowScore], key: Callable[[RowScore], str]
) -> dict[tuple[str, str], dict[str, Aggregate]]:
    """Aggregate the errors of each metric by `(key, grade)`."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for score in rows:
        group = groups.setdefault((key(score), score.row.quality), {})
        for name, figure in score.figures.items():
            group.setdefault(name, []).append(figure.error)
    return {
        place: {name: aggregate(errors) for name, errors in group.items()}
        for place, group in sorted(groups.items())
    }


def parallelism(plan: Experiment) -> str:
    """Say in a word or two over what an experiment spreads its model."""
    setup = plan.setup
    if plan.prefill is not None:
        return "disaggregated"
    if setup.expert_ranks > 1:
        return "data and experts"
    if setup.expert_groups > 1:
        return "tensor and experts"
    if setup.pp > 1:
        return "pipeline" if setup.tp == 1 else "tensor and pipeline"
    return "tensor" if setup.tp > 1 else "one GPU"


#: How rows are grouped in reports.
DIMENSIONS: dict[str, Callable[[RowScore], str]] = {
    "source": lambda score: score.row.source,
    "GPU": lambda score: score.plan.setup.gpu,
    "model": lambda score: score.plan.setup.model,
    "engine": lambda score: score.plan.family,
    "precision": lambda score: score.plan.setup.precision,
    "load": lambda score: score.plan.loop,
    "family": lambda score: ", ".join(
        (score.plan.family, parallelism(score.plan), score.plan.setup.precision)
    ),
}


def worst(rows: list[RowScore], count: int = 20) -> list[RowScore]:
    """Return the rows whose main figure is farthest off, as a factor either way."""
    return sorted(rows, key=lambda s: -abs(np.log(s.main.simulated / s.main.measured)))[:count]
