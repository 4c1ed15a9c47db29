"""One end of a transfer of KV where each engine is an environment of its own; see `live`.

Of the engine that decodes, replica 0, the environment has one more replica, which is down: it
stands for whichever one keeps the KV that comes next. Of the engine that prefills there is none:
what it keeps is released when it is told so.
"""

from __future__ import annotations

import math

from servegym.cluster.aborts import abort
from servegym.cluster.emission import leave_system
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.remote import leave_remote, look_again, release_at, release_source
from servegym.cluster.router import forget_outstanding
from servegym.cluster.state import (
    ABORTED,
    LANDED,
    LEASE,
    TRANSFERRING,
    Params,
    State,
)
from servegym.cluster.stretches import catch_up
from servegym.cluster.timers import remove_timer, set_turn
from servegym.cluster.transfers import go_off_transfer

#: The replica that stands for the other end.
OTHER_END = 1


@kernel
def fetch(p: Params, s: State, request: int) -> None:
    """Let the KV of a request come from elsewhere, which has just joined the end of the queue."""
    q, t = s.request[0, request], s.transfer[0, request]
    t.source = OTHER_END
    t.source_blocks = 0
    if p.prefix_caching:  # its row of the block table there, which is given back with the blocks
        v = s.replica[0, OTHER_END]
        v.num_free_slots -= 1
        t.source_slot = s.free_slots[0, OTHER_END, v.num_free_slots]
    s.link[0, OTHER_END].num_holding += 1
    q.hit_hint = q.prompt
    # whoever leads both ends watches over the lease
    set_turn(s, 0, math.inf, LEASE, request)


@kernel
def land_due(p: Params, s: State, now_s: float) -> None:
    """Let the KV arrive that is due; the event log says whose."""
    env = s.env[0]
    env.now_s = now_s
    env.log_len = 0
    env.step_len = 0
    while env.num_timers > 0 and s.timer[0, 0].time_s <= now_s:
        kind, subject = s.timer[0, 0].kind, s.timer[0, 0].subject
        remove_timer(s, 0, 0)
        go_off_transfer(p, s, 0, kind, subject)


@kernel
def next_landing_s(s: State) -> float:
    """When the next KV arrives, infinite if none is on its way."""
    return s.timer[0, 0].time_s if s.env[0].num_timers > 0 else math.inf


@kernel
def release_kept(p: Params, s: State, request: int, now_s: float) -> None:
    """Give back the blocks of a request that was prefilled here: its KV has been fetched."""
    q = s.request[0, request]
    s.env[0].now_s = now_s
    if q.timer_pos >= 0:
        remove_timer(s, 0, q.timer_pos)
    release_source(p, s, 0, request, now_s, now_s)
    q.status = ABORTED
    leave_system(s, 0, request, now_s)
    s.env[0].log_len = 0
    s.env[0].step_len = 0


@kernel
def withdraw(p: Params, s: State, request: int, now_s: float) -> None:
    """Take a request out of its engine whose KV was to come, wherever it is there."""
    q = s.request[0, request]
    if q.timer_pos >= 0:
        remove_timer(s, 0, q.timer_pos)
    if s.transfer[0, request].source >= 0:
        release_source(p, s, 0, request, now_s, now_s)
    if q.status == TRANSFERRING or q.status == LANDED:
        _leave_links(p, s, request, now_s)
    else:
        abort(p, s, 0, request, now_s)


@inlined
def _leave_links(p: Params, s: State, request: int, now_s: float) -> None:
    q, k = s.request[0, request], s.link[0, 0]
    k.num_landed -= q.status == LANDED
    leave_remote(s, 0, 0, request)
    s.replica[0, 0].emitted -= q.generated
    forget_outstanding(s, 0, 0, request)
    catch_up(p, s, 0, 0, now_s)
    release_at(p, s, 0, request, 0, q.seq_slot, q.table_len)
    q.status = ABORTED
    q.finish_s = now_s
    leave_system(s, 0, request, now_s)
    look_again(p, s, 0, 0, now_s, now_s)
