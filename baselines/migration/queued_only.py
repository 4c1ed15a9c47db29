"""Only requests that wait move: there is no KV to copy."""

from __future__ import annotations

from servegym.policy.migrating import MigrationRule


def queued_only(gap: float = 2.0) -> MigrationRule:
    """Only waiting requests move: from the longest queue to the least busy replica."""
    settings = {"rule": "queues", "queue_gap": int(gap)}
    return MigrationRule(
        "queued-only", settings, "as proposed for SGLang: queued, unprefilled requests"
    )
