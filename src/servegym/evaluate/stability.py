"""A comparison played again in worlds in which kernels and engines are off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from servegym.costs.uncertainty import World
from servegym.errors import ConfigError
from servegym.problems.objective import Objective
from servegym.problems.problem import AnyProblem, Policy
from servegym.typing import FloatArray

#: Of the seeds of a comparison so many are played in every world.
MOST_SEEDS = 3
#: Shares of the worlds below and above a band.
_BAND = (5, 95)


class Band(NamedTuple):
    """Within what a metric lies in nine of ten worlds."""

    low: float
    high: float


@dataclass
class Stability:
    """Metrics in every world.

    Attributes:
        objective: What policies are judged by.
        policies: Names.
        loads: Load factors.
        seeds: Those that were played.
        num_worlds: Worlds.
        metrics: By policy and load, of each world, means over the seeds.
    """

    objective: Objective
    policies: list[str]
    loads: list[float]
    seeds: list[int]
    num_worlds: int
    metrics: dict[tuple[str, float], list[dict[str, float]]] = field(default_factory=dict)

    def values(self, policy: str, load: float, metric: str) -> FloatArray:
        """One metric over the worlds, `float64[num_worlds]`."""
        return np.array([found.get(metric, np.nan) for found in self.metrics[policy, load]])

    def band(self, policy: str, load: float, metric: str) -> Band:
        """Return within what a metric lies in nine of ten worlds; NaN if it is in none."""
        values = self.values(policy, load, metric)
        values = values[~np.isnan(values)]
        if not len(values):
            return Band(np.nan, np.nan)
        return Band(*(float(x) for x in np.percentile(values, _BAND)))

    def wins(self, policy: str, other: str, load: float) -> int:
        """In how many worlds a policy beats another by the objective."""
        mine, theirs = (self._judged(name, load) for name in (policy, other))
        return int((mine < theirs).sum())

    def first(self, policy: str, load: float) -> int:
        """In how many worlds no other policy is better."""
        best = np.min([self._judged(name, load) for name in self.policies], axis=0)
        return int((self._judged(policy, load) <= best).sum())

    def _judged(self, policy: str, load: float) -> FloatArray:
        """Lower is better."""
        values = self.values(policy, load, self.objective.metric)
        return np.asarray(self.objective.sign * values)

    def sentences(self, load: float) -> list[str]:
        """Say of each policy and the next in rank in how many worlds it beats that."""
        order = sorted(self.policies, key=lambda name: float(np.median(self._judged(name, load))))
        return [
            f"{a} beats {b} in {self.wins(a, b, load)} of {self.num_worlds} worlds"
            for a, b in itertools.pairwise(order)
        ]

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "num_worlds": self.num_worlds,
            "seeds": self.seeds,
            "bands": [
                {
                    "policy": name,
                    "load": load,
                    "first_in": self.first(name, load),
                    "band90": {
                        metric: list(self.band(name, load, metric))
                        for metric in self.metrics[name, load][0]
                    },
                    "beats": {
                        other: self.wins(name, other, load)
                        for other in self.policies
                        if other != name
                    },
                }
                for load in self.loads
                for name in self.policies
            ],
        }


def play_worlds(
    problem: AnyProblem,
    scenario: Any,
    policies: Sequence[Policy],
    *,
    loads: Sequence[float],
    seeds: Sequence[int],
    num_worlds: int,
    num_units: int | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Stability:
    """Play every policy on the same episodes in the same worlds.

    Args:
        problem: What is decided.
        scenario: What to play.
        policies: What to compare.
        loads: Load factors.
        seeds: Of the episodes; the first `MOST_SEEDS` are played.
        num_worlds: How many.
        num_units: Requests per episode, else the scenario's own.
        progress: Called with what is done and the share of the work.

    Raises:
        ConfigError: If there are no bands for the problem, or there is no world.
    """
    if num_worlds < 1:
        raise ConfigError(f"--uncertainty is a number of worlds, got {num_worlds}: give 1 or more")
    chosen = list(seeds[:MOST_SEEDS])
    names = [policy.name for policy in policies]
    objective = problem.objective(scenario)
    result = Stability(objective, names, list(loads), chosen, num_worlds)
    for seed in range(num_worlds):
        progress(f"world {seed + 1} of {num_worlds}", seed / num_worlds)
        for load in loads:
            episodes = problem.episodes_in(
                World(seed), scenario, chosen, load=load, num_units=num_units
            )
            for policy in policies:
                metrics, _ = episodes.play(policy, seed=chosen[0])
                means = {
                    key: float(np.mean([found.get(key, np.nan) for found in metrics]))
                    for key in metrics[0]
                }
                result.metrics.setdefault((policy.name, load), []).append(means)
    return result
