"""The timers of an environment: a binary heap of what happens at a time set before.

Equal times go by kind, then by order: of faults and requests that which was set first. A request
knows the place of its timer, so that it can be removed.
"""

from __future__ import annotations

from servegym.cluster.jit import helper, inlined
from servegym.cluster.state import TICK, Records, State


@inlined
def _earlier(timer: Records, i: int, time_s: float, kind: int, order: int) -> bool:
    """Whether the timer at place `i` is due before one with these properties."""
    if timer[i].time_s != time_s:
        return timer[i].time_s < time_s
    if timer[i].kind != kind:
        return timer[i].kind < kind
    return timer[i].order < order


@inlined
def _note_place(s: State, e: int, i: int) -> None:
    """Let the request that the timer at place `i` is about know the place."""
    timer = s.timer[e]
    if timer[i].kind > TICK:
        s.request[e, timer[i].subject].timer_pos = i


@helper
def _sift(s: State, e: int, i: int) -> None:
    """Move the timer at place `i` to where it belongs."""
    timer = s.timer[e]
    size = s.env[e].num_timers
    time_s, kind = timer[i].time_s, timer[i].kind
    order, subject = timer[i].order, timer[i].subject
    while i > 0:
        up = (i - 1) >> 1
        if _earlier(timer, up, time_s, kind, order):
            break
        timer[i] = timer[up]
        _note_place(s, e, i)
        i = up
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _earlier(
            timer, right, timer[child].time_s, timer[child].kind, timer[child].order
        ):
            child = right
        if not _earlier(timer, child, time_s, kind, order):
            break
        timer[i] = timer[child]
        _note_place(s, e, i)
        i = child
    timer[i].time_s = time_s
    timer[i].kind = kind
    timer[i].order = order
    timer[i].subject = subject
    _note_place(s, e, i)


@inlined
def set_timer(s: State, e: int, time_s: float, kind: int, order: int, subject: int) -> None:
    """Let something happen at a time; `State.timer` says for how many timers there is room.

    Args:
        s: State.
        e: Environment.
        time_s: Seconds, not before now.
        kind: `FAULT`, `SCRAPE`, ...
        order: Among timers of this kind and time, the lowest is due first.
        subject: Fault, replica or request it is about; a request has no other timer.
    """
    timer = s.timer[e]
    i = s.env[e].num_timers
    s.env[e].num_timers = i + 1
    timer[i].time_s = time_s
    timer[i].kind = kind
    timer[i].order = order
    timer[i].subject = subject
    _sift(s, e, i)


@inlined
def set_turn(s: State, e: int, time_s: float, kind: int, subject: int) -> None:
    """Let a request or replica have its turn; at equal times the one that was told so first."""
    env = s.env[e]
    set_timer(s, e, time_s, kind, env.num_set, subject)
    env.num_set += 1


@helper
def remove_timer(s: State, e: int, i: int) -> None:
    """Take a timer out of the heap.

    Args:
        s: State.
        e: Environment.
        i: Its place: 0 of the one that is due first, `timer_pos` of a request's.
    """
    timer = s.timer[e]
    if timer[i].kind > TICK:
        s.request[e, timer[i].subject].timer_pos = -1
    last = s.env[e].num_timers - 1
    s.env[e].num_timers = last
    if i != last:
        timer[i] = timer[last]
        _sift(s, e, i)
