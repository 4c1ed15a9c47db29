"""Only turns that are likely back soon are written to the tiers."""

from __future__ import annotations

import math

from servegym.cluster.state import LEAVE, OFFLOAD
from servegym.policy.retention import RetentionRule, Turn
from servegym.policy.turn_scores import gap_logs


def offload_within(seconds: float = 60.0) -> RetentionRule:
    """Offload turns that such ones were back within, by the geometric mean; leave the others.

    What is written slows the steps that run meanwhile, and where tiers are small it drives out what
    would be needed sooner. With 0 nothing is written, with 1e9 all is, as by `lru`.
    """

    def retain(turn: Turn) -> tuple[int, float]:
        soon = gap_logs(turn.gaps_s)[0] < math.log(max(seconds, 1e-9))
        return (OFFLOAD if turn.tiered and soon else LEAVE), 0.0

    return RetentionRule("offload-within", "predictive", retain)
