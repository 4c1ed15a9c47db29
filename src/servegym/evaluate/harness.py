"""Policies x loads x seeds, with the same episodes under every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from servegym.errors import ConfigError
from servegym.evaluate.compare import (
    Difference,
    Ratio,
    Share,
    headroom_share,
    paired_difference,
    paired_ratio,
    with_interval,
)
from servegym.evaluate.repeats import plan
from servegym.evaluate.stability import Stability
from servegym.problems.objective import Objective
from servegym.problems.problem import AnyProblem, Episodes, Policy, Scenario
from servegym.problems.registry import problem_of
from servegym.typing import FloatArray
from servegym.workloads.trace import Trace

#: Held-out seeds start here; training and tuning use smaller ones or none.
FIRST_SEED = 1_000_000

#: Row of what an offline search reaches that knows the future, and with how many of the best
#: policies it may begin.
CLAIRVOYANT = "clairvoyant"
NUM_STARTS = 3


@dataclass(frozen=True)
class Run:
    """One policy on one episode."""

    policy: str
    load: float
    seed: int
    metrics: dict[str, float]


@dataclass
class Evaluation:
    """All runs of a comparison.

    Attributes:
        problem: What is decided.
        scenario: What was played.
        policies: Name and information class, in the order given.
        loads: Load factors.
        seeds: Seeds of the episodes.
        runs: One per policy, load and seed.
        decision_s: Median and 99th percentile of a decision's time by policy, seconds.
        trails: What figures need of the first seed's run, by (policy, load).
        learned: Names of learned policies, which are compared with the best of the others.
        saturation: Largest load by policy and share of an episode within limits, if searched.
        seeds_asked: How many seeds were asked for; those that play an episode again are left out.
        notes: What that left out, and how far the others are repeats, in sentences.
        stability: The same in worlds in which kernels and engines are off, if that was asked.
        bound_budget: Simulation that `CLAIRVOYANT` took for an episode at most, in whole episodes;
            0 if there is no such row.
    """

    problem: AnyProblem
    scenario: Any
    policies: list[tuple[str, str]]
    loads: list[float]
    seeds: list[int]
    runs: list[Run] = field(default_factory=list)
    decision_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    trails: dict[tuple[str, float], Any] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)
    saturation: dict[str, dict[float, float]] = field(default_factory=dict)
    seeds_asked: int = 0
    notes: list[str] = field(default_factory=list)
    bound_budget: float = 0.0
    stability: Stability | None = None

    @property
    def averaged(self) -> str:
        """What tables say about their numbers."""
        return f"means over {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one episode"

    @property
    def interval_suffix(self) -> str:
        """What tables say about their intervals, if there are any."""
        return ", 95 % CI" if len(self.seeds) > 1 else ""

    @property
    def remarks(self) -> list[str]:
        """What the reader must know of the trace, the seeds and the loads, in sentences."""
        return [*(self.trace.remarks() if self.trace else ()), *self.notes]

    @property
    def trace(self) -> Trace | None:
        """The trace that was played, if one was."""
        return self.problem.trace(self.scenario)

    @property
    def objective(self) -> Objective:
        """What policies are judged by."""
        return self.problem.objective(self.scenario)

    def values(self, policy: str, load: float, metric: str) -> FloatArray:
        """One metric over the seeds, `float64[seeds]`."""
        return np.array(
            [
                r.metrics.get(metric, np.nan)
                for r in self.runs
                if r.policy == policy and r.load == load
            ]
        )

    def mean(self, policy: str, load: float, metric: str) -> float:
        """Mean of a metric over the seeds that have it, NaN if none has."""
        values = self.values(policy, load, metric)
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else float("nan")

    def ranking(self, load: float) -> list[tuple[str, str]]:
        """Name and information class of all policies, the best by the objective first."""
        sign, metric = self.objective.sign, self.objective.metric
        return sorted(self.policies, key=lambda p: sign * self.mean(p[0], load, metric))

    def best_heuristic(self, load: float) -> str:
        """Name of the best policy that is neither an oracle nor learned."""
        ranked = self.ranking(load)
        rules = [n for n, info in ranked if info != "oracle" and n not in self.learned]
        return (rules or [ranked[0][0]])[0]

    def shown_policies(self, load: float, limit: int = 8) -> list[str]:
        """The learned policies, the best ones and the worst: what figures have room for."""
        order = [name for name, _ in self.ranking(load)]
        unique = list(dict.fromkeys([*self.learned, *order]))
        return [*unique[: limit - 1], order[-1]] if len(unique) > limit else unique

    def ratio(self, policy: str, reference: str, load: float, metric: str = "") -> Ratio:
        """Paired ratio of a metric, by default the objective's, policy over reference."""
        metric = metric or self.objective.metric
        return paired_ratio(self.values(policy, load, metric), self.values(reference, load, metric))

    def difference(self, policy: str, reference: str, load: float) -> Difference:
        """Paired difference of the objective's metric, policy minus reference."""
        metric = self.objective.metric
        return paired_difference(
            self.values(policy, load, metric), self.values(reference, load, metric)
        )

    def against(self, policy: str, reference: str, load: float) -> Ratio | Difference:
        """Compare by the objective as it is compared: shares by differences, others by ratios."""
        compare = self.difference if self.objective.is_share else self.ratio
        return compare(policy, reference, load)

    def headroom(self, policy: str, load: float, metric: str = "") -> Share:
        """Share of the way from the best rule to `CLAIRVOYANT` that a policy has gone."""
        metric = metric or self.objective.metric
        best = self.best_heuristic(load)
        mine, reference, bound = (
            self.values(name, load, metric) for name in (policy, best, CLAIRVOYANT)
        )
        return headroom_share(mine, reference, bound, self.objective.sign)

    def headroom_text(self, policy: str, load: float) -> str:
        """Return that share as tables show it, in per cent."""
        found = self.headroom(policy, load)
        return "-" if np.isnan(found.value) else with_interval(found, ".0f", 100.0)

    def against_text(self, policy: str, reference: str, load: float) -> str:
        """Return such a comparison as tables show it."""
        objective = self.objective
        found = self.against(policy, reference, load)
        return with_interval(found, objective.form, objective.factor)


def evaluate(
    scenario: Scenario,
    policies: Sequence[Policy],
    *,
    problem: AnyProblem | None = None,
    loads: Sequence[float] = (1.0,),
    num_seeds: int = 10,
    first_seed: int = FIRST_SEED,
    num_units: int | None = None,
    bound_budget: float = 0.0,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Evaluation:
    """Play every policy on the same episodes.

    Args:
        scenario: What to play.
        policies: What to compare; names must differ.
        problem: What is decided; may be left out for a scenario of `problems.registry`.
        loads: Load factors.
        num_seeds: Episodes per load; those that would be played again are left out.
        first_seed: Their seeds count from here.
        num_units: Requests or jobs per episode, else the scenario's own.
        bound_budget: Simulation that an offline search which knows the future may take for an
            episode, in whole episodes; 0: there is none.
        progress: Called with what is done and the share of the work.
    """
    problem = problem or problem_of(scenario)
    result = planned(
        problem, scenario, policies, loads, num_seeds, first_seed, num_units, bound_budget
    )
    seeds, loads = result.seeds, result.loads
    done = 0
    for load in loads:
        episodes = problem.episodes(scenario, seeds, load=load, num_units=num_units)
        for policy in policies:
            progress(f"{policy.name} at load {load:g}", done / (len(loads) * len(policies)))
            metrics, trail = episodes.play(policy, seed=first_seed)
            result.trails[policy.name, load] = trail
            for seed, found in zip(seeds, metrics, strict=True):
                result.runs.append(Run(policy.name, load, seed, found))
            if policy.name not in result.decision_s:
                taken = episodes.time_decisions(policy)
                result.decision_s[policy.name] = (
                    float(np.median(taken)),
                    float(np.percentile(taken, 99)),
                )
            done += 1
        if bound_budget > 0:
            progress(f"{CLAIRVOYANT} at load {load:g}", done / (len(loads) * len(policies)))
            _add_bound(result, load, episodes, policies, first_seed)
    if bound_budget > 0:
        result.policies.append((CLAIRVOYANT, "oracle"))
    progress("done", 1.0)
    return result


def planned(
    problem: AnyProblem,
    scenario: Scenario,
    policies: Sequence[Policy],
    loads: Sequence[float],
    num_seeds: int,
    first_seed: int,
    num_units: int | None,
    bound_budget: float = 0.0,
) -> Evaluation:
    """Return an evaluation of which nothing is played yet; for the arguments see `evaluate`.

    Raises:
        ConfigError: If something is missing or is there twice.
    """
    names = [p.name for p in policies] + [CLAIRVOYANT] * (bound_budget > 0)
    if len(set(names)) < len(names):
        raise ConfigError(f"every policy needs its own name, got {', '.join(names)}")
    if not policies:
        raise ConfigError("there must be at least one policy to evaluate, got none")
    if not loads or len(set(loads)) < len(loads):
        raise ConfigError(f"loads must be given, each once, got {list(loads)}")
    if num_seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {num_seeds}")
    asked = [first_seed + i for i in range(num_seeds)]
    seeds, played, notes = plan(problem, scenario, asked, loads, num_units)
    return Evaluation(
        problem,
        scenario,
        [(p.name, p.information) for p in policies],
        played,
        seeds,
        seeds_asked=num_seeds,
        notes=notes,
        learned=[p.name for p in policies if problem.is_learned(p)],
        bound_budget=bound_budget,
    )


def _add_bound(
    result: Evaluation,
    load: float,
    episodes: Episodes[Policy],
    policies: Sequence[Policy],
    seed: int,
) -> None:
    """Search, from what the best policies did at a load, and note what was found."""
    order = [name for name, _ in result.ranking(load)]
    ranked = sorted(policies, key=lambda policy: order.index(policy.name))
    found, trail = episodes.clairvoyant(ranked[:NUM_STARTS], budget=result.bound_budget, seed=seed)
    result.trails[CLAIRVOYANT, load] = trail
    for of_seed, metrics in zip(result.seeds, found, strict=True):
        result.runs.append(Run(CLAIRVOYANT, load, of_seed, metrics))
