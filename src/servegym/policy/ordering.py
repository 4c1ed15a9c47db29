"""The contract inside an engine: what it can say about its requests, and how they are ordered.

An ordering policy gives every request of one engine a score before a step. Among the waiting ones
the lowest score is admitted first, among the running ones the highest is preempted first; the two
sets are disjoint, so a policy may score them on different scales. Equal scores fall back on the
arrival time, as in vLLM: the earlier is admitted first, the later is preempted first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np

from servegym.policy.contract import NO_BOUND, Feature, Group
from servegym.policy.policy import Information
from servegym.typing import FloatArray

ORDERING_SCHEMA_VERSION = 1

#: Stands for "no limit" in `ttft_slack_s` and `deadline_slack_s`.
NO_LIMIT_S = 1e6


def _feature(name: str, low: float, high: float, unit: str, meaning: str) -> Feature:
    return Feature(name, low, high, unit, Group.COUNTERS, meaning)


#: One row of `features` holds these for one request; the last ones are the engine's, the same in
#: every row.
ORDERING_FEATURES: tuple[Feature, ...] = (
    _feature("is_running", 0, 1, "-", "1 in the running list, 0 in the waiting queue"),
    _feature("computed_tokens", 0, NO_BOUND, "tokens", "tokens in the KV cache"),
    _feature("generated_tokens", 0, NO_BOUND, "tokens", "output tokens so far"),
    _feature("kv_blocks", 0, NO_BOUND, "blocks", "KV blocks its computed tokens fill"),
    _feature(
        "client_priority",
        -NO_BOUND,
        NO_BOUND,
        "-",
        "its client's; lower is more urgent",
    ),
    _feature("prompt_tokens", 1, NO_BOUND, "tokens", "prompt length"),
    _feature(
        "predicted_remaining_tokens",
        1,
        NO_BOUND,
        "tokens",
        "predicted output tokens less the generated ones, at least 1",
    ),
    _feature("waited_s", 0, NO_BOUND, "s", "since it arrived"),
    _feature("idle_s", 0, NO_BOUND, "s", "since it arrived or was preempted, 0 while running"),
    _feature("num_preemptions", 0, NO_BOUND, "-", "how often it was preempted"),
    _feature(
        "ttft_slack_s",
        -NO_BOUND,
        NO_LIMIT_S,
        "s",
        "time left to its TTFT limit, 1e6 without one or after the first token",
    ),
    _feature(
        "deadline_slack_s",
        -NO_BOUND,
        NO_LIMIT_S,
        "s",
        "time left to its E2E limit, 1e6 without one",
    ),
    _feature("num_running", 0, NO_BOUND, "requests", "requests in the engine's running list"),
    _feature("num_waiting", 0, NO_BOUND, "requests", "requests in its waiting queue"),
    _feature("kv_cache_usage", 0, 1, "-", "share of its KV blocks held"),
    _feature("step_s", 0, NO_BOUND, "s", "moving average of its step times (weight 0.05)"),
    _feature("max_num_batched_tokens", 1, NO_BOUND, "tokens", "token budget of a step"),
)

NUM_ORDERING_FEATURES = len(ORDERING_FEATURES)

#: Column of each feature, plain for kernels: `features[:, WAITED_S]`.
(
    IS_RUNNING,
    COMPUTED_TOKENS,
    GENERATED_TOKENS,
    KV_BLOCKS,
    CLIENT_PRIORITY,
    PROMPT_TOKENS,
    PREDICTED_REMAINING_TOKENS,
    WAITED_S,
    IDLE_S,
    NUM_PREEMPTIONS,
    TTFT_SLACK_S,
    DEADLINE_SLACK_S,
    NUM_RUNNING,
    NUM_WAITING,
    KV_CACHE_USAGE,
    STEP_S,
    MAX_NUM_BATCHED_TOKENS,
) = range(NUM_ORDERING_FEATURES)

#: The same by name, e.g. `OrderingFeature["WAITED_S"]`.
OrderingFeature = IntEnum(  # type: ignore[misc]
    "OrderingFeature", [(f.name.upper(), i) for i, f in enumerate(ORDERING_FEATURES)]
)


@runtime_checkable
class OrderingPolicy(Protocol):
    """Says who is admitted first and who is preempted first."""

    @property
    def name(self) -> str:
        """Name of the policy in tables."""
        ...

    @property
    def information(self) -> Information:
        """What it may know; printed with every result."""
        ...

    @property
    def memory_size(self) -> int:
        """How many numbers it keeps of each request from step to step."""
        ...

    def score(self, features: FloatArray, memory: FloatArray) -> FloatArray:
        """Score the requests of an engine.

        Called once before every step; a policy with a memory sees all requests each time.

        Args:
            features: `float64[n, NUM_ORDERING_FEATURES]`, one row a request.
            memory: What it keeps of each of them, `float64[n, memory_size]`, 0 at first; written
                in place.

        Returns:
            `float64[n]`: of the waiting ones the lowest is admitted first, of the running ones
            the highest is preempted first.
        """
        ...


#: A rule as a plain function: `order(features[n, F], memory[n, m], params[p]) -> scores[n]`.
Order = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]


@dataclass(frozen=True)
class OrderingRule:
    """An ordering policy given as a function of arrays.

    Attributes:
        name: Name in tables.
        information: Information class.
        order: The rule.
        params: Its tunable numbers, `float64[p]`.
        param_names: Their names.
        memory_size: How many numbers it keeps of each request.
        reference: Where the rule comes from.
    """

    name: str
    information: Information
    order: Order
    params: FloatArray = field(default_factory=lambda: np.zeros(0))
    param_names: tuple[str, ...] = ()
    memory_size: int = 0
    reference: str = ""

    def score(self, features: FloatArray, memory: FloatArray) -> FloatArray:
        """Apply the rule; see `OrderingPolicy.score`."""
        return self.order(features, memory, self.params)


def prefill_left_s(features: FloatArray) -> FloatArray:
    """Estimate the time until each request's next token, if it is given the whole budget.

    Args:
        features: `float64[n, NUM_ORDERING_FEATURES]`.

    Returns:
        Seconds, `float64[n]`: as many steps of the recent duration as its tokens not in the KV
        cache need; one step for a decoding request.
    """
    uncomputed = (
        features[:, PROMPT_TOKENS] + features[:, GENERATED_TOKENS] - features[:, COMPUTED_TOKENS]
    )
    steps: FloatArray = np.maximum(np.ceil(uncomputed / features[:, MAX_NUM_BATCHED_TOKENS]), 1.0)
    return steps * features[:, STEP_S]


def remaining_s(features: FloatArray) -> FloatArray:
    """Estimate the time until each request ends, if it is never held up.

    Args:
        features: `float64[n, NUM_ORDERING_FEATURES]`.

    Returns:
        Seconds, `float64[n]`: the next token, then a step for each predicted further one.
    """
    further = (features[:, PREDICTED_REMAINING_TOKENS] - 1.0) * features[:, STEP_S]
    total: FloatArray = prefill_left_s(features) + further
    return total
