"""Whole episodes of fleets under many dispatchers and orders in compiled code, for a search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, DISPATCH, WHERE_IT_MATTERS, Asks, Params, State
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    NUM_REQUEST_FEATURES,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    observed_groups,
)
from servegym.policy.costs import added_delay_s, delay_s, step_s
from servegym.policy.observe import observe
from servegym.policy.ordering import NUM_ORDERING_FEATURES
from servegym.policy.play_perceptron import Orders, Perceptrons, order_engine, perceptron
from servegym.policy.replica_inputs import NUM_INPUTS, write_inputs
from servegym.policy.run_ordering import require_priorities
from servegym.typing import FloatArray

_NEEDS = int(observed_groups(extended=False))


class Dispatchers(NamedTuple):
    """Dispatchers that correct the rule `added-delay` by a perceptron.

    A request goes where `perceptron - weight * cost` is greatest.

    Attributes:
        rule: Weight of the rule's cost, per second, and within it of the delays by prefill and by
            tokens, `float64[C, 3]`.
        nets: Of one head; their inputs are those of `write_inputs`, less `mean`, over `scale`.
    """

    rule: FloatArray
    nets: Perceptrons


@inlined
def charged_s(replicas: FloatArray, request: FloatArray, r: int, rule: FloatArray) -> float:
    """Seconds that rule `added-delay` charges for a replica."""
    others, seq_s = replicas[OUTSTANDING_REQUESTS, r], replicas[DECODE_SEQ_S, r]
    rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
    tokens = request[PREDICTED_OUTPUT_TOKENS]
    new_s = max(request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r], 0.0) / rate
    decode_s = tokens * step_s(replicas[DECODE_STEP_S, r], seq_s, others)
    others_s = delay_s(others, new_s, seq_s, tokens, rule[1], rule[2])
    return added_delay_s(replicas[PENDING_PREFILL_TOKENS, r] / rate, new_s, decode_s, others_s)


@inlined
def _choose(
    s: State, e: int, d: Dispatchers, c: int, request: FloatArray, inputs: FloatArray
) -> int:
    """Return the replica that a dispatcher takes; a hold or a rejection if there is none."""
    replicas, allowed = s.observation[e], s.allowed[e]
    width = replicas.shape[1]
    best, best_score = width if allowed[width] else width + 1, -np.inf
    for r in range(width):
        if allowed[r]:
            write_inputs(replicas, request, r, inputs)
            for k in range(inputs.shape[0]):
                inputs[k] = (inputs[k] - d.nets.mean[k]) / d.nets.scale[k]
            score = perceptron(d.nets, c, inputs, 0)
            score -= d.rule[c, 0] * charged_s(replicas, request, r, d.rule[c])
            if score > best_score:
                best, best_score = r, score
    return best


@kernel
def _play(
    p: Params,
    s: State,
    d: Dispatchers,
    o: Orders,
    first: int,
    stop: int,
    per: int,
    request: FloatArray,
    inputs: FloatArray,
    row: FloatArray,
) -> None:
    """Play environments `first..stop-1` to their ends, `per` of them under each candidate."""
    for e in range(first, stop):
        while advance(p, s, e) == DECISION:
            if s.env[e].decision == DISPATCH:
                observe(p, s, e, _NEEDS, request)
                apply(p, s, e, _choose(s, e, d, e // per, request, inputs))
            else:
                order_engine(p, s, e, o, e // per, row)
                apply(p, s, e, 0)


def play_fleets(
    spec: ClusterSpec,
    episodes: Sequence[Episode],
    dispatchers: Dispatchers,
    orders: Orders,
    num_threads: int = 1,
) -> Simulator:
    """Play the same episodes under every dispatcher and the order beside it.

    Args:
        spec: The cluster.
        episodes: What is played.
        dispatchers: Who says where requests go.
        orders: Who orders the requests of each engine; as many.
        num_threads: Threads that share the work.

    Returns:
        The simulator, all episodes at their ends: those of the first candidate, then the next's.

    Raises:
        ConfigError: If an engine does not go by priorities.
    """
    per, count = len(episodes), len(dispatchers.rule)
    asks = Asks(dispatch=WHERE_IT_MATTERS, order=WHERE_IT_MATTERS)
    simulator = Simulator(spec, list(episodes) * count, asks=asks)
    require_priorities(simulator)
    edges = np.linspace(0, per * count, num_threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [
            pool.submit(
                _play,
                simulator.params,
                simulator.state,
                dispatchers,
                orders,
                *pair,
                per,
                np.zeros(NUM_REQUEST_FEATURES),
                np.empty(NUM_INPUTS),
                np.empty(NUM_ORDERING_FEATURES),
            )
            for pair in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()
    return simulator
