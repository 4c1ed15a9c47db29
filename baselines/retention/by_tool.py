"""Each turn is kept for the time that pays most, by the past gaps of its tool."""

from __future__ import annotations

import numpy as np

from servegym.cluster.state import KEEP, LEAVE, OFFLOAD
from servegym.policy.retention import RetentionRule, Turn
from servegym.policy.turn_scores import FIRST_GUESS_S, LEAST_GAPS


def by_tool(price: float = 0.3) -> RetentionRule:
    """Keep for the time that pays most: chance that it is back by then, against memory held.

    Keeping for a time costs `price` times the share of the memory times that; being back within it
    saves computing the text.
    """

    def retain(turn: Turn) -> tuple[int, float]:
        if len(turn.gaps_s) < LEAST_GAPS:
            return KEEP, FIRST_GUESS_S
        times_s = np.sort(turn.gaps_s)
        chance = np.arange(1, len(times_s) + 1) / len(times_s)
        # held until it is back, or for the whole time
        held_s = (np.cumsum(times_s) + times_s * np.arange(len(times_s))[::-1]) / len(times_s)
        worth = chance * turn.recompute_s - price * turn.kv_share * held_s
        best = int(np.argmax(worth))
        if worth[best] > 0.0:
            return KEEP, float(times_s[best])
        return (OFFLOAD if turn.tiered else LEAVE), 0.0

    return RetentionRule("by-tool", "predictive", retain, "after Continuum, arXiv 2511.02230")
