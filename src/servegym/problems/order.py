"""Order: who is admitted and who is preempted inside one engine."""

from __future__ import annotations

from collections.abc import Sequence

from servegym.baselines.ordering.registry import RULES
from servegym.clairvoyant.order import best_keys, play_keys
from servegym.cluster.simulator import Simulator
from servegym.export.resolve import resolve_order
from servegym.policy.ordering import (
    OrderingPolicy,
    OrderingRule,
)
from servegym.policy.run_ordering import make_simulator, run_ordering, time_orders
from servegym.problems.problem import Played
from servegym.problems.problem import Scenario as AnyScenario
from servegym.problems.requests import OBJECTIVES, RequestEpisodes, RequestProblem
from servegym.scenario import Scenario
from servegym.typing import FloatArray


class OrderEpisodes(RequestEpisodes[OrderingPolicy]):
    """Episodes of requests that a policy orders inside an engine; nothing in it is random."""

    def run(self, policy: OrderingPolicy, *, seed: int = 0, record: bool = False) -> Simulator:
        """Play all episodes and return the simulator that did."""
        simulator = make_simulator(self.scenario.spec, self.episodes, policy, record=record)
        run_ordering(simulator, policy)
        return simulator

    def clairvoyant(
        self, starts: Sequence[OrderingPolicy], *, budget: float, seed: int = 0
    ) -> Played:
        """See `Episodes.clairvoyant`: a search through fixed priorities of the requests.

        An order that looks again before each step has no such priorities: where the best of
        `starts` is better than what was found, it is that.
        """
        spec, metric = self.scenario.spec, OBJECTIVES[self.scenario.objective].metric
        keys = best_keys(spec, self.episodes, metric, budget=budget, seed=seed)
        runs = [play_keys(spec, self.episodes, keys)]
        runs += [self.run(policy, seed=seed, record=True) for policy in starts]
        return self._best_played(runs)

    def time_decisions(self, policy: OrderingPolicy) -> FloatArray:
        """Measure single orders in the first episode, seconds, `float64[n]`."""
        return time_orders(policy, make_simulator(self.scenario.spec, self.episodes[:1], policy))


class Order(RequestProblem[OrderingPolicy]):
    """In which order one engine admits its requests, and in which it preempts them."""

    name = "order"
    decides = "who is admitted and who is preempted inside one engine"
    rules = RULES
    default_policies = (*RULES, "srpt-oracle")
    default_policy = "fcfs"
    episodes_class = OrderEpisodes

    def owns(self, scenario: AnyScenario) -> bool:
        """Whether a scenario is of one engine that goes by priorities."""
        return isinstance(scenario, Scenario) and scenario.orders_requests

    def resolve(self, text: str) -> OrderingPolicy:
        """Return an order by name and parameters, or a learned one by its file."""
        return resolve_order(text)

    def is_learned(self, policy: OrderingPolicy) -> bool:
        """Whether a policy is no rule."""
        return not isinstance(policy, OrderingRule)
