"""What an offline search minimises: the metric of a scenario's objective, in compiled form."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.jit import helper, inlined, kernel
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import REJECTED, Records, State
from servegym.errors import ConfigError, unknown_name
from servegym.typing import FloatArray
from servegym.workloads.table import ANY_END

#: Metrics that can be searched for, see `docs/evaluation.md`.
E2E_MEAN, GOODPUT, TTFT_P99 = range(3)
METRICS = {"e2e_mean_s": E2E_MEAN, "goodput_rps": GOODPUT, "ttft_p99_s": TTFT_P99}

#: Rows of an array of fates, `float64[NUM_FATES, num_requests]`; `SERVED` is 0 if rejected.
ARRIVAL, FIRST_TOKEN, FINISH, SERVED = range(4)
NUM_FATES = 4


class Goal(NamedTuple):
    """What counts; axis: N requests."""

    metric: int  # one of METRICS
    first: int  # first request that is judged
    ttft_s: FloatArray  # [N] limit
    tpot_s: FloatArray  # [N] limit
    output: FloatArray  # [N] tokens
    any_end: bool  # whether some request waits for whichever ends next
    begin_s: float  # arrival of the first that is judged, if answers took no time
    last_s: float  # arrival of the last, likewise


def make_goal(metric: str, spec: ClusterSpec, episode: Episode, warmup: float = 0.2) -> Goal:
    """Say what counts in an episode.

    Args:
        metric: One of `METRICS`.
        spec: The cluster.
        episode: What is played.
        warmup: Share of the requests, the first of the table, that is not judged; as in
            `problems.request_metrics.measure`.

    Raises:
        ConfigError: If there is no such search.
    """
    if metric not in METRICS:
        raise ConfigError(unknown_name("metric to search for", metric, METRICS))
    table = episode.table
    first = int(warmup * len(table))
    limits = np.array([(c.ttft_s, c.tpot_s) for c in spec.slo_classes])[table.slo_class]
    return Goal(
        metric=METRICS[metric],
        first=first,
        ttft_s=np.ascontiguousarray(limits[:, 0]),
        tpot_s=np.ascontiguousarray(limits[:, 1]),
        output=table.output_tokens.astype(np.float64),
        any_end=bool((table.after == ANY_END).any()),
        begin_s=float(table.arrival_s[first]),
        last_s=float(table.arrival_s[-1]),
    )


@helper
def read_fates(s: State, e: int, fates: FloatArray) -> None:
    """Write what became of every request of an environment."""
    for i in range(fates.shape[1]):
        q = s.request[e, i]
        fates[ARRIVAL, i] = q.arrival_s
        fates[FIRST_TOKEN, i] = q.first_token_s
        fates[FINISH, i] = q.finish_s
        fates[SERVED, i] = 0.0 if q.status == REJECTED else 1.0


@kernel
def loss(goal: Goal, fates: FloatArray, room: FloatArray) -> tuple[float, float]:
    """Judge fates: lower is better.

    Args:
        goal: What counts.
        fates: Of all requests, `float64[NUM_FATES, N]`.
        room: Working memory, `float64[N]`.

    Returns:
        The metric (goodput negated), and what decides between equals: how far requests miss their
        limits, up to twice the limit (goodput), or the mean TTFT (its percentile).
    """
    if goal.metric == GOODPUT:
        return _goodput_loss(goal, fates)
    if goal.metric == TTFT_P99:
        return _tail_loss(goal, fates, room)
    total, count = 0.0, 0
    for i in range(goal.first, fates.shape[1]):
        if fates[SERVED, i] > 0.0:
            total += fates[FINISH, i] - fates[ARRIVAL, i]
            count += 1
    return (total / count if count else math.inf), 0.0


@inlined
def _goodput_loss(goal: Goal, fates: FloatArray) -> tuple[float, float]:
    # the window is that of `outcome.goodput_rps`
    begin_s, end_s = math.inf, -math.inf
    for i in range(goal.first, fates.shape[1]):
        begin_s = min(begin_s, fates[ARRIVAL, i])
        end_s = max(end_s, fates[ARRIVAL, i])
    if not goal.any_end:
        begin_s = goal.begin_s
        end_s = min(end_s, goal.last_s)
    if end_s <= begin_s:
        for i in range(goal.first, fates.shape[1]):
            if not math.isnan(fates[FINISH, i]):
                end_s = max(end_s, fates[FINISH, i])
    good, missed = 0, 0.0
    for i in range(goal.first, fates.shape[1]):
        if fates[ARRIVAL, i] > end_s:
            continue
        if fates[SERVED, i] == 0.0:
            missed += 1.0
            continue
        ttft_s = fates[FIRST_TOKEN, i] - fates[ARRIVAL, i]
        tpot_s = 0.0
        if goal.output[i] > 1.0:
            tpot_s = (fates[FINISH, i] - fates[FIRST_TOKEN, i]) / (goal.output[i] - 1.0)
        if ttft_s <= goal.ttft_s[i] and tpot_s <= goal.tpot_s[i]:
            good += 1
        else:
            excess = max(ttft_s / goal.ttft_s[i], tpot_s / goal.tpot_s[i]) - 1.0
            missed += min(1.0, excess)
    span_s = end_s - begin_s
    return (-good / span_s if span_s > 0.0 else math.inf), missed


@inlined
def _tail_loss(goal: Goal, fates: FloatArray, room: FloatArray) -> tuple[float, float]:
    total, count = 0.0, 0
    for i in range(goal.first, fates.shape[1]):
        if fates[SERVED, i] > 0.0:
            total += fates[FIRST_TOKEN, i] - fates[ARRIVAL, i]
            count += 1
    if count == 0:
        return math.inf, 0.0
    place = 0.99 * (count - 1)
    below = int(place)
    kept, most = 0, count - below  # the largest ones, in falling order
    for i in range(goal.first, fates.shape[1]):
        if fates[SERVED, i] == 0.0:
            continue
        ttft_s = fates[FIRST_TOKEN, i] - fates[ARRIVAL, i]
        if kept == most and ttft_s <= room[kept - 1]:
            continue
        k = kept if kept < most else kept - 1
        while k > 0 and room[k - 1] < ttft_s:
            room[k] = room[k - 1]
            k -= 1
        room[k] = ttft_s
        kept = min(kept + 1, most)
    low_s = room[most - 1]
    high_s = room[most - 2] if most > 1 else low_s
    return low_s + (place - below) * (high_s - low_s), total / count


@inlined
def is_better(found: tuple[float, float], old: tuple[float, float]) -> bool:
    """Whether a loss is lower by more than rounding; equal ones go by what decides between them."""
    if found[0] < old[0]:
        return old[0] - found[0] > 1e-12 * abs(found[0])
    return found[0] == old[0] and old[1] - found[1] > 1e-9 * abs(old[1])


def judged(goal: Goal, request: Records | NDArray[np.void]) -> tuple[float, float]:
    """Judge a whole run from Python.

    Args:
        goal: What counts.
        request: Of one environment, `REQUEST_DTYPE[N]`.
    """
    fates = np.stack(
        [
            request["arrival_s"],
            request["first_token_s"],
            request["finish_s"],
            (request["status"] != REJECTED).astype(np.float64),
        ]
    )
    found: tuple[float, float] = loss(goal, fates, np.zeros(fates.shape[1]))
    return found
