"""Decisions per second of RLlib's PPO by its environment runners, and where the time goes.

`python benchmarks/rllib_runners.py --runners 1 2`, in the environment of `scripts/test-clients rl`.
Numbers of runners take turns, round by round; the first update of each, which starts things, does
not count.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

from servegym.train.rllib import RllibTrainer
from servegym.train.rllib_settings import RllibTraining


def updates(num_env_runners: int, given: argparse.Namespace, folder: Path) -> list[list[float]]:
    """Make updates; return decisions per second, seconds of sampling and of learning of each."""
    config = RllibTraining(
        scenario=given.scenario,
        num_env_runners=num_env_runners,
        decisions_per_update=given.decisions,
        total_decisions=(given.updates + 1) * given.decisions,
        validation_episodes=1,
        validation_requests=50,
    )
    trainer = RllibTrainer(config, folder)
    trainer.prepare()
    found = []
    for _ in range(given.updates + 1):
        begin_s = time.perf_counter()
        result = trainer.learner.train()
        took_s = time.perf_counter() - begin_s
        timers = result["timers"]
        found.append(
            [
                given.decisions / took_s,
                float(timers["env_runner_sampling_timer"]),
                float(timers["learner_update_timer"]),
            ]
        )
    trainer.learner.stop()
    return found[1:]


def main() -> None:
    """Take turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", default="mixed-chat")
    parser.add_argument("--runners", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--decisions", type=int, default=8192)
    given = parser.parse_args()
    ray.init(num_cpus=max(os.cpu_count() or 1, max(given.runners) + 2), log_to_driver=False)
    found: dict[int, list[list[float]]] = {n: [] for n in given.runners}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(given.rounds):
            for n in given.runners:
                found[n] += updates(n, given, Path(folder) / f"{i}-{n}")
    first = np.median(found[given.runners[0]], axis=0)
    print("runners   decisions/s   ratio   sampling s   learning s")
    for n, rows in found.items():
        rate, sample_s, learn_s = np.median(rows, axis=0)
        print(f"{n:<9} {rate:11,.0f}   {rate / first[0]:5.2f}   {sample_s:10.2f}   {learn_s:10.2f}")


if __name__ == "__main__":
    main()
