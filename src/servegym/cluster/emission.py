"""Tokens that come out of an engine, and requests that have all of theirs."""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.cluster.lingering import linger
from servegym.cluster.log import count_itl, log_event
from servegym.cluster.router import forget_outstanding
from servegym.cluster.running import leave_running
from servegym.cluster.state import (
    ARRIVAL,
    EV_FINISH,
    EV_FIRST_TOKEN,
    FINISHED,
    OBSERVED_PENDING_PREFILL,
    OBSERVED_RECENT_TPOT,
    OBSERVED_RECENT_TTFT,
    Params,
    State,
)
from servegym.cluster.timers import set_timer
from servegym.cluster.turns import end_turn
from servegym.cluster.watch import note_ended
from servegym.workloads.table import ANY_END


@inlined
def emit(p: Params, s: State, e: int, r: int, request: int, now_s: float, tokens: int) -> int:
    """Let tokens of a request come out at once, and let it end if its last is among them.

    They have one inter-token time, as in a stream that brings them in one piece.

    Returns:
        How many are still to come.
    """
    v = s.replica[e, r]
    q = s.request[e, request]
    q.generated += tokens
    v.emitted += tokens
    if math.isnan(q.first_token_s):
        q.first_token_s = now_s
        log_event(p, s, e, now_s, EV_FIRST_TOKEN, request, r, 0.0)
        s.observation[e, OBSERVED_PENDING_PREFILL, r] -= q.prompt - q.hit_hint
        ttft = now_s - q.arrival_s
        old = s.observation[e, OBSERVED_RECENT_TTFT, r]
        s.observation[e, OBSERVED_RECENT_TTFT, r] = ttft if old == 0.0 else old + 0.1 * (ttft - old)
    else:
        count_itl(p, s, e, now_s - q.last_token_s, 1)
    q.last_token_s = now_s
    left = q.output - q.generated
    if left == 0:
        finish(p, s, e, r, request, now_s)
    return left


@inlined
def finish(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """A request has all its tokens."""
    q = s.request[e, request]
    if p.forms_ahead[s.replica[e, r].type_idx] > 0:
        linger(p, s, e, r, request)
    else:
        leave_running(p, s, e, r, request)
        if p.retains or p.tiered:
            end_turn(p, s, e, r, request, now_s)
    q.status = FINISHED
    q.finish_s = now_s
    s.replica[e, r].emitted -= q.generated
    log_event(p, s, e, now_s, EV_FINISH, request, r, 0.0)
    leave_system(s, e, request, now_s)
    forget_outstanding(s, e, r, request)
    note_ended(p, s, e, request)
    output = q.output
    tpot = 0.0
    if output > 1:
        tpot = (now_s - q.first_token_s) / (output - 1)
        old = s.observation[e, OBSERVED_RECENT_TPOT, r]
        s.observation[e, OBSERVED_RECENT_TPOT, r] = tpot if old == 0.0 else old + 0.1 * (tpot - old)
    c = q.slo_class
    ttft = q.first_token_s - q.arrival_s
    if ttft <= p.slo_s[c, 0] and tpot <= p.slo_s[c, 1]:
        s.env[e].good += p.slo_weight[c]


@inlined
def next_with(s: State, e: int, i: int, after: int) -> int:
    """The first request from `i` on that waits for `BY_ITSELF` or `ANY_END`."""
    while i < s.env[e].num_requests and s.request[e, i].after != after:
        i += 1
    return i


@inlined
def leave_system(s: State, e: int, request: int, now_s: float) -> None:
    """Count one request less in the system from now on, and release those that wait for it."""
    env = s.env[e]
    follower = s.request[e, request].first_after
    while follower >= 0:
        q = s.request[e, follower]
        set_timer(s, e, now_s + q.delay_s, ARRIVAL, follower, follower)
        follower = q.next_after
    follower = env.next_sent
    if follower < env.num_requests:
        env.next_sent = next_with(s, e, follower + 1, ANY_END)
        set_timer(s, e, now_s + s.request[e, follower].delay_s, ARRIVAL, follower, follower)
    env.area += env.in_system * (now_s - env.area_until_s)
    env.area_until_s = now_s
    env.in_system -= 1
    env.num_ended += 1
