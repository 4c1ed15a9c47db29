"""How much of the random tests is played: enough for every change, all on demand."""

from __future__ import annotations

import os

#: Set to play all random cases, as before a release and after a change to a simulator.
SWITCH = "SERVEGYM_EXHAUSTIVE"


def blocks(count: int) -> range:
    """Return the blocks of seeds to play: the first third of so many, all if asked for."""
    return range(count if os.environ.get(SWITCH) else -(-count // 3))
