"""Held-out episodes under what cross-entropy searches have found, in compiled code.

    python benchmarks/searched.py runs/held-1 runs/held-2 --rules added-delay-held:wait=0.7

A policy that holds decides tens of thousands of times in an episode, and its exported network takes
a tenth of a millisecond for each. What is searched decides alike in a microsecond or so (a test
holds them equal). Ratios of mean E2E to the first rule, on the seeds that `servegym evaluate`
plays, warm-up left out, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from servegym.baselines.registry import policy
from servegym.evaluate.harness import evaluate
from servegym.train.cross_entropy import CrossEntropyTrainer


def main() -> None:
    """Play, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs on one scenario")
    parser.add_argument("--rules", nargs="+", required=True, help="what they are compared with")
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--num-requests", type=int, default=1000)
    given = parser.parse_args()
    trainers = [CrossEntropyTrainer.stored(folder) for folder in given.runs]
    found = [replace(t.compiled(), name=str(t.folder.path)) for t in trainers]
    result = evaluate(
        trainers[0].scenario,
        [*map(policy, given.rules), *found],
        loads=given.loads,
        num_seeds=given.seeds,
        num_units=given.num_requests,
    )
    print("| load | policy | mean E2E s | p99 TTFT s | ratio |\n|---|---|--:|--:|---|")
    for load in given.loads:
        for name, _ in result.policies:
            ratio = result.ratio(name, given.rules[0], load)
            e2e_s, ttft_s = (
                result.values(name, load, metric).mean() for metric in ("e2e_mean_s", "ttft_p99_s")
            )
            shown = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            print(f"| {load:g} | `{name}` | {e2e_s:.3f} | {ttft_s:.2f} | {shown} |")


if __name__ == "__main__":
    main()
