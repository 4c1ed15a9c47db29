"""Pose a problem of one's own, and train, tune, compare and report as for the built-in ones.

Covers: `Problem`, `Episodes`, a table of rules, `NAME:tuned`, PPO of Stable-Baselines3, a report.
Scenario: requests come in bursts. A server takes any number of them at once, for 2 s and a little
for each: it may start with those that wait, or wait for more. PPO should come near the tuned rule.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
from pydantic import BaseModel
from rich.console import Console
from stable_baselines3 import PPO

from servegym.baselines.rules import Entry, Range, Rules
from servegym.evaluate.harness import evaluate
from servegym.evaluate.report import write_report
from servegym.evaluate.table import comparison_table
from servegym.evaluate.tune import resolve
from servegym.policy.policy import Information
from servegym.problems.objective import Objective
from servegym.problems.problem import Column, Contract, Episodes, Played, Problem
from servegym.typing import FloatArray

TICK_S, MOST_S = 0.1, 10.0  # between decisions; nobody waits longer for a start
WAIT, START = range(2)
FEATURES = ("num_waiting", "oldest_s", "since_last_s")


class Bursts(BaseModel):
    """A scenario: at load 1 a burst of six every eight seconds."""

    name: str = "bursts"
    description: str = "Bursts of six requests; a batch takes 2 s and 20 ms for each."
    num_bursts: int = 40

    def arrivals_s(self, seed: int, load: float = 1.0, num_bursts: int | None = None) -> FloatArray:
        rng = np.random.default_rng(seed)
        count = num_bursts or self.num_bursts
        begins_s = np.cumsum(rng.exponential(8.0 / load, (count, 1)))
        return np.sort((begins_s[:, None] + rng.exponential(0.1, (count, 6))).ravel())


class Batching(gymnasium.Env):
    """Requests that wait cost a point a second; the observation is `float32[3]`, `FEATURES`."""

    observation_space = gymnasium.spaces.Box(0.0, np.inf, (len(FEATURES),), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, draw: Callable[[int], FloatArray]) -> None:
        self.draw = draw

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.arrival_s = self.draw(int(self.np_random.integers(2**31)))
        self.num_served, self.latency_s = 0, np.zeros(len(self.arrival_s))
        self.now_s = float(self.arrival_s[0])
        return self._look(), {}

    def step(self, action: int):
        before_s, first, last = self.now_s, self.num_served, self._num_here()
        self.now_s += TICK_S
        if action == START or before_s - self.arrival_s[first] > MOST_S:
            self.now_s = before_s + 2.0 + 0.02 * (last - first)
            self.latency_s[first:last] = self.now_s - self.arrival_s[first:last]
            self.num_served = last
        done = self.num_served == len(self.arrival_s)
        if not done:  # decisions are taken when somebody waits
            self.now_s = max(self.now_s, float(self.arrival_s[self.num_served]))
        return self._look(), -(last - first) * (self.now_s - before_s), done, False, {}

    def _num_here(self) -> int:
        return int(np.searchsorted(self.arrival_s, self.now_s, side="right"))

    def _look(self):
        here, oldest = self._num_here(), min(self.num_served, len(self.arrival_s) - 1)
        times_s = self.now_s - self.arrival_s[[oldest, here - 1]]
        return np.array([here - self.num_served, *times_s], np.float32)


@dataclass(frozen=True)
class BatchingPolicy:
    """Decides by a function of the observation."""

    name: str
    decide: Callable[[FloatArray], int]
    information: Information = "blind"
    reference: str = ""
    learned: bool = False


def at_once() -> BatchingPolicy:
    """Start whenever the server is free."""
    return BatchingPolicy("at-once", lambda seen: START)


def quiet(gap_s: float = 1.0) -> BatchingPolicy:
    """Start when nobody came for `gap_s`."""
    return BatchingPolicy("quiet", lambda seen: int(seen[2] >= gap_s))


class BurstEpisodes(Episodes[BatchingPolicy]):
    """Arrivals that any policy can play."""

    def __init__(self, arrivals_s: Sequence[FloatArray]) -> None:
        self.arrivals_s = arrivals_s

    def play(self, policy: BatchingPolicy, seed: int = 0) -> Played:
        found = []
        for arrival_s in self.arrivals_s:
            env = Batching(lambda _, arrival_s=arrival_s: arrival_s)
            (seen, _), done = env.reset(seed=seed), False
            while not done:
                seen, _, done, _, _ = env.step(policy.decide(seen))
            p95_s = float(np.percentile(env.latency_s, 95))
            found.append({"latency_mean_s": float(env.latency_s.mean()), "latency_p95_s": p95_s})
        return Played(found, trail=None)

    def losses(self, policy: BatchingPolicy) -> FloatArray:
        return np.array([metrics["latency_mean_s"] for metrics in self.play(policy).metrics])

    def time_decisions(self, policy: BatchingPolicy) -> FloatArray:
        begin_s = time.perf_counter()
        policy.decide(np.zeros(len(FEATURES), np.float32))
        return np.array([time.perf_counter() - begin_s])


class BatchingProblem(Problem[Bursts, BatchingPolicy]):
    """When a batch starts."""

    name, decides, unit, load = "batching", "when a batch starts", "bursts", "the rate of bursts"
    rules = Rules(
        "policy", {"at-once": Entry(at_once), "quiet": Entry(quiet, {"gap_s": Range(0.0, 2.0)})}
    )
    default_policies, default_policy = ("at-once", "quiet:tuned"), "at-once"
    columns = (Column("mean s", "latency_mean_s", 1, 3), Column("p95 s", "latency_p95_s", 1, 2))

    def contract(self) -> Contract:
        return Contract(1, {"state": FEATURES})

    def objective(self, scenario: Bursts) -> Objective:
        return Objective("latency", "latency_mean_s", "mean latency")

    def is_learned(self, policy: BatchingPolicy) -> bool:
        return policy.learned

    def episodes(self, scenario, seeds, *, load=1.0, num_units=None) -> BurstEpisodes:
        return BurstEpisodes([scenario.arrivals_s(seed, load, num_units) for seed in seeds])

    def key(self, scenario, seed, load, num_units) -> bytes:
        return scenario.arrivals_s(seed, load, num_units).tobytes()


def main(report: Path | None = None, num_steps: int = 8_000) -> None:
    """Train below the held-out seeds, tune, and compare."""
    problem, scenario = BatchingProblem(), Bursts()
    env = Batching(lambda seed: scenario.arrivals_s(seed % 1_000_000))
    model = PPO("MlpPolicy", env, 1e-3, n_steps=256, gamma=0.95, seed=0).learn(num_steps)

    def decide(seen: FloatArray) -> int:
        return int(model.predict(seen, deterministic=True)[0])

    rules = [resolve(problem, scenario, text, (1.0,)) for text in problem.default_policies]
    policies = [*rules, BatchingPolicy("ppo", decide, learned=True)]
    result = evaluate(scenario, policies, problem=problem, num_seeds=5)
    Console(width=110).print(comparison_table(result, 1.0))
    if report:
        write_report(result, report)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
