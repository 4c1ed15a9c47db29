"""What a router infers: how fast engines are, how long answers become, whom a choice hurts.

The formulas are here, for the simulator and for the live state alike, and the kernel that fills the
features of `contract.INFERRED` in the simulator from what a router knows: when the tokens of its
streams came, and what it was told of requests.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.entry import INFER, entry
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.state import (
    DECODE,
    OBSERVED_AS_TIGHT,
    OBSERVED_DECODE_SEQ,
    OBSERVED_DECODE_STEP,
    OBSERVED_EXPECTED_LEFT,
    OBSERVED_OUTSTANDING,
    OBSERVED_PREFILL_RATE,
    OBSERVED_PREFIX_HIT,
    OBSERVED_PUSHED_OVER_40,
    OBSERVED_PUSHED_OVER_100,
    OBSERVED_RECENT_ITL,
    OBSERVED_STEP_TIME_RATIO,
    Params,
    State,
)
from servegym.cluster.steptime import decode_span_s
from servegym.cluster.stretches import steps_ended_by
from servegym.policy.contract import MARGINS, Group
from servegym.policy.costs import Quantity, step_s
from servegym.policy.lengths import (
    error_of,
    expected_length,
    learn_length,
    spread_of,
    tokens_left,
)
from servegym.typing import FloatArray

_LIMITS = int(Group.LIMITS)

#: Observed steps are forgotten with these time constants, of time in which newer ones have been
#: observed and of time that has passed; times from token to token with this one.
_FORGET_OBSERVED_S, _FORGET_STEPS_S, _FORGET_ITL_S = 0.5, 10.0, 2.0
#: Both are weighed against so much time in which all was as expected.
_AS_EXPECTED_S = 0.1


@inlined
def steps_kept(since_s: float, observed_s: Quantity) -> Quantity:
    """Share of the observed steps that counts after so many seconds, and so many observed."""
    return np.exp(-(observed_s / _FORGET_OBSERVED_S + since_s / _FORGET_STEPS_S))


@inlined
def itl_kept(since_s: float) -> float:
    """Share of the observed times between tokens that counts after so many seconds."""
    return math.exp(-since_s / _FORGET_ITL_S)


@inlined
def step_time_ratio(observed_s: Quantity, expected_s: Quantity) -> Quantity:
    """Observed over expected time of steps: feature `step_time_ratio`."""
    return (observed_s + _AS_EXPECTED_S) / (expected_s + _AS_EXPECTED_S)


@inlined
def recent_itl_s(seconds: Quantity, steps: Quantity, alone_s: Quantity) -> Quantity:
    """Seconds from token to token: feature `recent_itl_s`."""
    return (seconds + _AS_EXPECTED_S) / (steps + _AS_EXPECTED_S / alone_s)


@inlined
def tpot_s(since_first_s: float, left: float, tokens: float, each_s: float) -> float:
    """TPOT of a request at its end, as far as is known now.

    Args:
        since_first_s: Time since its first token, 0 before.
        left: Tokens to come.
        tokens: Tokens that have come.
        each_s: Time of a step from now on.
    """
    return (since_first_s + left * each_s) / (left + tokens)


@inlined
def forget_requests(view: FloatArray, r: int, new: float) -> tuple[float, float, float]:
    """Begin to count the requests that are at a replica.

    Args:
        view: Features, `float64[F, R]`; rows from `expected_tokens_left` on are set to 0.
        r: The replica.
        new: Prompt tokens of the new request that are to be computed there.

    Returns:
        Seconds of a step without the new request and with it, and of its prefill.
    """
    alone_s, seq_s = view[OBSERVED_DECODE_STEP, r], view[OBSERVED_DECODE_SEQ, r]
    ratio, others = view[OBSERVED_STEP_TIME_RATIO, r], view[OBSERVED_OUTSTANDING, r]
    for row in range(OBSERVED_EXPECTED_LEFT, OBSERVED_PUSHED_OVER_100 + 1):
        view[row, r] = 0.0
    return (
        ratio * step_s(alone_s, seq_s, max(0.0, others - 1.0)),
        ratio * step_s(alone_s, seq_s, others),
        ratio * new / view[OBSERVED_PREFILL_RATE, r],
    )


@inlined
def count_request(
    view: FloatArray,
    r: int,
    left: float,
    tokens: float,
    so_far_s: float,
    own_limit_s: float,
    limit_s: float,
    step_times: tuple[float, float, float],
) -> None:
    """Count a request that is at a replica.

    Args:
        view: Features, `float64[F, R]`, to whose rows of `Group.LIMITS` it is added.
        r: The replica.
        left: Tokens expected to come.
        tokens: Tokens that have come.
        so_far_s: Seconds since its first token, 0 before.
        own_limit_s: Its TPOT limit.
        limit_s: That of the new request.
        step_times: From `forget_requests`.
    """
    each_s, with_it_s, pause_s = step_times
    view[OBSERVED_EXPECTED_LEFT, r] += left
    view[OBSERVED_AS_TIGHT, r] += own_limit_s <= limit_s
    without_s = tpot_s(so_far_s, left, tokens, each_s)
    then_s = tpot_s(so_far_s + pause_s, left, tokens, with_it_s)
    for k in range(len(MARGINS)):
        most_s = MARGINS[k] * own_limit_s
        view[OBSERVED_PUSHED_OVER_40 + k, r] += without_s <= most_s < then_s


@kernel
def count_requests(
    view: FloatArray, r: int, requests: FloatArray, variance: float, limit_s: float, new: float
) -> None:
    """Fill the rows of `Group.LIMITS` of a replica from what is known of its requests.

    Args:
        view: Features, `float64[F, R]`.
        r: The replica.
        requests: Of each, the tokens expected in all and those that have come, seconds since its
            first token (0 before) and its TPOT limit, `float64[n, 4]`.
        variance: Of the logarithms of their lengths.
        limit_s: TPOT limit of the new request.
        new: Its prompt tokens that are to be computed there.
    """
    step_times = forget_requests(view, r, new)
    for i in range(requests.shape[0]):
        left = tokens_left(requests[i, 0], variance, requests[i, 1])
        count_request(
            view, r, left, requests[i, 1], requests[i, 2], requests[i, 3], limit_s, step_times
        )


@entry(INFER, types.void, types.int64, types.int64)
def infer(p: Params, s: State, e: int, needs: int) -> None:
    """Fill the inferred rows of `s.observation[e]` for the dispatch that is due.

    Of the request, `State.length` and the environment's `expected_spread` are written.

    Args:
        p: Constants.
        s: State; prefix hits have been filled.
        e: Environment.
        needs: Feature groups to fill.
    """
    env = s.env[e]
    sums = s.length_sums[e]
    _learn(s, e)
    error = error_of(sums)
    variance = error[3]
    i = env.deciding
    asking = s.request[e, i]
    s.length[e, i].expected = expected_length(asking.predicted, error)
    env.expected_spread = spread_of(variance)
    now_s = env.now_s
    since_s = now_s - env.looked_s
    env.looked_s = now_s
    view = s.observation[e]
    limit_s = p.slo_s[asking.slo_class, 1]
    for r in range(env.num_replicas):
        v = s.replica[e, r]
        ended = 0
        if v.mode == DECODE:
            ended = steps_ended_by(p, s, e, r, now_s)
        _look(p, s, e, r, ended, since_s)
        if not needs & _LIMITS:
            continue
        new = max(0.0, asking.prompt - view[OBSERVED_PREFIX_HIT, r])
        step_times = forget_requests(view, r, new)
        running = v.run_head
        waiting = v.wait_head
        while running >= 0 or waiting >= 0:
            j = running if running >= 0 else waiting
            q = s.request[e, j]
            if running >= 0:
                running = q.next_request
            else:
                waiting = q.next_request
            tokens = q.generated
            if q.join_iter >= 0:
                tokens += v.iteration + ended - q.join_iter
            length = s.length[e, j]
            if length.expected == 0.0:
                length.expected = expected_length(q.predicted, error)
            so_far_s = 0.0 if math.isnan(q.first_token_s) else now_s - q.first_token_s
            own_limit_s = p.slo_s[q.slo_class, 1]
            left = tokens_left(length.expected, variance, tokens)
            count_request(view, r, left, tokens, so_far_s, own_limit_s, limit_s, step_times)


@inlined
def _learn(s: State, e: int) -> None:
    """Learn from the requests that have ended since the last call."""
    env = s.env[e]
    last = env.last_learnt
    i = s.length[e, last].next_ended if last >= 0 else env.first_ended
    while i >= 0:
        q = s.request[e, i]
        learn_length(s.length_sums[e], q.predicted, q.output)
        env.last_learnt = i
        i = s.length[e, i].next_ended


@inlined
def _look(p: Params, s: State, e: int, r: int, ended: int, since_s: float) -> None:
    """Take in what the streams of a replica have shown since the last call.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        ended: Steps of the decode stretch in progress that have ended.
        since_s: Seconds since that call.
    """
    v, w = s.replica[e, r], s.stream[e, r]
    span_s, batch = 0.0, v.num_decodes
    if ended > 0:
        kv = v.kv_tokens + batch
        span_s = v.stretch_factor * decode_span_s(p, v.type_idx, batch, kv, ended)
    alone_s, seq_s = (
        s.observation[e, OBSERVED_DECODE_STEP, r],
        s.observation[e, OBSERVED_DECODE_SEQ, r],
    )
    kept = itl_kept(since_s)
    w.itl_s = kept * w.itl_s + w.seen_s + span_s
    w.itl_steps = kept * w.itl_steps + w.seen_steps + ended
    w.seen_s = -span_s  # the stretch will count as a whole when it ends
    w.seen_steps = -ended
    if v.is_pure == 0 or v.mode != DECODE:
        span_s, ended = 0.0, 0
    steps, others = w.pure_steps + ended, w.pure_others + ended * (batch - 1)
    observed_s = w.pure_s + span_s + w.late_s
    kept = steps_kept(since_s, observed_s)
    w.observed_s = kept * w.observed_s + observed_s
    w.expected_s = kept * w.expected_s + steps * alone_s + others * seq_s + w.late_expected_s
    w.late_s = 0.0
    w.late_expected_s = 0.0
    w.pure_s = -span_s
    w.pure_steps = -ended
    w.pure_others = -ended * (batch - 1)
    s.observation[e, OBSERVED_STEP_TIME_RATIO, r] = step_time_ratio(w.observed_s, w.expected_s)
    s.observation[e, OBSERVED_RECENT_ITL, r] = recent_itl_s(w.itl_s, w.itl_steps, alone_s)
