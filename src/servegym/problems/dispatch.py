"""Dispatch: which replica gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from servegym.baselines.registry import RULES
from servegym.baselines.rules import Rules
from servegym.clairvoyant.dispatch import best_choices, replay
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec
from servegym.export.resolve import (
    dispatch_parts,
    resolve_dispatch,
    second_rules,
)
from servegym.policy import run_kept as kept
from servegym.policy import run_migrating as migrating
from servegym.policy import run_placed as placed
from servegym.policy.migrating import Migrating
from servegym.policy.online import OnlinePolicy
from servegym.policy.ordering import OrderingRule
from servegym.policy.pair import Pair
from servegym.policy.placed import Placed
from servegym.policy.policy import Heuristic, Policy
from servegym.policy.retention import Kept
from servegym.policy.run import run, time_decisions
from servegym.policy.run_pair import make_simulator, run_pair, time_pair
from servegym.problems.partings import find_partings, partings_section
from servegym.problems.problem import Played, Section
from servegym.problems.problem import Scenario as AnyScenario
from servegym.problems.requests import OBJECTIVES, RequestEpisodes, RequestProblem
from servegym.scenario import Scenario
from servegym.typing import FloatArray

#: Compared where requests are placed, too.
_PLACED = (
    "random+least-outstanding",
    "round-robin+least-outstanding",
    "token-least-load+min-kv",
    "sglang+power-of-two",
    "splitwise+splitwise",
    "llm-d-pd+llm-d",
    "dynamo+least-outstanding",
    "prefix-load+least-tpot",
    "conductor+least-tpot",
    "conductor-predicted+least-tpot",
    "added-delay+least-tpot",
    "class-aware+least-tpot",
)

#: Compared where requests migrate: what each kind of move brings.
_MIGRATING = (
    "random+stay",
    "random+freeness",
    "least-outstanding+stay",
    "least-outstanding+freeness",
    "llumnix+stay",
    "llumnix+queued-only",
    "llumnix+freeness",
    "llumnix+freeness-waiting",
    "added-delay+stay",
    "added-delay+freeness",
    "added-delay+freeness-waiting",
    "class-aware+freeness-waiting",
)

#: What is compared where there are tiers behind the GPUs: usual dispatches, and what the best of
#: them does with other rules for the KV of ended turns.
_KEPT = (
    "random",
    "round-robin",
    "least-outstanding",
    "token-least-load",
    "sglang",
    "llm-d",
    "dynamo",
    "prefix-load",
    "added-delay",
    "prefix-load+lru",
    "prefix-load+ttl",
    "prefix-load+lognormal",
    "prefix-load+offload-within",
    "prefix-load+by-tool",
    "prefix-load+belady",
)

#: What is compared where engines take orders: good dispatches with a good order, what the order
#: brings, and what other orders do.
_PAIRS = (
    "random+fcfs",
    "least-outstanding+fcfs",
    "least-outstanding+srpt",
    "least-outstanding+edf",
    "least-outstanding+footprint",
    "mct+footprint",
    "prefix-load+footprint",
    "min-kv+footprint",
    "added-delay+fcfs",
    "added-delay+footprint",
    "class-aware+footprint",
    "least-outstanding+footprint-oracle",
)


class DispatchEpisodes(RequestEpisodes[Policy | Pair]):
    """Episodes of requests that a policy sends to replicas; a pair also orders them there."""

    def run(self, policy: Policy | Pair, *, seed: int = 0, record: bool = False) -> Simulator:
        """Play all episodes and return the simulator that did."""
        if isinstance(policy, Pair):
            simulator = make_simulator(self.scenario.spec, self.episodes, policy, record=record)
            run_pair(simulator, policy, seed=seed)
            return simulator
        if isinstance(policy, Placed):
            simulator = placed.make_simulator(self.scenario.spec, self.episodes, record=record)
            placed.run_placed(simulator, policy, seed=seed)
            return simulator
        if isinstance(policy, Kept):
            simulator = kept.make_simulator(self.scenario.spec, self.episodes, record=record)
            kept.run_kept(simulator, policy, seed=seed)
            return simulator
        if isinstance(policy, Migrating):
            simulator = migrating.make_simulator(
                self.scenario.spec, self.episodes, policy, record=record
            )
            migrating.run_migrating(simulator, policy, seed=seed)
            return simulator
        simulator = Simulator(self.scenario.spec, self.episodes, record=record)
        run(simulator, policy, seed=seed)
        return simulator

    def clairvoyant(
        self, starts: Sequence[Policy | Pair], *, budget: float, seed: int = 0
    ) -> Played:
        """See `Episodes.clairvoyant`: a search through assignments of requests to replicas.

        In a disaggregated fleet they say where requests decode, too, and where requests may be
        held, for how long; where requests migrate they do by the rule of the best of `starts` whose
        rule the core plays. No assignment tells in which order engines took requests: where the
        best of `starts` is better than what was found, it is that.
        """
        metric = OBJECTIVES[self.scenario.objective].metric
        runs = [self.run(policy, seed=seed, record=True) for policy in starts]
        spec = self._moving_by(starts, runs)
        choices = best_choices(spec, self.episodes, runs, metric, budget=budget, seed=seed)
        return self._best_played([replay(spec, self.episodes, choices), *runs])

    def _moving_by(self, starts: Sequence[Policy | Pair], runs: Sequence[Simulator]) -> ClusterSpec:
        """Return the cluster, whose requests migrate by the best rule of some runs."""
        objective = OBJECTIVES[self.scenario.objective]
        ruled = [
            (
                objective.sign
                * np.mean([m[objective.metric] for m in self._played(simulator).metrics]),
                policy.spec(self.scenario.spec),
            )
            for policy, simulator in zip(starts, runs, strict=True)
            if isinstance(policy, Migrating) and policy.rule.weights is None
        ]
        return min(ruled, key=lambda one: one[0])[1] if ruled else self.scenario.spec

    def time_decisions(self, policy: Policy | Pair) -> FloatArray:
        """Measure single decisions in the first episode, seconds, `float64[n]`."""
        if isinstance(policy, Pair):
            return time_pair(policy, make_simulator(self.scenario.spec, self.episodes[:1], policy))
        spec = self.scenario.spec
        if isinstance(policy, Migrating):
            spec, policy = policy.spec(spec), policy.dispatch
        return time_decisions(policy, Simulator(spec, self.episodes[:1]))


class Dispatch(RequestProblem[Policy | Pair]):
    """Which replica gets a request, or whether it is held or rejected.

    Where all engines go by priorities, a policy may have an order for them: `DISPATCH+ORDER`.
    Where some replicas only prefill, a rule may say where their requests decode:
    `DISPATCH+PLACEMENT`. Where requests migrate, one may say which: `DISPATCH+MIGRATION`. And one
    may say what becomes of the KV of ended turns: `DISPATCH+RETENTION`.
    """

    name = "dispatch"
    decides = "which replica gets a request"
    rules = RULES
    default_policies = (
        "random",
        "round-robin",
        "least-outstanding",
        "power-of-two",
        "speed-family",
        "token-least-load",
        "least-work-left",
        "sglang",
        "llm-d",
        "dynamo",
        "prefix-load",
        "added-delay",
        "added-delay-inferred",
        "class-aware",
        "hexgen",
        "mct",
        "mct-oracle",
    )
    default_policy = "prefix-load"
    episodes_class = DispatchEpisodes

    @override
    def compared(self, scenario: Scenario) -> tuple[str, ...]:
        if scenario.orders_fleet:
            return _PAIRS
        if scenario.spec.migrates:
            return _MIGRATING
        if scenario.spec.disaggregated:
            return _PLACED
        return _KEPT if scenario.spec.tiered else self.default_policies

    def owns(self, scenario: AnyScenario) -> bool:
        """Whether a scenario is of requests that can go to one replica or another."""
        return isinstance(scenario, Scenario) and not scenario.orders_requests

    def resolve(self, text: str) -> Policy | Pair:
        """Return a rule, a learned policy by its file, a pair, or one by its folder."""
        return resolve_dispatch(text)

    def parts(self, text: str) -> list[tuple[Rules[Any], str]]:
        """Of which rules a policy is put together, with the text of each."""
        dispatch, *more = dispatch_parts(text)
        others: list[tuple[Rules[Any], str]] = [(second_rules(part), part) for part in more]
        return [(RULES, dispatch), *others]

    def is_learned(self, policy: Policy | Pair) -> bool:
        """Whether a policy is no rule, nor made of rules alone."""
        if isinstance(policy, Pair):
            return self.is_learned(policy.dispatch) or not isinstance(policy.order, OrderingRule)
        if isinstance(policy, Placed):
            return policy.learned or self.is_learned(policy.dispatch)
        if isinstance(policy, Migrating):
            return policy.rule.weights is not None or self.is_learned(policy.dispatch)
        if isinstance(policy, Kept):
            return policy.retention.learned or self.is_learned(policy.dispatch)
        if isinstance(policy, Heuristic):
            return policy.learned
        return not isinstance(policy, OnlinePolicy)

    @override
    def differences(
        self,
        scenario: Scenario,
        learned: Policy | Pair,
        rule: Policy | Pair,
        *,
        seed: int,
        load: float,
        num_units: int | None,
    ) -> Section | None:
        others = Pair | Placed | Migrating | Kept | OnlinePolicy
        if isinstance(learned, others) or isinstance(rule, others):
            return None
        if scenario.spec.moves_kv or scenario.spec.tiered:
            # choices cannot be tried there as if nothing moved
            return None
        episode = scenario.episode(seed, load=load, num_requests=num_units)
        return partings_section(find_partings(scenario, learned, rule, episode))
