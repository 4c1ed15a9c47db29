"""Dispatch: which replica gets a request."""

from __future__ import annotations

from servegym.baselines.registry import RULES
from servegym.cluster.simulator import Simulator
from servegym.export.manifest import Contract, contract_of
from servegym.export.resolve import resolve_policy
from servegym.policy.policy import Heuristic, Policy
from servegym.policy.run import run, time_decisions
from servegym.problems.problem import Scenario as AnyScenario
from servegym.problems.requests import RequestEpisodes, RequestProblem
from servegym.scenario import Scenario
from servegym.typing import FloatArray


class DispatchEpisodes(RequestEpisodes[Policy]):
    """Episodes of requests that a policy sends to replicas."""

    def run(self, policy: Policy, *, seed: int = 0, record: bool = False) -> Simulator:
        """Play all episodes and return the simulator that did."""
        simulator = Simulator(self.scenario.spec, self.episodes, record=record)
        run(simulator, policy, seed=seed)
        return simulator

    def time_decisions(self, policy: Policy) -> FloatArray:
        """Measure single decisions in the first episode, seconds, `float64[n]`."""
        return time_decisions(policy, Simulator(self.scenario.spec, self.episodes[:1]))


class Dispatch(RequestProblem[Policy]):
    """Which replica gets a request, or whether it is held or rejected."""

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

    def contract(self) -> Contract:
        """Features of the replicas and of the request."""
        return contract_of(self.name)

    def owns(self, scenario: AnyScenario) -> bool:
        """Whether a scenario is of requests that can go to one replica or another."""
        return isinstance(scenario, Scenario) and not scenario.orders_requests

    def resolve(self, text: str) -> Policy:
        """Return a rule by name and parameters, or a learned policy by its `.onnx` file."""
        return resolve_policy(text)

    def is_learned(self, policy: Policy) -> bool:
        """Whether a policy is no rule."""
        return not isinstance(policy, Heuristic)
