"""Decisions per second of CPU time in a fleet of engines with orders, in every form there is.

`python benchmarks/agents.py`:
the dispatcher takes the replica with the fewest outstanding requests, schedulers the first request
that they may; choosing is not timed. Median of rounds that alternate between the forms, so that
whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from servegym.envs import cluster_v0
from servegym.envs.cluster import ClusterVectorEnv
from servegym.envs.cluster_batch import ClusterBatch
from servegym.policy.contract import OUTSTANDING_REQUESTS

DECISIONS = 4096


def choose(batch: ClusterBatch) -> np.ndarray:
    """Choose for all environments of a batch, in its own actions."""
    found = batch.mask.argmax(1)
    dispatches = np.flatnonzero(batch.agent == 0)
    width = batch.num_replicas
    outstanding = batch.replicas[dispatches, :, OUTSTANDING_REQUESTS]
    allowed = batch.mask[dispatches, :width] == 1
    found[dispatches] = np.where(allowed, outstanding, np.inf).argmin(1)
    return found


def turns(scenario: str) -> Callable[[], float]:
    """PettingZoo's agents one at a time: `last`, then `step`."""
    env = cluster_v0.raw_env(scenario)

    def one_round() -> float:
        env.reset(seed=0)
        spent = 0.0
        for _ in range(DECISIONS):
            begin = time.process_time()
            _, _, terminated, _, _ = env.last()
            spent += time.process_time() - begin
            if terminated:
                env.reset()
                continue
            action = int(choose(env.batch)[0])
            action -= 0 if env.batch.agent[0] == 0 else env.batch.num_dispatch
            begin = time.process_time()
            env.step(action)
            spent += time.process_time() - begin
        return spent / DECISIONS

    return one_round


def rounds(scenario: str) -> Callable[[], float]:
    """PettingZoo's agents all at once."""
    env = cluster_v0.parallel_env(scenario)
    passing = {name: int(env.action_space(name).n) - 1 for name in env.possible_agents}

    def one_round() -> float:
        env.reset(seed=0)
        spent = 0.0
        for _ in range(DECISIONS):
            if not env.agents:
                env.reset()
            action, agent = int(choose(env.batch)[0]), int(env.batch.agent[0])
            action -= 0 if agent == 0 else env.batch.num_dispatch
            actions = {**passing, env.possible_agents[agent]: action}
            begin = time.process_time()
            env.step(actions)
            spent += time.process_time() - begin
        return spent / DECISIONS

    return one_round


def vector(scenario: str, num_envs: int) -> Callable[[], float]:
    """Gymnasium's form of many fleets."""
    env = ClusterVectorEnv(num_envs, scenario)
    steps = max(16, DECISIONS // num_envs)

    def one_round() -> float:
        env.reset(seed=0)
        spent = 0.0
        for _ in range(steps):
            actions = choose(env.batch)
            begin = time.process_time()
            env.step(actions)
            spent += time.process_time() - begin
        return spent / (steps * num_envs)

    return one_round


def sb3(scenario: str, num_envs: int) -> Callable[[], float]:
    """Stable-Baselines3's form of many fleets."""
    from servegym.envs.sb3 import ClusterVecEnv

    env = ClusterVecEnv(num_envs, scenario)
    batch = env.get_attr("batch")[0]
    steps = max(16, DECISIONS // num_envs)

    def one_round() -> float:
        env.seed(0)
        env.reset()
        spent = 0.0
        for _ in range(steps):
            actions = choose(batch)
            begin = time.process_time()
            env.step(actions)
            spent += time.process_time() - begin
        return spent / (steps * num_envs)

    return one_round


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenario", default="kv-starved-fleet")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    forms = {
        "env (AEC)": turns(args.scenario),
        "parallel_env": rounds(args.scenario),
        "VectorEnv, 64": vector(args.scenario, 64),
        "VectorEnv, 256": vector(args.scenario, 256),
        "SB3 VecEnv, 64": sb3(args.scenario, 64),
        "SB3 VecEnv, 256": sb3(args.scenario, 256),
    }
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for measure in forms.values():  # compiles
        measure()
    for _ in range(args.rounds):
        for name, measure in forms.items():
            taken[name].append(measure())
    print(f"| {args.scenario} | decisions/s | lowest, highest |\n|---|---|---|")
    for name, times in taken.items():
        rates = 1.0 / np.array(times)
        low, middle, high = np.percentile(rates, (0, 50, 100))
        print(f"| `{name}` | {middle:,.0f} | {low:,.0f}, {high:,.0f} |")
    agents = cluster_v0.parallel_env(args.scenario).max_num_agents
    rate = agents / np.median(taken["parallel_env"])
    print(f"\nparallel_env: {rate:,.0f} agents' actions/s, passes included")


if __name__ == "__main__":
    main()
