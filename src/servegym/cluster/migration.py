"""Requests that move to another replica while they wait or decode: docs/migration.md.

A request that waits has no KV: it goes from one queue to another at once. One that decodes keeps
its place in the running list while its blocks are copied in stages, each with memory set aside at
the other end first (`target` of `State.transfer`). When few are left it leaves the list at the end
of a step and is in the remote list of where it goes until the last have landed (`source` has its
blocks). A replica has one such migration under way from it at a time, in `State.move`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.blocks import hold_matched, match, settle_blocks
from servegym.cluster.entry import (
    GO_OFF_MIGRATION,
    LEAVE,
    MIGRATE_REQUEST,
    STOP_MIGRATIONS,
    entry,
)
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.pairing import (
    NO_MOVE,
    choose_move,
    may_anybody_move,
    steps_since,
)
from servegym.cluster.pool import set_free
from servegym.cluster.remote import (
    are_enough,
    book,
    book_landed,
    join_remote,
    land,
    leave_remote,
    look_again,
    release_at,
    release_source,
    take_ahead,
)
from servegym.cluster.retention import is_retained, let_go
from servegym.cluster.router import (
    count_outstanding,
    count_prefill,
    enqueue,
    forget_outstanding,
    forget_prefill,
    prefix_hit_tokens,
    take_back,
)
from servegym.cluster.running import leave_waiting, stop_decoding, unlink_running
from servegym.cluster.state import (
    ALWAYS,
    COPIED,
    EV_MIGRATE,
    EV_PAUSE,
    EV_STAY,
    EV_TRANSFER,
    LANDED,
    MIGRATE,
    NEVER,
    QUEUED,
    RUNNING,
    TICK,
    Params,
    State,
)
from servegym.cluster.stretches import catch_up, cut_stretch
from servegym.cluster.timers import remove_timer, set_timer, set_turn


@entry(GO_OFF_MIGRATION, types.void, types.int64, types.int64, types.int64)
def go_off_migration(p: Params, s: State, e: int, kind: int, r: int) -> None:
    """Do what a timer was set for: what was copied from a replica has come, or a tick."""
    now_s = s.env[e].now_s
    if kind == COPIED:
        _copied(p, s, e, r, now_s)
        return
    set_timer(s, e, now_s + p.migration.interval_s, TICK, 0, 0)
    for a in range(s.env[e].num_replicas):
        m = s.move[e, a]
        m.lately = m.preempted
        m.preempted = 0
        m.paired = 0
    _go_on(p, s, e)


@helper
def _go_on(p: Params, s: State, e: int) -> None:
    """Let others move at this tick: ask, or decide in place."""
    if p.asks.migrate != NEVER:
        if may_anybody_move(p, s, e, p.asks.migrate != ALWAYS):
            s.env[e].decision = MIGRATE
        return
    while True:
        answer = choose_move(p, s, e)
        if answer == NO_MOVE:
            return
        _move(p, s, e, answer)


@entry(MIGRATE_REQUEST, types.void, types.int64, types.int64)
def migrate(p: Params, s: State, e: int, answer: int) -> None:
    """Let a request move, then ask who else does; see `kernels.apply`."""
    _move(p, s, e, answer)
    _go_on(p, s, e)


@helper
def _move(p: Params, s: State, e: int, answer: int) -> None:
    """Begin a migration, or let a waiting request change queues."""
    width = s.replica.shape[1]
    request, target = answer // width, answer % width
    q = s.request[e, request]
    source = q.replica
    now_s = s.env[e].now_s
    m = s.move[e, source]
    m.paired = 1
    if q.status == QUEUED:
        _change_queues(p, s, e, request, target, now_s)
        return
    m.request = request
    m.target = target
    m.stage = 0
    m.moved = 0
    m.copying = -1
    m.alive = 1
    m.leaving = 0
    m.pause_s = math.nan
    _next_stage(p, s, e, source, now_s)


@inlined
def _change_queues(p: Params, s: State, e: int, request: int, target: int, now_s: float) -> None:
    """Let a waiting request go to the end of another queue."""
    q = s.request[e, request]
    source = q.replica
    leave_waiting(s, e, source, request)
    s.replica[e, source].emitted -= q.generated
    forget_prefill(s, e, source, request)
    forget_outstanding(s, e, source, request)
    if p.retains and is_retained(s, e, source, q.after):
        catch_up(p, s, e, source, now_s)
        let_go(p, s, e, source, q.after)
    log_event(p, s, e, now_s, EV_MIGRATE, request, target, 0.0)
    s.transfer[e, request].num_migrations += 1
    look_again(p, s, e, source, now_s, now_s)
    q.replica = target
    q.hit_hint = prefix_hit_tokens(p, s, e, target, request, now_s) if p.prefix_caching else 0
    count_outstanding(s, e, target, request)
    count_prefill(s, e, target, request)
    enqueue(p, s, e, target, request)


@helper
def _next_stage(p: Params, s: State, e: int, a: int, now_s: float) -> None:
    """Set memory aside for what there is of the request that moves from `a`, and copy it.

    With few blocks left it is to leave when the step in progress ends; see `leave`.
    """
    m, size = s.move[e, a], p.block_size
    request, b = m.request, m.target
    q, t, w = s.request[e, request], s.transfer[e, request], s.replica[e, b]
    computed = q.computed + s.replica[e, a].iteration + steps_since(p, s, e, a, now_s) - q.join_iter
    last = (computed + size - 1) // size - m.moved <= p.migration.last_stage_blocks
    if not last and m.stage == p.migration.max_stages:
        _give_up(p, s, e, a, now_s, now_s)
        return
    full = computed // size
    # of a last stage the text as it will be: two tokens more, one of them not computed
    blocks = (computed + 1 + size) // size if last else full
    catch_up(p, s, e, b, now_s)
    if m.stage == 0 and not _hold_hits(
        p, s, e, request, b, (computed + 1) // size if last else full, blocks
    ):
        _give_up(p, s, e, a, now_s, now_s)
        return
    if m.stage == 0:
        m.moved = t.hits
    if blocks - t.target_blocks > w.free_blocks:
        _give_up(p, s, e, a, now_s, now_s)
        return
    take_ahead(p, s, e, b, t.target_slot, t.target_blocks, blocks)
    t.target_blocks = blocks
    cut_stretch(p, s, e, b, now_s)  # its free blocks last for fewer steps
    m.stage += 1
    if last:
        m.leaving = 1
        cut_stretch(p, s, e, a, now_s)
        return
    _copy(p, s, e, a, full - m.moved, now_s)


@inlined
def _hold_hits(p: Params, s: State, e: int, request: int, b: int, most: int, blocks: int) -> bool:
    """Let a request hold what it finds in the cache of where it goes, if it can come there.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        request: The one that decodes elsewhere.
        b: Replica it goes to.
        most: Blocks that it may find.
        blocks: Blocks that it will hold there; if they are not free, it holds nothing.
    """
    q, t, w = s.request[e, request], s.transfer[e, request], s.replica[e, b]
    if are_enough(p, s, e, b):
        return False
    hits, unheld = 0, 0
    if p.prefix_caching:
        hits, unheld = match(p, s, e, b, request, most)
    if blocks - hits + unheld > w.free_blocks:
        return False
    own_slot, own_blocks = q.seq_slot, q.table_len
    hold_matched(p, s, e, b, request, hits)
    t.target_slot = q.seq_slot
    q.seq_slot = own_slot
    q.table_len = own_blocks
    if p.retains and is_retained(s, e, b, q.after):
        let_go(p, s, e, b, q.after)
    t.target = b
    t.target_blocks = hits
    t.hits = hits
    s.link[e, b].num_holding += 1
    return True


@inlined
def _copy(p: Params, s: State, e: int, a: int, blocks: int, now_s: float) -> None:
    """Copy blocks of the request that moves from replica `a`."""
    m = s.move[e, a]
    request = m.request
    m.copying = blocks
    landing_s = book(p, s, e, request, a, m.target, blocks, now_s)
    log_event(p, s, e, now_s, EV_TRANSFER, request, m.target, s.transfer[e, request].num_bytes)
    set_turn(s, e, landing_s, COPIED, a)


@entry(LEAVE, types.void, types.int64, types.int64, types.float64)
def leave(p: Params, s: State, e: int, a: int, now_s: float) -> None:
    """Before a step is formed: the request that is to leave does, its blocks stay until copied."""
    m = s.move[e, a]
    request, b = m.request, m.target
    q, t = s.request[e, request], s.transfer[e, request]
    m.leaving = 0
    if q.status != RUNNING:
        # what is set aside elsewhere is given back when all engines have had their turns
        set_turn(s, e, now_s, COPIED, a)
        return
    if s.replica[e, a].stalled == 0:
        q.last_token_s = now_s
    joined = stop_decoding(p, s, e, a, request)
    held = settle_blocks(p, s, e, a, request, q.computed, joined)
    unlink_running(s, e, a, request)
    s.replica[e, a].emitted -= q.generated
    forget_outstanding(s, e, a, request)
    t.source = a
    t.source_slot = q.seq_slot
    t.source_blocks = held
    s.link[e, a].num_holding += 1
    q.seq_slot = t.target_slot
    q.table_len = t.target_blocks
    t.target = -1
    join_remote(s, e, b, request)
    count_outstanding(s, e, b, request)
    m.pause_s = now_s
    log_event(p, s, e, now_s, EV_PAUSE, request, a, 0.0)
    _copy(p, s, e, a, held - m.moved, now_s)


@inlined
def _copied(p: Params, s: State, e: int, a: int, now_s: float) -> None:
    """What was on its way from replica `a` has come: go on, or see that there is no need to."""
    m = s.move[e, a]
    request = m.request
    q, t = s.request[e, request], s.transfer[e, request]
    if m.copying >= 0:
        book_landed(p, s, e, request, a, m.target)
        m.moved += m.copying
        m.copying = -1
    if not math.isnan(m.pause_s):
        m.request = -1
        paused_s = now_s - m.pause_s
        t.num_migrations += 1
        t.paused_s += paused_s
        log_event(p, s, e, now_s, EV_MIGRATE, request, m.target, paused_s)
        _give_spare_back(p, s, e, request, now_s)
        land(p, s, e, request, now_s)
    elif m.alive == 0 or q.status != RUNNING:
        _give_up(p, s, e, a, now_s, now_s)
    else:
        _next_stage(p, s, e, a, now_s)


@inlined
def _give_spare_back(p: Params, s: State, e: int, request: int, now_s: float) -> None:
    """Give back the block for a token that a request did not compute before it left.

    Its engine left it out of the last step, as `vllm-priority` may.
    """
    q = s.request[e, request]
    b, last = q.replica, q.table_len - 1
    if last * p.block_size < q.prompt + q.generated:
        return
    catch_up(p, s, e, b, now_s)
    q.table_len = last
    s.replica[e, b].free_blocks += 1
    if p.prefix_caching:
        block = s.table[e, b, q.seq_slot, last]
        s.block[e, b, block].holders = 0
        set_free(s.block[e, b], block)


@helper
def _give_up(p: Params, s: State, e: int, a: int, now_s: float, ended_by_s: float) -> None:
    """End the migration from `a` of a request that decodes; free what is set aside for it.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        a: Replica.
        now_s: Time, seconds.
        ended_by_s: Steps that end later are still in progress.
    """
    m = s.move[e, a]
    request = m.request
    t = s.transfer[e, request]
    _stay(p, s, e, a, 0.0)
    b = t.target
    if b >= 0:
        t.target = -1
        catch_up(p, s, e, b, ended_by_s)
        release_at(p, s, e, request, b, t.target_slot, t.target_blocks)
        look_again(p, s, e, b, now_s, ended_by_s)


@inlined
def _stay(p: Params, s: State, e: int, a: int, paused_s: float) -> None:
    """Note that the migration from replica `a` is given up."""
    m = s.move[e, a]
    t = s.transfer[e, m.request]
    t.num_stays += 1
    t.paused_s += paused_s
    log_event(p, s, e, s.env[e].now_s, EV_STAY, m.request, m.target, paused_s)
    m.request = -1
    m.leaving = 0


@inlined
def note_preempted(s: State, e: int, r: int, request: int) -> None:
    """A replica has preempted a request: it is short of memory, and that one moves no more."""
    m = s.move[e, r]
    m.preempted = 1
    if m.request == request:
        m.alive = 0


@entry(STOP_MIGRATIONS, types.void, types.int64, types.int64, types.float64)
def stop_migrations(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """A replica fails: who moves to it stays, who moves from it is lost with it.

    Its own blocks and links, its queue and its lists are cleared by whoever calls.
    """
    ended_by_s = np.nextafter(now_s, -math.inf)  # faults come before the steps that end now
    for a in range(s.env[e].num_replicas):
        m = s.move[e, a]
        request, b = m.request, m.target
        if request < 0 or (a != r and b != r):
            continue
        _remove_copied(s, e, a)
        q, t = s.request[e, request], s.transfer[e, request]
        if math.isnan(m.pause_s):
            if b == r:
                t.target = -1
            _give_up(p, s, e, a, now_s, ended_by_s)
            continue
        _stay(p, s, e, a, now_s - m.pause_s)
        leave_remote(s, e, b, request)
        s.replica[e, b].emitted -= q.generated
        forget_outstanding(s, e, b, request)
        if a == r:
            t.source = -1
            catch_up(p, s, e, b, ended_by_s)
            release_at(p, s, e, request, b, q.seq_slot, q.table_len)
            look_again(p, s, e, b, now_s, ended_by_s)
        elif _go_on_at_source(p, s, e, a, request, now_s, ended_by_s):
            continue
        take_back(p, s, e, r, request, now_s)
    request = s.link[e, r].first_remote
    while request >= 0:
        following = s.request[e, request].next_request
        forget_outstanding(s, e, r, request)
        take_back(p, s, e, r, request, now_s)
        request = following


@inlined
def _remove_copied(s: State, e: int, a: int) -> None:
    """Remove the timer of the migration from replica `a`, if it has one."""
    for i in range(s.env[e].num_timers):
        if s.timer[e, i].kind == COPIED and s.timer[e, i].subject == a:
            remove_timer(s, e, i)
            return


@inlined
def _go_on_at_source(
    p: Params, s: State, e: int, a: int, request: int, now_s: float, ended_by_s: float
) -> bool:
    """Let a paused request decode again where its KV is, if its next token has a block there."""
    q, t = s.request[e, request], s.transfer[e, request]
    blocks = (q.prompt + q.generated + p.block_size - 1) // p.block_size
    catch_up(p, s, e, a, ended_by_s)
    if blocks - t.source_blocks > s.replica[e, a].free_blocks:
        release_source(p, s, e, request, now_s, ended_by_s)
        return False
    take_ahead(p, s, e, a, t.source_slot, t.source_blocks, blocks)
    cut_stretch(p, s, e, a, ended_by_s)
    q.seq_slot = t.source_slot
    q.table_len = blocks
    t.source = -1
    t.hits = q.computed // p.block_size  # these have their identities
    join_remote(s, e, a, request)
    q.status = LANDED
    s.link[e, a].num_landed += 1
    count_outstanding(s, e, a, request)
    look_again(p, s, e, a, now_s, ended_by_s)
    return True


@inlined
def reset_moves(s: State, e: int) -> None:
    """Let nothing move."""
    for a in range(s.env[e].num_replicas):
        m = s.move[e, a]
        m.request = -1
        m.leaving = 0
        m.preempted = 0
        m.lately = 0
        m.paired = 0
