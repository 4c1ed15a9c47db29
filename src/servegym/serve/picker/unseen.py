"""Policies that go by what is not seen where the gateway sends no answers."""

from __future__ import annotations

from copy import copy

import numpy as np

from servegym.errors import ConfigError
from servegym.policy.contract import (
    FIRST_NOMINAL,
    INFERRED,
    KV_CACHE_USAGE,
    MAX_NUM_SEQS,
    NUM_NOMINAL,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    NUM_UP,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    ReplicaFeature,
)
from servegym.policy.online import OnlinePolicy
from servegym.policy.policy import Observations, Policy
from servegym.serve.loaded_policy import LoadedPolicy
from servegym.typing import FloatArray

#: Plain features that rest on when tokens come; engines do not report the last as one number.
TOKEN_FEATURES = ("recent_ttft_s", "recent_tpot_s", "generated_tokens")
#: Random observations on which a policy is tried, and replicas in them.
_NUM_TRIALS, _WIDTH = 300, 6
_ENV = np.zeros(1, np.int64)


def unseen_features(policy: Policy, ranges: dict[str, FloatArray] | None = None) -> list[str]:
    """Return the features of tokens that a policy's choice goes by.

    Groups of features that are inferred from tokens are known from what the policy asks for. Of the
    plain ones it is tried out: a feature counts if another value of it changes a choice, on
    observations drawn at random.

    Args:
        policy: Which.
        ranges: Of training, by `replicas` and `request`, each `float64[F, 2]`; `None`: of any
            fleet.
    """
    if isinstance(policy, OnlinePolicy):
        return ["what became of each request"]
    rows = (*REPLICA_FEATURES, *REQUEST_FEATURES)
    found = [f.name for f in rows if f.group & INFERRED & policy.needs]
    policy = copy(policy)  # its memory and its draws stay as they are
    rng = np.random.default_rng(0)
    for name in TOKEN_FEATURES:
        row = ReplicaFeature[name.upper()]
        for _ in range(_NUM_TRIALS):
            seen = _draw(rng, ranges)
            other = seen.replicas.copy()
            other[0, row] = rng.permutation(other[0, row]) * rng.uniform(0.0, 3.0, _WIDTH)
            if _choice(policy, seen) != _choice(policy, seen._replace(replicas=other)):
                found.append(name)
                break
    return found


def require_seen(loaded: LoadedPolicy, response: str) -> None:
    """Refuse a policy that goes by what is not seen.

    Args:
        loaded: The policy.
        response: What the gateway sends, for the sentence.

    Raises:
        ConfigError: If it does.
    """
    ranges = loaded.manifest.ranges if loaded.manifest else None
    known = {key: np.array(rows, np.float64) for key, rows in ranges.items()} if ranges else None
    if found := unseen_features(loaded.policy, known):
        raise ConfigError(
            f"{loaded.text} goes by {', '.join(found)}, which nobody knows where the gateway sends "
            f"no bodies of answers (response: {response}): let it send them, or choose a policy "
            "that does without, such as added-delay or llm-d"
        )


def _draw(rng: np.random.Generator, ranges: dict[str, FloatArray] | None) -> Observations:
    replicas = rng.uniform(0.0, 30.0, (NUM_REPLICA_FEATURES, _WIDTH))
    request = rng.uniform(1.0, 500.0, NUM_REQUEST_FEATURES)
    static = slice(FIRST_NOMINAL, FIRST_NOMINAL + NUM_NOMINAL)
    # a fleet whose replicas differ, but not so much that one is always the best
    replicas[static] = np.array([1.0, 8000.0, 0.02, 0.0002, 1e5, 128.0, 2048.0])[
        :, None
    ] * rng.uniform(0.7, 1.0, _WIDTH)
    replicas[MAX_NUM_SEQS] = rng.uniform(1.0, 60.0, _WIDTH)  # some are full
    replicas[KV_CACHE_USAGE] = rng.uniform(0.0, 1.0, _WIDTH)
    replicas[ReplicaFeature["OUTSTANDING_PREDICTED_TOKENS"]] *= 200.0
    replicas[ReplicaFeature["GENERATED_TOKENS"]] *= 100.0
    replicas[[ReplicaFeature["RECENT_TTFT_S"], ReplicaFeature["RECENT_TPOT_S"]]] *= 0.05
    if ranges is not None:
        for array, bounds in ((replicas, ranges["replicas"]), (request, ranges["request"])):
            low, high = bounds[:, 0], bounds[:, 1]
            shape = (_WIDTH, len(low)) if array.ndim == 2 else (len(low),)
            array[: len(low)] = rng.uniform(low, high, shape).T
    replicas[[ReplicaFeature["UP"], ReplicaFeature["PREFILLS"], ReplicaFeature["DECODES"]]] = 1.0
    request[NUM_UP] = _WIDTH
    mask = np.ones(_WIDTH + 2, np.bool_)
    mask[_WIDTH:] = False
    return Observations(replicas[None], request[None], mask[None])


def _choice(policy: Policy, seen: Observations) -> int:
    policy.reset(1, 0)  # the same stream of draws for both
    return int(policy.act(seen, _ENV)[0])
