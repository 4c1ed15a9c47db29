"""Nobody moves."""

from __future__ import annotations

from servegym.policy.migrating import MigrationRule


def stay() -> MigrationRule:
    """Requests stay where they were dispatched to."""
    return MigrationRule("stay", {"rule": "none"})
