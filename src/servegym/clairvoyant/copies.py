"""Copying an environment of a simulator onto another one of the same arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import helper
from servegym.cluster.state import Records, State
from servegym.typing import IntArray

#: Not copied: what is the same everywhere (texts), what is not recorded, and what `Words` has.
_LEFT_OUT = ("segment", "itl_count", "log", "steps", "request", "order", "timer")


class Words(NamedTuple):
    """The arrays of a state as plain numbers, which are copied fastest; axis: E environments."""

    request: IntArray  # [E, N * words of one]
    order: IntArray  # [E, N * words of one]
    timer: IntArray  # [E, (N + 2) * words of one]
    others: tuple[np.ndarray, ...]  # each uint8[E, bytes]


def words_of(state: State) -> Words:
    """See a state as plain numbers; nothing is copied.

    Args:
        state: Made without a record of events.
    """
    num_envs = len(state.env)

    def words(records: Records) -> IntArray:
        return records.view(np.int64).reshape(num_envs, -1)

    return Words(
        words(state.request),
        words(state.order),
        words(state.timer),
        tuple(
            array.reshape(num_envs, -1).view(np.uint8)
            for name, array in state._asdict().items()
            if name not in _LEFT_OUT
        ),
    )


@helper
def copy_env(s: State, words: Words, source: int, target: int, first: int) -> None:
    """Make one environment what another one is, all that comes with requests from `first` on.

    Args:
        s: The state.
        words: The same as numbers.
        source: Environment that is copied.
        target: Environment that is overwritten.
        first: No request before it is in the system, or comes into it.
    """
    size = s.request.shape[1]
    per_request = words.request.shape[1] // size
    for k in range(first * per_request, size * per_request):
        words.request[target, k] = words.request[source, k]
    per_order = words.order.shape[1] // size
    for k in range(first * per_order, size * per_order):
        words.order[target, k] = words.order[source, k]
    per_timer = words.timer.shape[1] // s.timer.shape[1]
    for k in range(s.env[source].num_timers * per_timer):
        words.timer[target, k] = words.timer[source, k]
    for array in words.others:
        for k in range(array.shape[1]):
            array[target, k] = array[source, k]
