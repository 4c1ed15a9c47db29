"""Two binary heaps: replicas by their next event, decoding requests by the step they end in."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import State


@inlined
def set_event(s: State, e: int, r: int, time_s: float) -> None:
    """Set when replica `r` is due next (inf: never); equal times go by replica index."""
    v = s.replica[e, r]
    due = s.due[e]
    size = s.env[e].num_replicas
    i = v.event_pos
    while i > 0:
        up = (i - 1) >> 1
        other = due[up].replica
        if due[up].time_s < time_s or (due[up].time_s == time_s and other < r):
            break
        due[i] = due[up]
        s.replica[e, other].event_pos = i
        i = up
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            due[right].time_s < due[child].time_s
            or (due[right].time_s == due[child].time_s and due[right].replica < due[child].replica)
        ):
            child = right
        other = due[child].replica
        if time_s < due[child].time_s or (time_s == due[child].time_s and r < other):
            break
        due[i] = due[child]
        s.replica[e, other].event_pos = i
        i = child
    due[i].replica = r
    due[i].time_s = time_s
    v.event_pos = i


@inlined
def push_end(s: State, e: int, r: int, request: int, key: int) -> None:
    """Add a decoding request that ends when its replica's step count reaches `key >> 32`."""
    v = s.replica[e, r]
    i = v.num_ends
    v.num_ends = i + 1
    _sift_end(s, e, r, i, request, key)


@inlined
def remove_end(s: State, e: int, r: int, request: int) -> None:
    """Take a request out of its replica's end heap."""
    v = s.replica[e, r]
    q = s.request[e, request]
    i = q.heap_pos
    q.heap_pos = -1
    last = v.num_ends - 1
    v.num_ends = last
    if i != last:
        _sift_end(s, e, r, i, s.ends[e, r, last].request, s.ends[e, r, last].key)


@inlined
def _sift_end(s: State, e: int, r: int, i: int, request: int, key: int) -> None:
    ends = s.ends[e, r]
    size = s.replica[e, r].num_ends
    while i > 0:
        up = (i - 1) >> 1
        if ends[up].key < key:
            break
        ends[i] = ends[up]
        s.request[e, ends[i].request].heap_pos = i
        i = up
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and ends[child + 1].key < ends[child].key:
            child += 1
        if key < ends[child].key:
            break
        ends[i] = ends[child]
        s.request[e, ends[i].request].heap_pos = i
        i = child
    ends[i].request = request
    ends[i].key = key
    s.request[e, request].heap_pos = i
