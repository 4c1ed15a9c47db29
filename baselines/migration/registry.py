"""All rules that say which requests move to another replica, by name; a new one is a line here.

A name here is no order's and no placement's, so that `DISPATCH+MIGRATION` is told by the name.
"""

from __future__ import annotations

from servegym.baselines.migration.freeness import freeness, freeness_longest, freeness_waiting
from servegym.baselines.migration.queued_only import queued_only
from servegym.baselines.migration.stay import stay
from servegym.baselines.rules import Entry, Range, Rules
from servegym.policy.migrating import MigrationRule

_RANGES = {
    "source_below": Range(0.5, 100.0, logarithmic=True),
    "target_above": Range(0.5, 100.0, logarithmic=True),
}
#: Below 0 a replica lacks blocks for the head of its queue.
_BOUNDS = dict.fromkeys(_RANGES, (-1e6, 1e6))

MIGRATIONS: Rules[MigrationRule] = Rules(
    "migration",
    {
        "stay": Entry(stay),
        "queued-only": Entry(queued_only, bounds={"gap": (1.0, 1e6)}),
        "freeness": Entry(freeness, _RANGES, _BOUNDS),
        "freeness-longest": Entry(freeness_longest, _RANGES, _BOUNDS),
        "freeness-waiting": Entry(freeness_waiting, _RANGES, _BOUNDS),
    },
)

#: Makes a migration rule from its name and parameters.
migration = MIGRATIONS.make
