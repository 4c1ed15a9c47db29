"""Data-parallel ranks that share the experts of a mixture, played in lockstep.

Each rank has its own queue and KV cache, and computes attention for its own requests. In every
layer the ranks exchange their tokens, compute their share of the experts for the tokens of all,
and give them back; so that layer by layer all wait for the slowest, and their steps begin and end
together. A rank with nothing to do takes part with one dummy token. A step small enough for a CUDA
graph pads every rank to the graph of the fullest one.

How tokens fall on experts decides what that costs. Decodes are one token each of many texts, and
mixtures are trained to spread those evenly. A chunk is hundreds of tokens of one text, and Qwen3's
are not held to spread a single text evenly (global-batch balancing: Qiu et al., ACL 2025), so that
one rank has more of it than others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from servegym.cluster.engine import end_step, form_step
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DECODE, DISPATCH, DONE, IDLE, LOG_FULL, STEP, Params, State
from servegym.cluster.steptime import decode_span_s, dense_s, locate
from servegym.costs.step import StepCost
from servegym.typing import FloatArray, IntArray

_KNOTS = np.unique(np.round(np.geomspace(1, 65536, 97)))
_ACTIVATION_BYTES = 2.0
#: Tokens of the fullest rank over those of the mean one, by the number of ranks, under the skewed
#: routing of AIConfigurator's benchmarks (power law, exponent 1.2): medians over its tables of
#: experts split over ranks, against even routing split likewise. `scripts/fit-hot-ranks`
_HOT_RANKS, _HOT = np.log([1.0, 2.0, 4.0, 8.0, 16.0]), (1.0, 1.15, 1.34, 1.56, 1.9)


@dataclass(frozen=True)
class SharedCost:
    """What all ranks of a step do together.

    Attributes:
        tokens: Knots, ascending, `float64[n]`.
        experts_s: Seconds of a rank's share of the experts in a step of decodes, by the tokens of
            all ranks, `float64[n]`.
        skewed_experts_s: Likewise of the fullest rank in a step with chunks, `float64[n]`.
        exchange_s: Seconds in which tokens go to all ranks and come back, by the tokens of the
            fullest rank, `float64[n]`.
        largest_graph: Most tokens of a rank for which there is a CUDA graph.
    """

    tokens: FloatArray
    experts_s: FloatArray
    skewed_experts_s: FloatArray
    exchange_s: FloatArray
    largest_graph: int

    @classmethod
    def of(cls, cost: StepCost, num_ranks: int, max_num_seqs: int) -> SharedCost:
        """Take the shared terms of a step cost over so many ranks.

        Ranks with more tokens than others send them one rank at a time (vLLM's `all_gatherv` and
        `reduce_scatterv`), so the fullest decides: the exchange takes what it would with that many
        tokens on every rank. Activations go there and back, router logits there, two bytes each.
        """
        model, gather_s = cost.model, cost.operators.all_gather_s
        skewed = replace(cost, routing="skewed")
        hot = float(np.interp(math.log(num_ranks), _HOT_RANKS, _HOT))

        def exchange_s(tokens: float) -> float:
            there_and_back = 2.0 * gather_s(
                _ACTIVATION_BYTES * num_ranks * tokens * model.hidden, num_ranks
            )
            logits = gather_s(_ACTIVATION_BYTES * num_ranks * tokens * model.num_experts, num_ranks)
            return model.layers * (there_and_back + logits)

        return cls(
            tokens=_KNOTS,
            experts_s=np.array([cost.terms(t)["experts"] / num_ranks for t in _KNOTS]),
            skewed_experts_s=np.array(
                [skewed.terms(hot * t)["experts"] / num_ranks for t in _KNOTS]
            ),
            exchange_s=np.array([exchange_s(t) for t in _KNOTS]),
            # what vLLM records unless told otherwise
            largest_graph=min(512, 2 * max_num_seqs),
        )


def play_ranks(simulator: Simulator, shared: SharedCost, concurrency: int = 0) -> None:
    """Play all requests of environment 0 to their ends on replicas that are such ranks.

    A request goes to the rank with the smallest sum of running and four times its waiting
    requests, as in vLLM's coordinator.

    Args:
        simulator: Its replicas' grids hold what a rank computes by itself.
        shared: What comes on top.
        concurrency: Clients, each of which sends a request when its last one has ended; 0: all
            requests have arrival times.
    """
    end_s = np.array([math.inf])
    released = np.array([concurrency or simulator.state.request.shape[1]])
    state = simulator.state
    while True:
        reason = _play(
            simulator.params,
            state,
            0,
            end_s,
            released,
            shared.tokens,
            shared.experts_s,
            shared.skewed_experts_s,
            shared.exchange_s,
            shared.largest_graph,
        )
        if reason != LOG_FULL:
            return
        simulator.grow_logs()
        state = simulator.state


@kernel
def _play(
    p: Params,
    s: State,
    e: int,
    end_s: FloatArray,
    released: IntArray,
    knots: FloatArray,
    experts_s: FloatArray,
    skewed_experts_s: FloatArray,
    exchange_s: FloatArray,
    largest_graph: int,
) -> int:
    """Play until all requests have ended (`DONE`) or a log is full.

    What outlasts a call: `end_s` of the joint step, and the number of requests `released`, those
    with an arrival time; the others get one when a request ends.
    """
    env = s.env[e]
    num_ranks = env.num_replicas
    room = 4 * s.request.shape[1] + 8
    while env.num_ended < env.num_requests:
        if p.record and s.log.shape[1] - max(env.log_len, env.step_len) < room:
            return LOG_FULL
        arrival_s = math.inf
        if env.next_arrival < min(released[0], env.num_requests):
            arrival_s = s.request[e, env.next_arrival].arrival_s
        if end_s[0] > arrival_s:
            env.now_s = arrival_s
            env.decision = DISPATCH
            env.deciding = env.next_arrival
            env.next_arrival += 1
            env.in_system += 1
            best, least = 0, 1 << 60
            for r in range(num_ranks):
                score = 4 * s.replica[e, r].num_waiting + s.replica[e, r].num_running
                if score < least:
                    best, least = r, score
            apply(p, s, e, best)
            if end_s[0] == math.inf:  # all were idle: requests of the same instant come first
                end_s[0] = np.nextafter(arrival_s, math.inf)
            continue
        now_s = end_s[0]
        env.now_s = now_s
        slowest_s, fullest, tokens, busy, chunks = 0.0, 1, 0, False, False
        for r in range(num_ranks):
            v = s.replica[e, r]
            if v.mode == STEP or v.mode == DECODE:
                ended = env.num_ended
                end_step(p, s, e, r, now_s)
                for _ in range(env.num_ended - ended):
                    if released[0] < env.num_requests:
                        s.request[e, released[0]].arrival_s = now_s
                        released[0] += 1
        for r in range(num_ranks):
            form_step(p, s, e, r, now_s)
            v = s.replica[e, r]
            own_s = dense_s(p, v.type_idx, 1)
            mine = 1
            if v.mode != IDLE:
                busy = True
                mine = v.num_decodes
                request = v.first_prefill
                while request >= 0:
                    chunks = True
                    mine += s.request[e, request].chunk
                    request = s.request[e, request].next_request
            if v.mode == DECODE:
                v.seg_steps = 1  # the others may have other work in the next step
                kv_tokens = v.kv_tokens + v.num_decodes
                own_s = decode_span_s(p, v.type_idx, v.num_decodes, kv_tokens, 1)
            elif v.mode == STEP:
                own_s = s.due[e, v.event_pos].time_s - now_s
            slowest_s = max(slowest_s, own_s)
            fullest = max(fullest, mine)
            tokens += mine
        if fullest <= largest_graph:
            fullest = graph_tokens(fullest)
            tokens = num_ranks * fullest
        end_s[0] = math.inf
        if busy:
            together_s = _between(knots, exchange_s, fullest)
            together_s += _between(knots, skewed_experts_s if chunks else experts_s, tokens)
            end_s[0] = now_s + slowest_s + together_s
    return DONE


@inlined
def graph_tokens(tokens: int) -> int:
    """Tokens of the smallest CUDA graph that holds so many, of the sizes that vLLM records."""
    if tokens <= 2:
        return tokens
    if tokens <= 4:
        return 4
    between = 8 if tokens <= 256 else 16
    return -(-tokens // between) * between


@inlined
def _between(knots: FloatArray, values: FloatArray, x: int) -> float:
    i = locate(knots, x)
    return values[i] + (x - knots[i]) / (knots[i + 1] - knots[i]) * (values[i + 1] - values[i])
