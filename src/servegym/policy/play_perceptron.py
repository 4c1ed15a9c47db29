"""Whole episodes under many perceptrons in compiled code, for a search over their weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, NEVER, WHERE_IT_MATTERS, Asks, Params, State
from servegym.policy.learned_ordering import CLIP
from servegym.policy.ordering import (
    GENERATED_TOKENS,
    NUM_ORDERING_FEATURES,
    PREDICTED_REMAINING_TOKENS,
    PROMPT_TOKENS,
)
from servegym.policy.ordering_rows import write_row
from servegym.policy.run_ordering import require_one_engine
from servegym.typing import FloatArray


class Perceptrons(NamedTuple):
    """Perceptrons with one hidden layer, as `learned_ordering.OrderingWeights` has one.

    Those of orders have two heads, of a waiting request and of a running one.

    Attributes:
        mean: `float64[F]`, the same for all.
        scale: `float64[F]`.
        hidden: `float64[C, F, H]`.
        hidden_bias: `float64[C, H]`.
        out: `float64[C, H, heads]`.
    """

    mean: FloatArray
    scale: FloatArray
    hidden: FloatArray
    hidden_bias: FloatArray
    out: FloatArray

    @classmethod
    def zeros(cls, inputs: int, hidden: int, heads: int) -> Perceptrons:
        """Make one that scores everything 0."""
        return cls(
            np.zeros(inputs),
            np.ones(inputs),
            np.zeros((1, inputs, hidden)),
            np.zeros((1, hidden)),
            np.zeros((1, hidden, heads)),
        )


class Orders(NamedTuple):
    """Orders of requests: what a perceptron says, and powers of what a request will hold.

    Attributes:
        powers: As `learned_ordering.OrderingWeights.powers`, `float64[C, 2, 2]`.
        nets: Of two heads.
    """

    powers: FloatArray
    nets: Perceptrons

    @classmethod
    def of(cls, nets: Perceptrons) -> Orders:
        """Order by perceptrons alone."""
        return cls(np.zeros((len(nets.hidden), 2, 2)), nets)


@inlined
def perceptron(n: Perceptrons, c: int, x: FloatArray, head: int) -> float:
    """Return what a head of one of them makes of its inputs, `float64[F]`."""
    total = 0.0
    for h in range(n.hidden.shape[2]):
        unit = n.hidden_bias[c, h]
        for k in range(x.shape[0]):
            unit += x[k] * n.hidden[c, k, h]
        if unit > 0.0:
            total += unit * n.out[c, h, head]
    return total


@inlined
def held_score(o: Orders, c: int, row: FloatArray, head: int) -> float:
    """Return what the powers of an order add to the score of a request, its row as it is."""
    by_left, by_held = o.powers[c, head, 0], o.powers[c, head, 1]
    total = 0.0
    if by_left != 0.0 or by_held != 0.0:
        left = row[PREDICTED_REMAINING_TOKENS]
        held = row[PROMPT_TOKENS] + row[GENERATED_TOKENS] + 0.5 * left
        total = by_left * math.log(left) + by_held * math.log(held)
    return total


@inlined
def score_row(n: Perceptrons, c: int, row: FloatArray, head: int) -> float:
    """Score one request; its row, `float64[NUM_ORDERING_FEATURES]`, is normalised in place."""
    for k in range(row.shape[0]):
        x = math.copysign(math.log1p(abs(row[k])), row[k])
        row[k] = min(max((x - n.mean[k]) / n.scale[k], -CLIP), CLIP)
    return perceptron(n, c, row, head)


@inlined
def order_engine(p: Params, s: State, e: int, o: Orders, c: int, row: FloatArray) -> None:
    """Write the keys of all requests of the engine that asks.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        o: Who orders the requests.
        c: Which of them.
        row: Room for a request's features, `float64[NUM_ORDERING_FEATURES]`.
    """
    r = s.env[e].asking
    for running in range(2):
        request = s.replica[e, r].run_head if running else s.replica[e, r].wait_head
        while request >= 0:
            write_row(p, s, e, r, request, running > 0, row)
            held = held_score(o, c, row, running)
            s.order[e, request].key = held + score_row(o.nets, c, row, running)
            request = s.request[e, request].next_request


@kernel
def _play(p: Params, s: State, o: Orders, first: int, stop: int, per: int, row: FloatArray) -> None:
    """Play environments `first..stop-1` to their ends, `per` of them under each order."""
    for e in range(first, stop):
        while advance(p, s, e) == DECISION:
            order_engine(p, s, e, o, e // per, row)
            apply(p, s, e, 0)


def play_perceptrons(
    spec: ClusterSpec, episodes: Sequence[Episode], nets: Perceptrons, num_threads: int = 1
) -> Simulator:
    """Play the same episodes under every perceptron.

    Args:
        spec: The cluster.
        episodes: What is played.
        nets: Who orders the requests.
        num_threads: Threads that share the work.

    Returns:
        The simulator, all episodes at their ends: those of the first perceptron, then the next's.
    """
    per, count = len(episodes), len(nets.hidden)
    asks = Asks(dispatch=NEVER, order=WHERE_IT_MATTERS)
    simulator = Simulator(spec, list(episodes) * count, asks=asks)
    require_one_engine(simulator)
    orders = Orders.of(nets)
    edges = np.linspace(0, per * count, num_threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [
            pool.submit(
                _play,
                simulator.params,
                simulator.state,
                orders,
                *pair,
                per,
                np.empty(NUM_ORDERING_FEATURES),
            )
            for pair in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()
    return simulator
