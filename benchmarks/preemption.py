"""How fast orders inside one engine are simulated, searched and learned.

python benchmarks/preemption.py
"""

from __future__ import annotations

import time

import gymnasium
import numpy as np

from servegym.baselines.ordering.registry import ordering_policy
from servegym.policy.ordering import NUM_ORDERING_FEATURES, PREDICTED_REMAINING_TOKENS
from servegym.policy.play_perceptron import Perceptrons, play_perceptrons
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import load_scenario


def order_rate(scenario_name: str, text: str, num_episodes: int = 6) -> float:
    """Return requests a second under an order in NumPy."""
    scenario, rule = load_scenario(scenario_name), ordering_policy(text)
    episodes = [scenario.episode(seed) for seed in range(num_episodes)]
    run_ordering(make_simulator(scenario.spec, episodes[:1], rule), rule)  # compiles
    simulator = make_simulator(scenario.spec, episodes, rule)
    begin_s = time.perf_counter()
    run_ordering(simulator, rule)
    return sum(len(x.table) for x in episodes) / (time.perf_counter() - begin_s)


def search_rate(scenario_name: str, num_nets: int = 24, num_episodes: int = 8) -> float:
    """Return requests a second under compiled perceptrons, all of them `srpt`, on two threads."""
    scenario = load_scenario(scenario_name)
    episodes = [scenario.episode(seed) for seed in range(num_episodes)]
    hidden = np.zeros((num_nets, NUM_ORDERING_FEATURES, 12))
    hidden[:, PREDICTED_REMAINING_TOKENS, 0] = 1.0
    one = np.ones(NUM_ORDERING_FEATURES)
    nets = Perceptrons(0 * one, one, hidden, np.zeros((num_nets, 12)), np.ones((num_nets, 12, 2)))
    play_perceptrons(scenario.spec, episodes[:1], nets)  # compiles
    begin_s = time.perf_counter()
    play_perceptrons(scenario.spec, episodes, nets, num_threads=2)
    return num_nets * sum(len(x.table) for x in episodes) / (time.perf_counter() - begin_s)


def choice_rate(num_envs: int = 32, num_steps: int = 1000) -> float:
    """Return choices a second of the vector environment, random ones."""
    env = gymnasium.make_vec("servegym/Preemption-v0", num_envs=num_envs)
    _, info = env.reset(seed=0)
    rng = np.random.default_rng(0)
    spent_s = 0.0
    for _ in range(num_steps):
        mask = info["action_mask"]
        actions = (rng.random(mask.shape) * mask).argmax(-1)
        begin_s = time.perf_counter()
        _, _, _, _, info = env.step(actions)
        spent_s += time.perf_counter() - begin_s
    return num_envs * num_steps / spent_s


def main() -> None:
    """Measure and print."""
    for name in ("kv-starved", "long-tailed", "slo-tiers"):
        print(f"{name}: srpt {60 * order_rate(name, 'srpt'):,.0f} requests a minute")
        print(f"{name}: search {60 * search_rate(name):,.0f} requests a minute")
    print(f"Preemption-v0: {choice_rate():,.0f} choices/s with 32 environments")


if __name__ == "__main__":
    main()
