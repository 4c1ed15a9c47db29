"""What prices on prefill and on memory do: the teacher of counterfactuals plays itself.

    python benchmarks/prices.py azure-conv-fit added-delay-inferred

For choosing the prices of a scenario before a network is trained under them. Mean E2E over that of
a rule on training seeds, the geometric mean of their paired ratios.
"""

from __future__ import annotations

import argparse

import numpy as np

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DONE
from servegym.policy.contract import Group
from servegym.policy.counterfactual import SECONDS, Teacher, Worth, due
from servegym.policy.drawn_lengths import learn_lengths
from servegym.policy.observe import observe_batch
from servegym.policy.run import run
from servegym.scenario import Scenario, load_scenario
from servegym.typing import FloatArray

FIRST_SEED = 400_000
PREFILL, MEMORY = (0.0, 0.5, 1.0, 2.0), (0.0, 0.5, 1.0, 2.0)


def mean_e2e_s(simulator: Simulator) -> FloatArray:
    """Mean of each episode, seconds."""
    ends = [simulator.outcomes(env) for env in range(simulator.num_envs)]
    return np.array([np.nanmean(x["finish_s"] - x["arrival_s"]) for x in ends])


def play(scenario: Scenario, simulator: Simulator, worth: Worth) -> FloatArray:
    """Let the teacher play: always what is worth most."""
    teacher = Teacher(learn_lengths(scenario), worth)
    step = 0
    while (simulator.advance() != DONE).any():
        observe_batch(simulator, Group.COUNTERS | Group.PREFIX)
        envs = due(simulator)
        values = teacher.values(simulator, envs, step)[:, : simulator.max_replicas]
        allowed = simulator.state.allowed[envs, : simulator.max_replicas]
        actions = np.zeros(simulator.num_envs, np.int64)
        actions[envs] = np.where(allowed, values, -np.inf).argmax(1)
        simulator.apply(actions)
        step += 1
    return mean_e2e_s(simulator)


def main() -> None:
    """Print a table, a row for each price of prefill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario")
    parser.add_argument("rule")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--num-requests", type=int, default=1000)
    given = parser.parse_args()
    scenario = load_scenario(given.scenario)
    episodes = [
        scenario.episode(FIRST_SEED + i, num_requests=given.num_requests)
        for i in range(given.seeds)
    ]
    simulator = Simulator(scenario.spec, episodes)
    run(simulator, policy(given.rule))
    reference_s = mean_e2e_s(simulator)
    print("| prefill price | " + " | ".join(f"memory {m:g}" for m in MEMORY) + " |")
    print("|---|" + "---:|" * len(MEMORY))
    for prefill in PREFILL:
        cells = []
        for memory in MEMORY:
            worth = SECONDS._replace(
                num_samples=2, prefix_price=0.0, prefill_price=prefill, memory_price=memory
            )
            made_s = play(scenario, Simulator(scenario.spec, episodes), worth)
            cells.append(f"{np.exp(np.log(made_s / reference_s).mean()):.3f}")
        print(f"| {prefill:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
