"""What the compiled steps of several environments share."""

from __future__ import annotations

from servegym.cluster.jit import kernel
from servegym.cluster.state import State
from servegym.typing import BoolArray, Int8Array, IntArray


@kernel
def first_invalid(mask: Int8Array, actions: IntArray, active: BoolArray) -> int:
    """Return the first active environment whose action is not allowed, or -1."""
    for e in range(actions.shape[0]):
        if active[e]:
            if not 0 <= actions[e] < mask.shape[1] or mask[e, actions[e]] == 0:
                return e
    return -1


@kernel
def waited(s: State, e: int) -> float:
    """Integral of the requests in the system up to now, request-seconds."""
    env = s.env[e]
    return env.area + env.in_system * (env.now_s - env.area_until_s)
