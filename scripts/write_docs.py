#!/usr/bin/env python3
"""Write the generated pages: docs/observation.md and docs/policies.md. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from servegym.baselines.registry import describe, names, policy
from servegym.envs.observation import column_table
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    SCHEMA_VERSION,
)

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Written by scripts/write_docs.py; do not edit. -->\n"


def observation_page() -> str:
    """Describe the observation contract."""
    return f"""{NOTE}
# The observation

What a policy sees of a replica and of the request, schema version {SCHEMA_VERSION}. The same
rows are filled by the simulator and by a live adapter. Values are raw, in the units given; a
learned policy carries its own normalisation. A policy sees what a router can know: true output
lengths and future arrivals are not in it. An *oracle* gets the true output length in place of the
predicted one.

## Per replica
{column_table(REPLICA_FEATURES[:NUM_OBSERVED_FEATURES], "Feature")}

## Per request
{column_table(REQUEST_FEATURES, "Feature")}

## For planners only
Filled when a policy asks for them, by simulating each choice forward; not in the environment's
observation.

{column_table(REPLICA_FEATURES[NUM_OBSERVED_FEATURES:], "Feature")}

## Information classes
| class | may use |
|---|---|
| `blind` | counters the router keeps itself: what was dispatched where and has not ended |
| `metric` | also engine metrics (as old as `metrics_age_s`), the prefix index and known speeds |
| `predictive` | also predicted output lengths |
| `oracle` | the true output lengths: a bound, no rival |
"""


def policies_page() -> str:
    """List the dispatch rules."""
    rows = [
        f"| `{name}` | {policy(name).information} | {describe(name)[0] or '-'} | "
        f"{describe(name)[1]} | {describe(name)[2] or '-'} |"
        for name in names()
    ]
    table = "\n".join(
        ["| policy | knows | parameters | rule | source |", "|---|---|---|---|---|", *rows]
    )
    return f"""{NOTE}
# Dispatch policies

Parameters are given after a colon: `--policies prefix-load:weight=0.01,eta=0.5 llm-d:kv=1`.
`servegym tune` searches them on training seeds. Each rule is one file in `baselines/`.

{table}

An exported policy is named by its file: `--policies runs/ppo-mixed-chat/policy/policy.onnx`.
"""


def main() -> None:
    """Write or compare."""
    stale = []
    for name, text in (("observation.md", observation_page()), ("policies.md", policies_page())):
        path = DOCS / name
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run scripts/write_docs.py")


if __name__ == "__main__":
    main()
