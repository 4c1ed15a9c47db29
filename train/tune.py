"""Tuning a rule: the same budget for every rival of a learned policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from servegym.baselines.registry import RANGES, policy
from servegym.cluster.outcome import worth_in_time
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError, unknown_name
from servegym.policy.run import run
from servegym.scenario import Scenario


def candidates(name: str, budget: int) -> list[str]:
    """Spread parameter settings of a rule evenly over their ranges, the defaults first.

    Args:
        name: A rule with tunable parameters.
        budget: How many settings.

    Returns:
        Policies in text form.

    Raises:
        ConfigError: If the rule has nothing to tune.
    """
    if name not in RANGES:
        raise ConfigError(unknown_name("tunable policy", name, RANGES))
    ranges = RANGES[name]
    # Kronecker sequence: low discrepancy in any dimension without a library
    root = 2.0
    for _ in range(40):
        root = (1.0 + root) ** (1.0 / (len(ranges) + 1))
    texts = [name]
    for i in range(1, budget):
        values = []
        for k, (key, (low, high, logarithmic)) in enumerate(ranges.items()):
            u = (0.5 + i * root ** -(k + 1)) % 1.0
            if logarithmic:
                value = math.exp(math.log(low) + u * math.log(high / low))
            else:
                value = low + u * (high - low)
            values.append(f"{key}={value:.4g}")
        texts.append(f"{name}:{','.join(values)}")
    return texts


def score(scenario: Scenario, text: str, loads: Sequence[float], num_seeds: int) -> float:
    """Play a rule on training seeds and average over loads; lower is better.

    Args:
        scenario: Its objective says what counts.
        text: The rule.
        loads: Factors on the arrival rate.
        num_seeds: Episodes per load.

    Returns:
        Mean E2E latency in seconds, or, under the `goodput` objective, minus the (weighted) share
        of requests within their limits while requests arrive.
    """
    total = 0.0
    for load in loads:
        episodes = [scenario.episode(seed, load=load) for seed in range(num_seeds)]
        simulator = Simulator(scenario.spec, episodes)
        run(simulator, policy(text))
        for env, episode in enumerate(episodes):
            done = simulator.outcomes(env)
            if scenario.objective == "goodput":
                total -= worth_in_time(done, scenario.spec, episode.table)
            else:
                total += float(np.nanmean(done["finish_s"] - done["arrival_s"]))
    return total / (num_seeds * len(loads))
