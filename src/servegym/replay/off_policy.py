"""What another policy would have brought, from a log whose choices were partly drawn by chance.

A request whose replica the policy would have chosen, too, counts as many times as such a draw was
unlikely (importance sampling, self-normalised: Swaminathan and Joachims 2015); or a regression says
what each choice brings, and importance sampling mends its errors (doubly robust: Dudik et al.
2011). Both are right about one choice among choices of the logged policy. They do not know what the
policy's other choices would have made of the fleet.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from servegym.envs.costs import COST_FEATURES, cost_features
from servegym.errors import ConfigError, WorkloadError
from servegym.policy.contract import (
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    PREDICTED_OUTPUT_TOKENS,
    PROMPT_TOKENS,
    TPOT_SLO_S,
    TTFT_SLO_S,
    observed_groups,
)
from servegym.policy.policy import Observations, Policy
from servegym.replay.dataset import OfflineDataset
from servegym.replay.rows import STATUSES
from servegym.typing import BoolArray, FloatArray, IntArray

Metric = Literal["e2e", "ttft", "in-time"]

#: Stretches of the log that are left out in turn, for the interval; requests that are near in time
#: have their load in common. Student's t for as many, less one, on either side of 95 %.
NUM_BLOCKS, _T = 25, 2.0639
#: Stretches of which each is predicted by a regression on the others.
_NUM_FOLDS = 5
#: Ridge, in observations.
_RIDGE = 1.0


class Estimate(NamedTuple):
    """A mean with its 95 % interval, by the jackknife over stretches of the log."""

    value: float
    low: float
    high: float


class OffPolicy(NamedTuple):
    """What a log says of a policy.

    Attributes:
        logged: Mean of what was logged.
        sampled: Mean under the policy, by self-normalised importance sampling.
        robust: The same, doubly robust.
        num_requests: Requests that count.
        num_left_out: Requests that do not: not drawn with a known probability, or without an
            outcome.
        agreed: Share of those decisions in which the policy would have done the same.
        effective: Requests that would say as much if all weighed the same.
        unsupported: Share of those decisions in which the policy would hold or reject, and the
            logged one did not: these are never explored, and the estimates are blind to them.
    """

    logged: Estimate
    sampled: Estimate
    robust: Estimate
    num_requests: int
    num_left_out: int
    agreed: float
    effective: float
    unsupported: float


def estimate(data: OfflineDataset, policy: Policy, *, metric: Metric = "e2e") -> OffPolicy:
    """Estimate what a policy would have brought.

    Args:
        data: Decisions with their propensities.
        policy: Decides by each decision's observation alone.
        metric: Mean time to the end or to the first token of finished requests, seconds; or share
            of all requests that ended within the limits of their class.

    Raises:
        ConfigError: If the policy needs what is not logged, or remembers.
        WorkloadError: If too few requests count.
    """
    _require_usable(policy)
    chosen = choices(data, policy)
    outcome = outcomes(data, metric)
    weight = np.where(chosen == data.action, 1.0, 0.0) / data.propensity  # NaN: not known
    last = np.flatnonzero(data.is_last)
    _, request = np.unique(data.request_id, return_inverse=True)
    weights = np.ones(request.max() + 1)
    np.multiply.at(weights, request, weight)  # those that were held or retried have several
    weights, outcome = weights[request[last]], outcome[last]
    used = np.isfinite(weights) & np.isfinite(outcome)
    num = int(used.sum())
    if num < 2 * NUM_BLOCKS:
        raise WorkloadError(
            f"{num} of {len(last)} requests were drawn with a known probability and have an"
            f" outcome, and estimates need {2 * NUM_BLOCKS}: set `explored` under"
            " dispatch.runtime and `observations: true` under dispatch.log, and log more"
        )
    rows, weights, outcome = last[used], weights[used], outcome[used]
    predicted_done, predicted_chosen = _predictions(data, rows, data.action, chosen, outcome)
    ones = np.ones(num)
    sampled = _jackknife([(weights * outcome, weights)])
    robust = _jackknife([(predicted_chosen, ones), (weights * (outcome - predicted_done), weights)])
    extra = data.mask.shape[1] - 2
    return OffPolicy(
        logged=_jackknife([(outcome, ones)]),
        sampled=sampled,
        robust=robust,
        num_requests=num,
        num_left_out=len(last) - num,
        agreed=float((chosen[rows] == data.action[rows]).mean()),
        effective=float(weights.sum() ** 2 / max((weights**2).sum(), 1e-300)),
        unsupported=float(((chosen[rows] >= extra) & (data.action[rows] < extra)).mean()),
    )


def _require_usable(policy: Policy) -> None:
    if policy.information == "oracle" or policy.needs & ~observed_groups(extended=False):
        raise ConfigError(
            f"{policy.name} needs more than a decision log keeps: estimate another policy"
        )
    if getattr(policy, "memory_size", 0) > 0:
        raise ConfigError(
            f"{policy.name} goes by what it did before, and in the log another policy did it:"
            " estimate another policy"
        )


def choices(data: OfflineDataset, policy: Policy) -> IntArray:
    """Return what a policy would have done at each decision, `int64[n]`, indices into the mask."""
    count, width = len(data), data.mask.shape[1] - 2
    replicas = np.zeros((count, NUM_REPLICA_FEATURES, width))
    replicas[:, : data.replicas.shape[1]] = data.replicas
    request = np.zeros((count, NUM_REQUEST_FEATURES))
    request[:, : data.request.shape[1]] = data.request
    policy.reset(1, 0)
    return policy.act(Observations(replicas, request, data.mask), np.zeros(count, np.int64))


def outcomes(data: OfflineDataset, metric: Metric) -> FloatArray:
    """Return what came of the request of each decision, `float64[n]`; NaN where nobody knows."""
    finished = data.status == STATUSES.index("finished")
    if metric == "e2e":
        return np.where(finished, data.e2e_s, np.nan)
    if metric == "ttft":
        return np.where(finished, data.ttft_s, np.nan)
    late_first = ~(data.ttft_s <= data.request[:, TTFT_SLO_S])
    late_rest = data.tpot_s > data.request[:, TPOT_SLO_S]  # an answer of one token has none
    in_time = finished & ~late_first & ~late_rest
    left = data.status == STATUSES.index("cancelled")  # it might have been in time
    return np.where(left, np.nan, in_time.astype(float))


def _predictions(
    data: OfflineDataset, rows: IntArray, done: IntArray, chosen: IntArray, outcome: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Predict outcomes of what was done and of what the policy would do, `float64[requests]` each.

    Each stretch of the log by a linear regression on the others.
    """
    known, asked = _described(data, rows, done), _described(data, rows, chosen)
    fold = np.arange(len(rows)) * _NUM_FOLDS // len(rows)
    found_done, found_chosen = np.empty(len(rows)), np.empty(len(rows))
    for k in range(_NUM_FOLDS):
        inside: BoolArray = fold == k
        x, y = known[~inside], outcome[~inside]
        around = y.mean()
        gram = x.T @ x + _RIDGE * np.eye(x.shape[1])
        coefficients = np.linalg.solve(gram, x.T @ (y - around))
        found_done[inside] = around + known[inside] @ coefficients
        found_chosen[inside] = around + asked[inside] @ coefficients
    return found_done, found_chosen


def _described(data: OfflineDataset, rows: IntArray, action: IntArray) -> FloatArray:
    """Describe choices by numbers, `float64[requests, N]`: costs, their squares, the request."""
    replicas, request = data.replicas[rows].transpose(0, 2, 1), data.request[rows]
    costs = cost_features(np.ascontiguousarray(replicas), request).astype(np.float64)
    width = costs.shape[1]
    at = action[rows]
    mine = np.where((at < width)[:, None], costs[np.arange(len(rows)), at % width], 0.0)
    prompt = np.log1p(request[:, PROMPT_TOKENS]) / 8.0
    predicted = np.log1p(request[:, PREDICTED_OUTPUT_TOKENS]) / 8.0
    extra = (at >= width).astype(float)
    others = np.stack([np.ones(len(rows)), prompt, predicted, prompt**2, predicted**2, extra], -1)
    assert mine.shape[1] == len(COST_FEATURES)
    return np.concatenate([others, mine, mine**2, mine * predicted[:, None]], -1)


def _jackknife(terms: list[tuple[FloatArray, FloatArray]]) -> Estimate:
    """Sum ratios of sums, and see how they vary as stretches of the log are left out.

    Args:
        terms: Numerators and denominators, `float64[requests]` each.
    """
    num = len(terms[0][0])
    block = np.arange(num) * NUM_BLOCKS // num
    value, without = 0.0, np.zeros(NUM_BLOCKS)
    for above, below in terms:
        over = np.bincount(block, above, NUM_BLOCKS)
        under = np.bincount(block, below, NUM_BLOCKS)
        with np.errstate(invalid="ignore", divide="ignore"):
            value += float(over.sum() / under.sum())
            without += (over.sum() - over) / (under.sum() - under)
    spread = math.sqrt((NUM_BLOCKS - 1) / NUM_BLOCKS * ((without - without.mean()) ** 2).sum())
    return Estimate(value, value - _T * spread, value + _T * spread)
