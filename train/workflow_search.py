"""Search for the linear part of a learned scheduler: cross-entropy over whole episodes.

A linear score of the pair features is a policy of some thirty numbers, and an episode of a hundred
jobs takes some 50 ms in compiled code: few enough and fast enough to search without gradients. All
candidates of a generation play the same episodes, so what arrivals do cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from servegym.agents.workflow_features import NUM_PAIR_FEATURES, PAIR_FEATURES
from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
from servegym.errors import ConfigError
from servegym.typing import FloatArray
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec

#: What a scheduler may be trained for.
OBJECTIVES = ("jct", "makespan", "deadline")
#: Where a search without a base rule begins: short jobs first, on devices that end them early, and
#: rather not where a prompt holds up others; the last three are 0 on devices that run tasks.
FIRST_GUESS = {
    "one": 10.0,
    "job_work_left": -1.0,
    "rank": 0.1,
    "finish": -0.5,
    "regret": -1.0,
    "prefill_to_others": -1.0,
    "prompts_waiting": -0.5,
    "kv_used": -0.5,
}


def losses(
    spec: FleetSpec, episodes: Sequence[Episode], policy: WorkflowPolicy, objective: str
) -> FloatArray:
    """Play episodes; lower is better.

    Args:
        spec: The fleet.
        episodes: What is played.
        policy: Plays.
        objective: One of `OBJECTIVES`.

    Returns:
        Per episode the logarithm of the mean job completion time or of the makespan in seconds,
        or minus the (weighted) share of jobs that ended in time, `float64[len(episodes)]`.
    """
    simulator = Simulator(spec, episodes)
    run(simulator, policy)
    env = simulator.state.env
    if objective == "jct":
        return np.log(env["area"] / env["num_jobs"])
    if objective == "makespan":
        return np.log(env["makespan_s"])
    weights = [simulator.jobs(e)["weight"].sum() for e in range(len(episodes))]
    return -env["good"] / np.array(weights)


def time_unit_s(spec: FleetSpec, episodes: Sequence[Episode]) -> float:
    """Return the mean expected duration of the stages of some episodes."""
    simulator = Simulator(spec, episodes)
    counts = simulator.state.env["num_stages"].tolist()
    means = [simulator.state.stage["mean_s"][env, :n] for env, n in enumerate(counts)]
    return float(np.concatenate(means).mean())


@dataclass
class Search:
    """A normal distribution over the weights, narrowed around the best of each generation.

    Attributes:
        mean: Its means, `float64[weights]`.
        spread: Its standard deviations, same shape.
        generation: How many there have been.
    """

    mean: FloatArray
    spread: FloatArray
    generation: int = 0

    @classmethod
    def begin(cls, base: str) -> Search:
        """Begin at the base rule, or, without one, at the first guess."""
        mean = np.zeros(NUM_PAIR_FEATURES)
        spread = np.full(NUM_PAIR_FEATURES, 0.5)
        if base == "none":
            for name, value in FIRST_GUESS.items():
                mean[PAIR_FEATURES.index(name)] = value
        spread[PAIR_FEATURES.index("one")] = 2.0
        return cls(mean, spread)

    def state(self) -> list[Any]:
        """Return what a checkpoint holds of it."""
        return [torch.from_numpy(self.mean), torch.from_numpy(self.spread), self.generation]

    @classmethod
    def of(cls, state: list[Any]) -> Search:
        """Make it again from `state`."""
        mean, spread, generation = state
        return cls(mean.numpy(), spread.numpy(), int(generation))

    def step(
        self,
        loss: Callable[[FloatArray], float],
        rng: np.random.Generator,
        *,
        size: int = 24,
        elite: int = 6,
    ) -> float:
        """Try one generation.

        Args:
            loss: Of weights, lower is better; the same episodes for all of a generation.
            rng: Randomness.
            size: Candidates; the mean is one of them.
            elite: Best ones that make the next distribution.

        Returns:
            Mean loss of the best.
        """
        if not 1 <= elite <= size:
            raise ConfigError(f"elite must be within 1..{size}, got {elite}")
        tried = self.draw(rng, size)
        return self.update(tried, np.array([loss(theta) for theta in tried]), elite)

    def draw(self, rng: np.random.Generator, size: int) -> FloatArray:
        """Draw the candidates of a generation, the mean first, `float64[size, weights]`."""
        tried: FloatArray = self.mean + self.spread * rng.normal(size=(size, len(self.mean)))
        tried[0] = self.mean
        return tried

    def update(self, tried: FloatArray, found: FloatArray, elite: int) -> float:
        """Narrow the distribution around the best.

        Args:
            tried: Candidates, `float64[size, weights]`.
            found: Their losses, `float64[size]`.
            elite: Best ones that make the next distribution.

        Returns:
            Mean loss of the best.
        """
        best = np.argsort(found)[:elite]
        share = np.log(elite + 0.5) - np.log(np.arange(1, elite + 1))
        share /= share.sum()
        around = np.sqrt(share @ (tried[best] - self.mean) ** 2)
        self.mean = 0.4 * self.mean + 0.6 * (share @ tried[best])
        self.spread = np.maximum(0.7 * self.spread + 0.3 * around, 0.02)
        self.generation += 1
        return float(found[best].mean())


def linear_loss(
    spec: FleetSpec,
    episodes: Sequence[Episode],
    objective: str,
    base: str,
    eta: float,
    tau_s: float,
) -> Callable[[FloatArray], float]:
    """Return the mean loss of a linear policy over these episodes, as a function of its weights."""

    def loss(theta: FloatArray) -> float:
        policy = learned_rule(WorkflowWeights(base, eta, tau_s, theta))
        return float(losses(spec, episodes, policy, objective).mean())

    return loss
