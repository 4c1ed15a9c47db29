"""Llumnix: from replicas with little free memory per request to those with much."""

from __future__ import annotations

from servegym.policy.migrating import MigrationRule

_LLUMNIX = "Llumnix (OSDI'24), pairs by freeness"


def freeness(source_below: float = 3.0, target_above: float = 3.0) -> MigrationRule:
    """Llumnix: the least free replica gives its shortest decoding request to the freest."""
    return _by_freeness("freeness", "shortest", source_below, target_above)


def freeness_longest(source_below: float = 3.0, target_above: float = 3.0) -> MigrationRule:
    """`freeness` that moves the longest decoding request."""
    return _by_freeness("freeness-longest", "longest", source_below, target_above)


def freeness_waiting(source_below: float = 3.0, target_above: float = 3.0) -> MigrationRule:
    """`freeness` that moves the first waiting request, or else the shortest decoding one."""
    return _by_freeness("freeness-waiting", "first-waiting-or-shortest", source_below, target_above)


def _by_freeness(name: str, victim: str, source_below: float, target_above: float) -> MigrationRule:
    settings = {
        "rule": "freeness",
        "victim": victim,
        "source_below": source_below,
        "target_above": target_above,
    }
    return MigrationRule(name, settings, _LLUMNIX)
