#!/usr/bin/env python3
"""Draw docs/replicas.png: `scripts/draw_readme.py SCENARIO POLICY [POLICY ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from servegym.evaluate.harness import evaluate
from servegym.export.resolve import resolve_policy
from servegym.problems.request_figures import draw_replicas
from servegym.scenario import load_scenario


def main() -> None:
    """Play the first held-out episode at load 1 and draw a few seconds of it."""
    scenario, *texts = sys.argv[1:]
    policies = [resolve_policy(text) for text in texts]
    result = evaluate(load_scenario(scenario), policies, loads=(1.0,), num_seeds=1)
    names = [p.name for p in policies]
    figure = draw_replicas(result, 1.0, names)
    for axis, name in zip(figure.axes, names, strict=True):
        axis.set_title(f"{name}: mean E2E {result.mean(name, 1.0, 'e2e_mean_s'):.1f} s")
    figure.savefig(Path(__file__).resolve().parent.parent / "docs" / "replicas.png", dpi=80)


if __name__ == "__main__":
    main()
