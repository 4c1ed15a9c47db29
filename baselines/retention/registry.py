"""All rules for the KV of ended turns by name; a new one is a line here.

A name here is no order's and no placement's, so that `DISPATCH+RETENTION` is told apart by it.
"""

from __future__ import annotations

from servegym.baselines.retention.belady import belady
from servegym.baselines.retention.by_tool import by_tool
from servegym.baselines.retention.lognormal import lognormal
from servegym.baselines.retention.lru import lru
from servegym.baselines.retention.offload_within import offload_within
from servegym.baselines.retention.ttl import ttl
from servegym.baselines.rules import Entry, Range, Rules
from servegym.policy.retention import RetentionRule

RETENTIONS: Rules[RetentionRule] = Rules(
    "retention",
    {
        "lru": Entry(lru),
        "ttl": Entry(ttl, {"seconds": Range(0.5, 600.0, logarithmic=True)}),
        "lognormal": Entry(
            lognormal,
            {"quantile": Range(0.3, 0.99), "most": Range(1.0, 600.0, logarithmic=True)},
            bounds={"quantile": (0.0, 1.0)},
        ),
        "offload-within": Entry(offload_within, {"seconds": Range(0.1, 1000.0, logarithmic=True)}),
        "by-tool": Entry(by_tool, {"price": Range(0.01, 30.0, logarithmic=True)}),
        "belady": Entry(belady),
    },
)

#: Makes a retention rule from its name and parameters.
retention = RETENTIONS.make
