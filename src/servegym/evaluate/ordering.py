"""Tuning of orders inside an engine by replay, the same for every rival of a learned one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.baselines.ordering.registry import ORDER_RANGES, ordering_policy
from servegym.errors import ConfigError, unknown_name
from servegym.policy.ordering import OrderingPolicy
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import Scenario


def order_loss(
    scenario: Scenario,
    policy: OrderingPolicy,
    loads: Sequence[float],
    num_seeds: int,
    *,
    num_requests: int | None = None,
    first_seed: int = 0,
) -> float:
    """Play an order on training seeds and average over loads; lower is better.

    Args:
        scenario: Its objective says what counts.
        policy: The order.
        loads: Factors on the arrival rate.
        num_seeds: Episodes per load; held-out ones have other seeds.
        num_requests: Requests per episode, else the scenario's own.
        first_seed: Their seeds count from here.

    Returns:
        Logarithm of the mean E2E latency in seconds, or, under the `goodput` objective, minus the
        (weighted) share of requests within their limits.
    """
    total = 0.0
    for load in loads:
        episodes = [
            scenario.episode(first_seed + i, load=load, num_requests=num_requests)
            for i in range(num_seeds)
        ]
        simulator = make_simulator(scenario.spec, episodes, policy)
        run_ordering(simulator, policy)
        env = simulator.state.env
        if scenario.objective == "goodput":
            total -= float(np.mean(env["good"] / env["num_requests"]))
        else:
            total += float(np.mean(np.log(env["area"] / env["num_requests"])))
    return total / len(loads)


def tuned_order(
    scenario: Scenario,
    name: str,
    loads: Sequence[float],
    *,
    num_seeds: int = 4,
    num_values: int = 9,
    num_requests: int | None = None,
) -> str:
    """Try values of an order's parameters on training episodes; return the best as its text.

    Args:
        scenario: What to play; its objective judges.
        name: Of the order; its parameters are tried one after the other.
        loads: Over which the objective is averaged.
        num_seeds: Training episodes per load; held-out ones have other seeds.
        num_values: Values of each parameter, evenly spaced.
        num_requests: Requests per episode, else the scenario's own.

    Raises:
        ConfigError: If the order has nothing to tune.
    """
    if name not in ORDER_RANGES:
        raise ConfigError(unknown_name("tunable order", name, ORDER_RANGES))
    found: dict[str, float] = {}
    for key, (low, high, logarithmic) in ORDER_RANGES[name].items():
        space = np.geomspace if logarithmic else np.linspace
        losses = {}
        for value in space(low, high, num_values).tolist():
            text = _text(name, {**found, key: float(f"{value:.4g}")})
            losses[float(f"{value:.4g}")] = order_loss(
                scenario, ordering_policy(text), loads, num_seeds, num_requests=num_requests
            )
        found[key] = min(losses, key=losses.__getitem__)
    return _text(name, found)


def _text(name: str, values: dict[str, float]) -> str:
    return f"{name}:" + ",".join(f"{key}={value:g}" for key, value in values.items())
