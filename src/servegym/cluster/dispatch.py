"""Where a request goes: which actions are allowed, and taking one of them."""

from __future__ import annotations

import math

from servegym.cluster.emission import leave_system
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.router import (
    count_outstanding,
    count_prefill,
    enqueue,
    hit_tokens_now,
    kv_need,
)
from servegym.cluster.state import (
    DECODE_ONLY,
    DISPATCH,
    EV_DISPATCH,
    EV_HOLD,
    EV_REJECT,
    HELD,
    HOLD_OVER,
    NEVER,
    OBSERVED_KV_CAPACITY,
    OBSERVED_UP,
    PREFILL_ONLY,
    QUEUED,
    REJECTED,
    Params,
    State,
)
from servegym.cluster.timers import set_turn
from servegym.cluster.transfers import find_place


@inlined
def set_up(s: State, e: int, r: int, up: bool) -> None:
    """Note that a replica has failed or is back."""
    env = s.env[e]
    env.num_up += 1 if up else -1
    env.allowed_above = math.inf  # `allowed` holds for no request
    s.observation[e, OBSERVED_UP, r] = 1.0 if up else 0.0


@inlined
def _allow(p: Params, s: State, e: int, request: int) -> None:
    """Bring `State.allowed` up to date for a request; most often the one before needs the same."""
    env = s.env[e]
    need = kv_need(s, e, request)
    if not env.allowed_above < need <= env.allowed_up_to:
        _allow_anew(p, s, e, need)


@helper
def _allow_anew(p: Params, s: State, e: int, need: int) -> None:
    env = s.env[e]
    env.allowed_above = -math.inf
    env.allowed_up_to = math.inf
    env.num_allowed = 0
    for r in range(env.num_replicas):
        capacity = s.observation[e, OBSERVED_KV_CAPACITY, r]
        up = (
            s.observation[e, OBSERVED_UP, r] > 0.0
            and p.role[s.replica[e, r].type_idx] != DECODE_ONLY
        )
        s.allowed[e, r] = up and need <= capacity
        env.num_allowed += s.allowed[e, r]
        if up and need <= capacity:
            env.allowed_up_to = min(env.allowed_up_to, capacity)
        elif up:
            env.allowed_above = max(env.allowed_above, capacity)


@inlined
def route(p: Params, s: State, e: int, request: int) -> None:
    """A request wants a replica: let it wait until one is up, ask, or decide in place."""
    env = s.env[e]
    _allow(p, s, e, request)
    if env.num_allowed == 0:
        hold(p, s, e, request)
    elif p.asks.dispatch != NEVER:
        env.decision = DISPATCH
        env.deciding = request
    else:
        send(p, s, e, request, _least_busy(s, e))


@inlined
def _least_busy(s: State, e: int) -> int:
    """The allowed replica with the smallest sum of running and four times its waiting requests."""
    best, least = -1, 0
    for r in range(s.env[e].num_replicas):
        if s.allowed[e, r]:
            busy = s.replica[e, r].num_running + 4 * s.replica[e, r].num_waiting
            if best < 0 or busy < least:
                best, least = r, busy
    return best


@helper
def hold(p: Params, s: State, e: int, request: int) -> None:
    """Put the decision about a request off."""
    now_s = s.env[e].now_s
    set_turn(s, e, now_s + p.hold_s, HOLD_OVER, request)
    s.env[e].num_held += 1
    s.request[e, request].status = HELD
    s.request[e, request].num_holds += 1
    log_event(p, s, e, now_s, EV_HOLD, request, -1, 0.0)


@helper
def reject(p: Params, s: State, e: int, request: int) -> None:
    """Let a request leave without an answer."""
    q = s.request[e, request]
    now_s = s.env[e].now_s
    q.status = REJECTED
    q.finish_s = now_s
    q.replica = -1
    log_event(p, s, e, now_s, EV_REJECT, request, -1, 0.0)
    leave_system(s, e, request, now_s)


@helper
def send(p: Params, s: State, e: int, request: int, r: int) -> None:
    """Put a request at the end of a replica's queue, or first find where it will decode."""
    now_s = s.env[e].now_s
    q = s.request[e, request]
    q.status = QUEUED
    q.replica = r
    q.dispatch_s = now_s
    log_event(p, s, e, now_s, EV_DISPATCH, request, r, 0.0)
    q.hit_hint = hit_tokens_now(p, s, e, r, request, now_s)
    count_outstanding(s, e, r, request)
    count_prefill(s, e, r, request)
    s.replica[e, r].last_dispatch_s = now_s
    if p.destination_first and p.role[s.replica[e, r].type_idx] == PREFILL_ONLY:
        s.transfer[e, request].prefill_on = r
        find_place(p, s, e, request)
        return
    enqueue(p, s, e, r, request)
