"""Requests that leave before their end: their clients went away."""

from __future__ import annotations

from servegym.cluster.blocks import give_back_from_decodes
from servegym.cluster.emission import leave_system
from servegym.cluster.heap import set_event
from servegym.cluster.jit import helper, inlined, kernel
from servegym.cluster.router import forget_outstanding, forget_prefill
from servegym.cluster.running import block_residue, leave_running, leave_waiting
from servegym.cluster.state import (
    ABORTED,
    DECODE,
    QUEUED,
    RUNNING,
    STEP,
    Params,
    State,
)
from servegym.cluster.steptime import decode_span_s
from servegym.cluster.stretches import catch_up


@kernel
def abort(p: Params, s: State, e: int, request: int, now_s: float) -> None:
    """Take a request out of its engine, wherever it is there; its blocks are free at once.

    The step in progress lasts as long as it would have. A request that no engine has, or that has
    ended, stays what it is.

    Args:
        p: Constants.
        s: State; no decision is due.
        e: Environment.
        request: The one that leaves.
        now_s: Time, seconds; not after the replica's next event.
    """
    q = s.request[e, request]
    r = q.replica
    if q.status != QUEUED and q.status != RUNNING:
        return
    _stop_stretch(p, s, e, r, now_s)
    if q.status == QUEUED:
        leave_waiting(s, e, r, request)
    else:
        _leave_step(p, s, e, r, request)
    q.status = ABORTED
    q.finish_s = now_s
    s.replica[e, r].emitted -= q.generated
    forget_prefill(s, e, r, request)
    forget_outstanding(s, e, r, request)
    leave_system(s, e, request, now_s)


@inlined
def _stop_stretch(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Let the stretch in progress end with the step in progress.

    The next one has another batch, or the queue another head that may fit.
    """
    v = s.replica[e, r]
    catch_up(p, s, e, r, now_s)
    if v.mode == DECODE and v.stretch_steps > 1:
        v.stretch_steps = 1
        batch = v.num_decodes
        span = decode_span_s(p, v.type_idx, batch, v.kv_tokens + batch, 1)
        set_event(s, e, r, v.stretch_begin_s + v.stretch_factor * span)


@inlined
def _leave_step(p: Params, s: State, e: int, r: int, request: int) -> None:
    """Take a request off the running list, and out of the step in progress."""
    v = s.replica[e, r]
    q = s.request[e, request]
    left_out = _leave_skipped(s, e, r, request)
    if (
        q.join_iter >= 0
        and not left_out
        and (v.mode == DECODE or v.mode == STEP)
        and block_residue(p, q.computed, q.join_iter) == v.iteration % p.block_size
    ):
        give_back_from_decodes(p, s, e, r)
    leave_running(p, s, e, r, request)
    v.batch_full = 0  # SGLang tries prefills again when a request has left


@helper
def _leave_skipped(s: State, e: int, r: int, request: int) -> bool:
    """Take a request out of those that the step in progress leaves out; return if it was there."""
    f = s.forming[e, r]
    following = s.request[e, request].next_request
    other = f.skipped_from
    for _ in range(f.num_skipped):
        if other == request:
            f.num_skipped -= 1
            if f.skipped_from == request:
                f.skipped_from = following
            return True
        other = s.request[e, other].next_request
    if f.skipped_from == request:
        f.skipped_from = following
    return False
