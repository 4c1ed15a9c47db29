"""Turns that have ended and whose KV blocks are kept for the next turn: docs/simulator.md.

A retained turn keeps, of the full blocks of its text, those that a hit would find. As long as it
keeps them nobody takes them, so its identities lead to them again: they need no list. The retained
turns of a replica are linked in the order in which they let go when a request needs their blocks:
first those whose time runs, by its end, then those whose next turn waits, the latest first.
"""

from __future__ import annotations

from numba import types

from servegym.cluster.entry import LET_GO, entry
from servegym.cluster.identities import identity_of, segment_before, segment_of
from servegym.cluster.jit import helper, inlined
from servegym.cluster.pool import find_block, set_free, unlink
from servegym.cluster.state import EXPIRY, RETAINING, Params, State
from servegym.cluster.tiers import store_text
from servegym.cluster.timers import remove_timer, set_turn


@helper
def retain(p: Params, s: State, e: int, r: int, request: int, until_s: float, kind: int) -> None:
    """Keep what a turn that has just released its blocks has in the cache, for the next one.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        request: The turn.
        until_s: Until when, unless its next turn waits by then.
        kind: Of the timer that goes off then: `EXPIRY`, or `RETAINING` if it is to be decided.
    """
    q = s.request[e, request]
    v = s.replica[e, r]
    kept = q.computed // p.block_size
    if kept == 0:
        return
    q.table_len = kept
    blocks, prefix_cache = s.block[e, r], s.prefix_cache[e, r]
    seg = q.segment_first
    for j in range(kept):
        seg = segment_of(p, s, e, request, j, seg)
        block = find_block(prefix_cache, blocks, identity_of(s, e, request, j, seg))
        if blocks[block].holders == 0 and blocks[block].keepers == 0:
            unlink(blocks, block)
            v.kept_blocks += 1
        blocks[block].keepers += 1
    _expire_at(s, e, r, request, until_s, kind)


@inlined
def _expire_at(s: State, e: int, r: int, request: int, until_s: float, kind: int) -> None:
    """Let the time of a turn run, which is in no list."""
    v = s.replica[e, r]
    before = v.last_expiring
    while before >= 0 and s.timer[e, s.request[e, before].timer_pos].time_s > until_s:
        before = s.request[e, before].prev_request
    _link_behind(s, e, r, request, before)
    if before == v.last_expiring:
        v.last_expiring = request
    set_turn(s, e, until_s, kind, request)


@inlined
def keep_until(s: State, e: int, r: int, request: int, until_s: float) -> None:
    """Let a retained turn whose timer has gone off keep its blocks until a time."""
    _leave(s, e, r, request)
    _expire_at(s, e, r, request, until_s, EXPIRY)


@entry(LET_GO, types.void, types.int64, types.int64, types.int64)
def let_go(p: Params, s: State, e: int, r: int, request: int) -> None:
    """Give back what a retained turn keeps, its last block first."""
    q = s.request[e, request]
    v = s.replica[e, r]
    if q.timer_pos >= 0:
        remove_timer(s, e, q.timer_pos)
    _leave(s, e, r, request)
    blocks, prefix_cache = s.block[e, r], s.prefix_cache[e, r]
    seg = q.segment_stop
    for j in range(q.table_len - 1, -1, -1):
        seg = segment_before(p, s, e, request, j, seg)
        block = find_block(prefix_cache, blocks, identity_of(s, e, request, j, seg))
        blocks[block].keepers -= 1
        if blocks[block].holders == 0 and blocks[block].keepers == 0:
            set_free(blocks, block)
            v.kept_blocks -= 1
    q.table_len = 0


@helper
def let_all_go(p: Params, s: State, e: int, r: int) -> None:
    """Give back what all retained turns of a replica keep."""
    while s.replica[e, r].first_retained >= 0:
        let_go(p, s, e, r, s.replica[e, r].first_retained)


@inlined
def make_room(p: Params, s: State, e: int, r: int, count: int) -> None:
    """See to it that so many free blocks can be taken: retained turns let go if they must."""
    v = s.replica[e, r]
    if v.free_blocks - v.kept_blocks < count:
        _give_way(p, s, e, r, count)


@helper
def _give_way(p: Params, s: State, e: int, r: int, count: int) -> None:
    v = s.replica[e, r]
    while v.free_blocks - v.kept_blocks < count:
        turn = v.first_retained
        place = s.request[e, turn].timer_pos
        if p.tiered and place >= 0 and s.timer[e, place].kind == RETAINING:
            store_text(p, s, e, r, turn, s.env[e].now_s)
        let_go(p, s, e, r, turn)


@helper
def expect(p: Params, s: State, e: int, r: int, request: int) -> None:
    """A request waits at a replica: the turn it follows, if retained there, stays until it runs."""
    turn = s.request[e, request].after
    if is_retained(s, e, r, turn) and s.request[e, turn].timer_pos >= 0:
        remove_timer(s, e, s.request[e, turn].timer_pos)
        _leave(s, e, r, turn)
        _link_behind(s, e, r, turn, s.replica[e, r].last_expiring)


@inlined
def is_retained(s: State, e: int, r: int, request: int) -> bool:
    """Whether an ended request, or -1 for none, keeps blocks of this replica."""
    return (
        request >= 0 and s.request[e, request].table_len > 0 and s.request[e, request].replica == r
    )


@inlined
def _link_behind(s: State, e: int, r: int, request: int, before: int) -> None:
    """Link a retained turn in behind another one, -1: before all."""
    v = s.replica[e, r]
    q = s.request[e, request]
    after = s.request[e, before].next_request if before >= 0 else v.first_retained
    q.prev_request = before
    q.next_request = after
    if before >= 0:
        s.request[e, before].next_request = request
    else:
        v.first_retained = request
    if after >= 0:
        s.request[e, after].prev_request = request


@inlined
def _leave(s: State, e: int, r: int, request: int) -> None:
    """Take a retained turn out of the list."""
    v = s.replica[e, r]
    q = s.request[e, request]
    before, after = q.prev_request, q.next_request
    if before >= 0:
        s.request[e, before].next_request = after
    else:
        v.first_retained = after
    if after >= 0:
        s.request[e, after].prev_request = before
    if v.last_expiring == request:
        v.last_expiring = before
    q.next_request = -1
    q.prev_request = -1
