"""Policies x loads x seeds, with the same requests under every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.errors import ConfigError
from servegym.evaluate.compare import Difference, Ratio, paired_difference, paired_ratio
from servegym.evaluate.metrics import measure
from servegym.evaluate.repeats import plan_requests
from servegym.policy.ordering import OrderingPolicy, OrderingRule
from servegym.policy.policy import Policy
from servegym.policy.run import run, time_decisions
from servegym.policy.run_ordering import make_simulator, run_ordering, time_orders
from servegym.scenario import Scenario
from servegym.typing import FloatArray
from servegym.workloads.config import TraceConfig
from servegym.workloads.trace import Trace

#: Held-out seeds start here; training and tuning use smaller ones or none.
FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class Run:
    """One policy on one episode."""

    policy: str
    load: float
    seed: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Trail:
    """What plots need of one run."""

    outcomes: NDArray[np.void]
    steps: NDArray[np.void]


@dataclass
class Evaluation:
    """All runs of a comparison.

    Attributes:
        scenario: What was played.
        policies: Name and information class, in the order given.
        loads: Load factors.
        seeds: Seeds of the episodes.
        runs: One per policy, load and seed.
        decision_s: Median and 99th percentile of a decision's time by policy, seconds.
        trails: The first seed's run by (policy, load).
        learned: Names of learned policies, which are compared with the best of the others.
        saturation: Largest load by policy and share of requests within their limits, if searched.
        seeds_asked: How many seeds were asked for; those that play an episode again are left out.
        notes: What that left out, and how far the others are repeats, in sentences.
    """

    scenario: Scenario
    policies: list[tuple[str, str]]
    loads: list[float]
    seeds: list[int]
    runs: list[Run] = field(default_factory=list)
    decision_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    trails: dict[tuple[str, float], Trail] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)
    saturation: dict[str, dict[float, float]] = field(default_factory=dict)
    seeds_asked: int = 0
    notes: list[str] = field(default_factory=list)

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
        workload = self.scenario.played_workload
        return workload.read() if isinstance(workload, TraceConfig) else None

    def values(self, policy: str, load: float, metric: str) -> NDArray[np.float64]:
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

    @property
    def judged_by(self) -> str:
        """The metric of the scenario's objective: mean E2E latency or goodput."""
        return "goodput_rps" if self.scenario.objective == "goodput" else "e2e_mean_s"

    @property
    def judged_name(self) -> str:
        """What tables and figures call that metric."""
        return "goodput" if self.judged_by == "goodput_rps" else "mean E2E"

    def ranking(self, load: float) -> list[tuple[str, str]]:
        """Name and information class of all policies, the best by the objective first."""
        sign = -1 if self.judged_by == "goodput_rps" else 1
        return sorted(self.policies, key=lambda p: sign * self.mean(p[0], load, self.judged_by))

    def best_heuristic(self, load: float) -> str:
        """Name of the best policy that is neither an oracle nor learned."""
        ranked = self.ranking(load)
        rules = [n for n, info in ranked if info != "oracle" and n not in self.learned]
        return (rules or [ranked[0][0]])[0]

    def ratio(self, policy: str, reference: str, load: float, metric: str = "") -> Ratio:
        """Paired ratio of a metric, by default the objective's, policy over reference."""
        metric = metric or self.judged_by
        return paired_ratio(self.values(policy, load, metric), self.values(reference, load, metric))

    def difference(self, policy: str, reference: str, load: float, metric: str = "") -> Difference:
        """Paired difference of a metric, by default the objective's, policy minus reference."""
        metric = metric or self.judged_by
        return paired_difference(
            self.values(policy, load, metric), self.values(reference, load, metric)
        )


def evaluate(
    scenario: Scenario,
    policies: Sequence[Policy | OrderingPolicy],
    *,
    loads: Sequence[float] = (1.0,),
    num_seeds: int = 10,
    first_seed: int = FIRST_SEED,
    num_requests: int | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Evaluation:
    """Play every policy on the same episodes.

    Args:
        scenario: What to play.
        policies: What to compare; names must differ. Orders if the scenario is one engine that
            goes by priorities, else policies of dispatch.
        loads: Factors on the arrival rate.
        num_seeds: Episodes per load; those that would be played again are left out.
        first_seed: Their seeds count from here.
        num_requests: Requests per episode, else the scenario's own.
        progress: Called with what is done and the share of the work.
    """
    names = [p.name for p in policies]
    if len(set(names)) < len(names):
        raise ConfigError(f"every policy needs its own name, got {', '.join(names)}")
    if not policies:
        raise ConfigError("there must be at least one policy to evaluate, got none")
    if not loads or len(set(loads)) < len(loads):
        raise ConfigError(f"loads must be given, each once, got {list(loads)}")
    if num_seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {num_seeds}")
    asked = [first_seed + i for i in range(num_seeds)]
    seeds, loads, notes = plan_requests(scenario, asked, loads, num_requests)
    result = Evaluation(
        scenario,
        [(p.name, p.information) for p in policies],
        loads,
        seeds,
        seeds_asked=num_seeds,
        notes=notes,
        learned=[
            p.name for p in policies if not (hasattr(p, "decide") or isinstance(p, OrderingRule))
        ],
    )
    spec = scenario.spec
    done = 0
    for load in loads:
        episodes = [scenario.episode(s, load=load, num_requests=num_requests) for s in seeds]
        for policy in policies:
            progress(f"{policy.name} at load {load:g}", done / (len(loads) * len(policies)))
            simulator = _played(spec, episodes, policy, first_seed)
            for env, seed in enumerate(seeds):
                outcomes, steps = simulator.outcomes(env), simulator.steps(env)
                metrics = measure(
                    outcomes, steps, simulator.itl_histogram(env), spec, episodes[env]
                )
                result.runs.append(Run(policy.name, load, seed, metrics))
                if env == 0:
                    result.trails[policy.name, load] = Trail(outcomes, steps)
            if policy.name not in result.decision_s:
                taken = _time(policy, spec, episodes[:1])
                result.decision_s[policy.name] = (
                    float(np.median(taken)),
                    float(np.percentile(taken, 99)),
                )
            done += 1
    progress("done", 1.0)
    return result


def _played(
    spec: ClusterSpec, episodes: list[Episode], policy: Policy | OrderingPolicy, seed: int
) -> Simulator:
    if isinstance(policy, OrderingPolicy):
        simulator = make_simulator(spec, episodes, policy, record=True)
        run_ordering(simulator, policy)
    else:
        simulator = Simulator(spec, episodes, record=True)
        run(simulator, policy, seed=seed)
    return simulator


def _time(
    policy: Policy | OrderingPolicy, spec: ClusterSpec, episodes: list[Episode]
) -> FloatArray:
    if isinstance(policy, OrderingPolicy):
        return time_orders(policy, make_simulator(spec, episodes, policy))
    return time_decisions(policy, Simulator(spec, episodes))
