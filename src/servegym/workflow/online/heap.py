"""A binary heap in an array of entries: by key, then by order of entering."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.workflow.online.state import Records


@inlined
def goes_first(heap: Records, i: int, key: float, order: int) -> bool:
    """Whether entry `i` goes before an entry of this key and order."""
    return heap[i].key < key or (heap[i].key == key and heap[i].order < order)


@inlined
def push(heap: Records, size: int, key: float, order: int, stage: int) -> None:
    """Add an entry to a heap of `size` entries."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if goes_first(heap, up, key, order):
            break
        heap[i] = heap[up]
        i = up
    heap[i].key = key
    heap[i].order = order
    heap[i].stage = stage


@inlined
def drop_first(heap: Records, size: int) -> None:
    """Take the first entry off a heap of `size` entries."""
    last = size - 1
    key, order, stage = heap[last].key, heap[last].order, heap[last].stage
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            break
        if child + 1 < last and goes_first(heap, child + 1, heap[child].key, heap[child].order):
            child += 1
        if not goes_first(heap, child, key, order):
            break
        heap[i] = heap[child]
        i = child
    heap[i].key = key
    heap[i].order = order
    heap[i].stage = stage
