"""What runs of `--learner mappo` are worth on held-out episodes, against the pair they began as.

`python benchmarks/mappo.py RUN...`: the policies that were kept, in the compiled code that
validates them, on the episodes that `servegym evaluate` plays. Ratios of the mean E2E latency to
that of the start, paired by episode, with 95 % intervals; below 1 is better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from servegym.evaluate.compare import paired_ratio
from servegym.evaluate.harness import FIRST_SEED
from servegym.train.mappo import MappoTrainer


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0, 1.2])
    parser.add_argument("--seeds", type=int, default=16)
    args = parser.parse_args()
    print("| run | updates | load | mean E2E | over its start |\n|---|--:|--:|--:|---|")
    for path in args.runs:
        run = MappoTrainer.stored(path)
        start = [theta[None] for theta in run._start()]
        found = [theta.numpy()[None] for theta in run.best]
        for load in args.loads:
            seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
            episodes = [run.scenario.episode(seed, load=load) for seed in seeds]
            before, after = (
                np.array(env["area"] / env["num_requests"])
                for env in (run._play(thetas, episodes).state.env for thetas in (start, found))
            )
            ratio = paired_ratio(after, before)
            print(
                f"| {path.name} | {run.num_updates_made} | {load:g} | {after.mean():.2f} s "
                f"| {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] |",
                flush=True,
            )


if __name__ == "__main__":
    main()
