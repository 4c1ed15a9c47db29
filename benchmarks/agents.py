"""Decisions per second of CPU time in fleets with several agents, in every form there is.

`python benchmarks/agents.py`:
the dispatcher takes the replica with the fewest outstanding requests, schedulers the first request
that they may, and leave KV as it is; a controller moves nobody. Choosing is not timed. Median of
rounds that alternate between the forms, so that whatever else the machine does meets all of them;
batches go on from one round to the next, so that fleets fill.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from servegym.cluster.state import LEAVE
from servegym.envs import cluster_v0
from servegym.envs.agent_batch import AgentBatch
from servegym.envs.cluster import ClusterVectorEnv
from servegym.envs.cluster_batch import ClusterBatch
from servegym.envs.cluster_kernels import KIND_MIGRATE, KIND_RETAIN
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
    if batch.num_answers:
        found[batch.kind == KIND_RETAIN] = batch.first_answer + LEAVE
    if batch.controller > 0:
        found[batch.kind == KIND_MIGRATE] = batch.num_actions - 1
    return found


def own(batch: ClusterBatch) -> int:
    """Choose in the only environment of a batch, in the actions of the agent that is asked."""
    action, agent = int(choose(batch)[0]), int(batch.agent[0])
    if agent == batch.controller:
        return action - batch.first_move
    return action - (batch.num_dispatch if agent > 0 else 0)


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
            action = own(env.batch)
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
            asked = env.possible_agents[int(env.batch.agent[0])]
            actions = {**passing, asked: own(env.batch)}
            begin = time.process_time()
            env.step(actions)
            spent += time.process_time() - begin
        return spent / DECISIONS

    return one_round


def vector(scenario: str, num_envs: int) -> Callable[[], float]:
    """Gymnasium's form of many fleets."""
    env = ClusterVectorEnv(num_envs, scenario)
    env.reset(seed=0)
    steps = max(64, DECISIONS // num_envs)

    def one_round() -> float:
        spent = 0.0
        for _ in range(steps):
            actions = choose(env.batch)
            begin = time.process_time()
            env.step(actions)
            spent += time.process_time() - begin
        return spent / (steps * num_envs)

    return one_round


def by_class(scenario: str, num_fleets: int) -> Callable[[], float]:
    """The agents of many fleets as one batch, by class."""
    fleets = AgentBatch(num_fleets, scenario)
    batch, turn = fleets.batch, fleets.reset(seed=0)
    steps = max(64, DECISIONS // num_fleets)

    def one_round() -> float:
        nonlocal turn
        spent = 0.0
        for _ in range(steps):
            chosen = choose(batch)
            first = {"controller": batch.first_move, "scheduler": batch.num_dispatch}
            actions = {
                kind: chosen[asked.fleet] - first.get(kind, 0) for kind, asked in turn.asked.items()
            }
            begin = time.process_time()
            turn = fleets.step(actions)
            spent += time.process_time() - begin
        return spent / (steps * num_fleets)

    return one_round


def sb3(scenario: str, num_envs: int) -> Callable[[], float]:
    """Stable-Baselines3's form of many fleets."""
    from servegym.envs.sb3 import ClusterVecEnv

    env = ClusterVecEnv(num_envs, scenario)
    batch = env.get_attr("batch")[0]
    env.seed(0)
    env.reset()
    steps = max(64, DECISIONS // num_envs)

    def one_round() -> float:
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
    names = ["kv-starved-fleet", "near-full-kv", "pd-unequal", "agents-tiers"]
    parser.add_argument("--scenarios", nargs="+", default=names)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for scenario in args.scenarios:
        measure(scenario, args.num_envs, args.rounds)


def measure(scenario: str, sizes: list[int], num_rounds: int) -> None:
    """Measure all forms of a scenario, batches in these sizes, and print."""
    forms = {"env (AEC)": turns(scenario), "parallel_env": rounds(scenario)}
    forms |= {f"VectorEnv, {size}": vector(scenario, size) for size in sizes}
    forms |= {f"AgentBatch, {size}": by_class(scenario, size) for size in sizes}
    forms |= {f"SB3 VecEnv, {size}": sb3(scenario, size) for size in sizes}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():  # compiles
        form()
    for _ in range(num_rounds):
        for name, form in forms.items():
            taken[name].append(form())
    print(f"| {scenario} | decisions/s | lowest, highest |\n|---|---|---|")
    for name, times in taken.items():
        low, middle, high = np.percentile(1.0 / np.array(times), (0, 50, 100))
        print(f"| `{name}` | {middle:,.0f} | {low:,.0f}, {high:,.0f} |")
    agents = cluster_v0.parallel_env(scenario).max_num_agents
    rate = agents / np.median(taken["parallel_env"])
    print(f"\nparallel_env: {rate:,.0f} agents' actions/s, passes included\n")


if __name__ == "__main__":
    main()
