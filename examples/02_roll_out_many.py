"""Thousands of decisions at once.

Covers: `gymnasium.make_vec`, autoreset, semi-Markov time steps, throughput.
Scenario: `mixed-chat` in 64 environments.
"""

import time

import gymnasium
import numpy as np

import servegym  # noqa: F401 - registers the environments
from servegym.policy.contract import OUTSTANDING_REQUESTS


def main() -> None:
    """Run the example."""
    envs = gymnasium.make_vec(
        "servegym/Dispatch-v1",
        num_envs=64,
        scenario="mixed-chat",
        num_requests=128,
        load=(0.6, 1.0),
    )
    observation, info = envs.reset(seed=0)
    finished, simulated_s = [], 0.0
    begin = time.perf_counter()
    for _ in range(300):
        outstanding = observation["replicas"][..., OUTSTANDING_REQUESTS]
        load = np.where(observation["action_mask"] > 0, outstanding, np.inf)
        observation, _, terminated, _, info = envs.step(load.argmin(-1))
        simulated_s += info["dt_s"].sum()
        finished += info["episode_metrics"]["mean_e2e_s"][terminated].tolist()
    took = time.perf_counter() - begin
    envs.close()
    print(f"{len(finished)} episodes ended, mean latency {np.mean(finished):.2f} s")
    print(f"{300 * 64 / took:,.0f} decisions/s, {simulated_s / took:,.0f} simulated s per s")


if __name__ == "__main__":
    main()
