"""Asynchronous scheduling: who ended with a step is there until the next one is formed."""

from __future__ import annotations

from servegym.cluster.blocks import release
from servegym.cluster.jit import helper, inlined
from servegym.cluster.running import stop_decoding, unlink_running
from servegym.cluster.state import FINISHED, Params, State
from servegym.cluster.turns import end_turn


@inlined
def linger(p: Params, s: State, e: int, r: int, request: int) -> None:
    """A request has ended: it gets no more tokens, but keeps its place and its blocks."""
    s.request[e, request].chunk = stop_decoding(p, s, e, r, request)
    s.replica[e, r].num_lingering += 1


@helper
def let_go(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """One that has ended leaves, with its blocks."""
    q = s.request[e, request]
    release(p, s, e, r, request, q.computed, q.chunk)
    unlink_running(s, e, r, request)
    s.replica[e, r].num_lingering -= 1
    if p.retains:
        end_turn(p, s, e, r, request, now_s)


@helper
def let_all_ended_go(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """All that have ended leave, in running order."""
    v = s.replica[e, r]
    request = v.run_head
    while v.num_lingering > 0:
        following = s.request[e, request].next_request
        if s.request[e, request].status == FINISHED:
            let_go(p, s, e, r, request, now_s)
        request = following
