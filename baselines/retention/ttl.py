"""Every turn is kept for the same time."""

from __future__ import annotations

from servegym.cluster.state import KEEP
from servegym.policy.retention import RetentionRule, Turn


def ttl(seconds: float = 10.0) -> RetentionRule:
    """Keep the KV of every turn for the same time; what `retain_kv_s` does."""

    def retain(turn: Turn) -> tuple[int, float]:
        return KEEP, seconds

    return RetentionRule("ttl", "blind", retain, "pinned prefixes with a time to live")
