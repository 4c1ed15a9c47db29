"""Pose a problem of one's own, and train, tune, compare and report as for the built-in ones.

Covers: `Problem`, `Episodes`, a table of rules, `NAME:tuned`, PPO of Stable-Baselines3, a report.
Scenario: requests come in bursts. A server takes any number of them at once, for 2 s and a little
for each: it may start with those that wait, or wait for more. PPO should come near the tuned rule.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import numpy as np
import torch
from pydantic import BaseModel
from rich.console import Console
from stable_baselines3 import PPO

from servegym.baselines.rules import Entry, Range, Rules
from servegym.evaluate.harness import evaluate
from servegym.evaluate.report import write_report
from servegym.evaluate.table import comparison_table
from servegym.evaluate.tune import resolve
from servegym.problems.objective import Objective
from servegym.problems.problem import Column, Contract, Episodes, Played, Problem

TICK_S, MOST_S = 0.3, 10.0  # between decisions; nobody waits longer for a start
WAIT, START = range(2)
FEATURES = ("num_waiting", "oldest_s", "since_last_s")


class Bursts(BaseModel):
    """A scenario: six requests a burst."""

    name: str = "bursts"
    description: str = "A burst of six every eight seconds; a batch takes 2 s and 20 ms for each."
    num_bursts: int = 40

    def arrivals_s(self, seed, load=1.0, num_bursts=None):
        rng = np.random.default_rng(seed)
        begins_s = np.cumsum(rng.exponential(8.0 / load, num_bursts or self.num_bursts))
        return np.sort((begins_s[:, None] + rng.exponential(0.1, (len(begins_s), 6))).ravel())


class Batching(gymnasium.Env):
    """The return is minus the mean latency, s; the observation is `float32[3]`, `FEATURES`."""

    observation_space = gymnasium.spaces.Box(0.0, np.inf, (len(FEATURES),), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, draw):
        self.draw = draw

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.arrival_s = self.draw(int(self.np_random.integers(1_000_000)))
        self.num_served, self.now_s = 0, self.arrival_s[0]
        return self._look(), {}

    def step(self, action):
        before_s, first, last = self.now_s, self.num_served, self.num_here
        self.now_s += TICK_S
        if action == START or before_s - self.arrival_s[first] > MOST_S:
            self.now_s, self.num_served = before_s + 2.0 + 0.02 * (last - first), last
        # what all waited since the last decision, those who came meanwhile too
        waited_s = np.maximum(0.0, self.now_s - np.maximum(self.arrival_s[first:], before_s))
        done = self.num_served == len(self.arrival_s)
        if not done:  # decisions are taken when somebody waits
            self.now_s = max(self.now_s, self.arrival_s[self.num_served])
        return self._look(), -waited_s.sum() / len(self.arrival_s), done, False, {}

    def _look(self):
        self.num_here = int(np.searchsorted(self.arrival_s, self.now_s, side="right"))
        oldest = min(self.num_served, len(self.arrival_s) - 1)
        times_s = self.now_s - self.arrival_s[[oldest, self.num_here - 1]]
        return np.array([self.num_here - self.num_served, *times_s], np.float32)


@dataclass(frozen=True)
class BatchingPolicy:
    """Decides by a function of the observation."""

    name: str
    decide: object
    information: str = "blind"
    reference: str = ""
    learned: bool = False


def at_once():
    """Start whenever the server is free."""
    return BatchingPolicy("at-once", lambda seen: START)


def quiet(gap_s=1.0):
    """Start when nobody came for `gap_s`."""
    return BatchingPolicy("quiet", lambda seen: int(seen[2] >= gap_s))


@dataclass
class BurstEpisodes(Episodes):
    """Arrivals that every policy can play."""

    arrivals_s: list

    def play(self, policy, seed=0):
        return Played([{"latency_mean_s": loss} for loss in self.losses(policy)], trail=None)

    def losses(self, policy):
        losses = np.zeros(len(self.arrivals_s))
        for i, arrival_s in enumerate(self.arrivals_s):
            env = Batching(lambda _, arrival_s=arrival_s: arrival_s)
            (seen, _), done = env.reset(), False
            while not done:
                seen, reward, done, _, _ = env.step(policy.decide(seen))
                losses[i] -= reward
        return losses

    def time_decisions(self, policy):
        begin_s = time.perf_counter()
        policy.decide(np.zeros(len(FEATURES), np.float32))
        return np.array([time.perf_counter() - begin_s])


class BatchingProblem(Problem):
    """When a batch starts."""

    name, decides, unit, load = "batching", "when a batch starts", "bursts", "the rate of bursts"
    quiet = Entry(quiet, {"gap_s": Range(0.0, 2.0)})
    rules = Rules("policy", {"at-once": Entry(at_once), "quiet": quiet})
    default_policies, default_policy = ("at-once", "quiet:tuned"), "at-once"
    columns = (Column("mean s", "latency_mean_s", 1, 3),)

    def contract(self):
        return Contract(1, {"state": FEATURES})

    def objective(self, scenario):
        return Objective("latency", "latency_mean_s", "mean latency")

    def episodes(self, scenario, seeds, *, load=1.0, num_units=None):
        return BurstEpisodes([scenario.arrivals_s(seed, load, num_units) for seed in seeds])

    def key(self, scenario, seed, load, num_units):
        return scenario.arrivals_s(seed, load, num_units).tobytes()


def main():
    """Train on single bursts of seeds below the held-out ones, tune, and compare."""
    problem, scenario = BatchingProblem(), Bursts()
    torch.set_num_threads(1)  # more only wait for each other on a network this small
    env = Batching(lambda seed: scenario.arrivals_s(seed, num_bursts=1))
    model = PPO("MlpPolicy", env, 1e-3, n_steps=256, gamma=1.0, seed=0, device="cpu").learn(5000)
    ppo = BatchingPolicy("ppo", lambda seen: model.predict(seen, deterministic=True)[0])
    rules = [resolve(problem, scenario, text, (1.0,)) for text in problem.default_policies]
    result = evaluate(scenario, [*rules, replace(ppo, learned=True)], problem=problem, num_seeds=5)
    Console(width=110).print(comparison_table(result, 1.0))
    write_report(result, Path("runs/batching.html"))


if __name__ == "__main__":
    main()
