"""Today's rule: everything is offloaded where there are tiers, and evicted by last use."""

from __future__ import annotations

from servegym.cluster.state import LEAVE, OFFLOAD
from servegym.policy.retention import RetentionRule, Turn


def lru() -> RetentionRule:
    """Keep nothing: blocks are evicted by last use, and offloaded where there are tiers."""

    def retain(turn: Turn) -> tuple[int, float]:
        return (OFFLOAD if turn.tiered else LEAVE), 0.0

    return RetentionRule("lru", "blind", retain, "vLLM's prefix cache, LMCache")
