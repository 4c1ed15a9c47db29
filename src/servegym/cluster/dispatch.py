"""Where a request goes: which actions are allowed, and taking one of them."""

from __future__ import annotations

import math

from servegym.cluster.engine import leave_system, prefix_hit_tokens, wake
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.retention import expect
from servegym.cluster.state import (
    DISPATCH,
    EV_DISPATCH,
    EV_HOLD,
    EV_REJECT,
    HELD,
    HOLD_OVER,
    NEVER,
    QUEUED,
    REJECTED,
    VIEW_KV_CAPACITY,
    VIEW_OUTSTANDING,
    VIEW_OUTSTANDING_PREDICTED,
    VIEW_OUTSTANDING_PROMPT,
    VIEW_PENDING_PREFILL,
    VIEW_UP,
    Params,
    State,
)
from servegym.cluster.timers import set_turn


@inlined
def kv_need(s: State, e: int, request: int) -> int:
    """KV tokens a request holds at its end."""
    q = s.request[e, request]
    return q.prompt + q.output - 1


@inlined
def set_up(s: State, e: int, r: int, up: bool) -> None:
    """Note that a replica has failed or is back."""
    env = s.env[e]
    env.num_up += 1 if up else -1
    env.allowed_above = math.inf  # `allowed` holds for no request
    s.shown[e, VIEW_UP, r] = 1.0 if up else 0.0


@inlined
def _allow(s: State, e: int, request: int) -> None:
    """Bring `State.allowed` up to date for a request; most often the one before needs the same."""
    env = s.env[e]
    need = kv_need(s, e, request)
    if not env.allowed_above < need <= env.allowed_up_to:
        _allow_anew(s, e, need)


@helper
def _allow_anew(s: State, e: int, need: int) -> None:
    env = s.env[e]
    env.allowed_above = -math.inf
    env.allowed_up_to = math.inf
    env.num_allowed = 0
    for r in range(env.num_replicas):
        capacity = s.shown[e, VIEW_KV_CAPACITY, r]
        up = s.shown[e, VIEW_UP, r] > 0.0
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
    _allow(s, e, request)
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
    """Put a request at the end of a replica's queue."""
    now_s = s.env[e].now_s
    q = s.request[e, request]
    v = s.replica[e, r]
    q.status = QUEUED
    q.replica = r
    q.dispatch_s = now_s
    v.emitted += q.generated
    log_event(p, s, e, now_s, EV_DISPATCH, request, r, 0.0)
    hint = prefix_hit_tokens(p, s, e, r, request, now_s) if p.prefix_caching else 0
    q.hit_hint = hint
    s.shown[e, VIEW_OUTSTANDING, r] += 1
    s.shown[e, VIEW_OUTSTANDING_PROMPT, r] += q.prompt
    s.shown[e, VIEW_OUTSTANDING_PREDICTED, r] += q.predicted
    if math.isnan(q.first_token_s):
        s.shown[e, VIEW_PENDING_PREFILL, r] += q.prompt - hint
    v.last_dispatch_s = now_s
    tail = v.wait_tail
    q.next_request = -1
    if tail >= 0:
        s.request[e, tail].next_request = request
    else:
        v.wait_head = request
    v.wait_tail = request
    v.num_waiting += 1
    if p.retain_kv_s > 0.0:
        expect(p, s, e, r, request)
    wake(p, s, e, r, now_s)
