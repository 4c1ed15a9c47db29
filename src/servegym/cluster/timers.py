"""The timers of an environment: a binary heap of what happens at a time set before.

Equal times go by kind, then by order: of faults and requests that which was set first.
"""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import Records, State


@inlined
def _earlier(timer: Records, i: int, time_s: float, kind: int, order: int) -> bool:
    """Whether the timer at place `i` is due before one with these properties."""
    if timer[i].time_s != time_s:
        return timer[i].time_s < time_s
    if timer[i].kind != kind:
        return timer[i].kind < kind
    return timer[i].order < order


@inlined
def set_timer(s: State, e: int, time_s: float, kind: int, order: int, subject: int) -> None:
    """Let something happen at a time; the heap has a place for one timer a request and two more.

    Args:
        s: State.
        e: Environment.
        time_s: Seconds, not before now.
        kind: `FAULT`, `SCRAPE`, ...
        order: Among timers of this kind and time, the lowest is due first.
        subject: Fault or request it is about.
    """
    timer = s.timer[e]
    i = s.env[e].num_timers
    s.env[e].num_timers = i + 1
    while i > 0:
        up = (i - 1) >> 1
        if _earlier(timer, up, time_s, kind, order):
            break
        timer[i] = timer[up]
        i = up
    timer[i].time_s = time_s
    timer[i].kind = kind
    timer[i].order = order
    timer[i].subject = subject


@inlined
def set_turn(s: State, e: int, time_s: float, kind: int, request: int) -> None:
    """Let a request have its turn at a time; at equal times the one that was told so first."""
    env = s.env[e]
    set_timer(s, e, time_s, kind, env.num_set, request)
    env.num_set += 1


@inlined
def drop_first_timer(s: State, e: int) -> None:
    """Take the timer that is due first out of the heap."""
    timer = s.timer[e]
    size = s.env[e].num_timers - 1
    s.env[e].num_timers = size
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _earlier(
            timer, right, timer[child].time_s, timer[child].kind, timer[child].order
        ):
            child = right
        if _earlier(timer, size, timer[child].time_s, timer[child].kind, timer[child].order):
            break
        timer[i] = timer[child]
        i = child
    timer[i] = timer[size]
