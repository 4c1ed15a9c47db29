"""A dispatcher of few weights as a compiled rule, for searches that play whole episodes.

Rule `added-delay`, `prefix-load`, `added-delay-inferred` or `added-delay-held`, corrected by a
perceptron: what `train.dispatch_space` makes of flat weights, and exports as a network. It decides
as that network does; a test holds both equal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    EXPECTED_TOKENS,
    KV_CAPACITY_TOKENS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    RELATIVE_SPEED,
    STEP_TIME_RATIO,
    WAITED_S,
    Group,
    observed_groups,
)
from servegym.policy.costs import added_delay_s, delay_s, displaced_s, prefix_load_s, step_s
from servegym.policy.play_perceptron import Perceptrons
from servegym.policy.policy import Heuristic
from servegym.policy.replica_inputs import (
    NUM_EXTENDED_INPUTS,
    NUM_INPUTS,
    write_inferred_inputs,
    write_inputs,
    write_router_inputs,
)
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: A rule that can be corrected.
Base = Literal["added-delay", "prefix-load", "added-delay-inferred", "added-delay-held"]
#: All of them.
BASES: tuple[Base, ...] = ("added-delay", "prefix-load", "added-delay-inferred", "added-delay-held")
#: Numbers of each that a search moves, by their places: what is a share stays as it is given, and
#: so does the longest hold.
SEARCHED: dict[Base, tuple[int, ...]] = {
    "added-delay": (0, 1),
    "prefix-load": (0, 1),
    "added-delay-inferred": (0, 1, 4),
    "added-delay-held": (0, 1, 2),
}
#: Where its parameters stand: weight of the rule's cost and the rule's numbers (0 where it has
#: fewer), which rule, what inputs are normalised by, then the units, each with its weights, its
#: bias and its weight in the score, and under a rule that holds in that of a hold.
_NUM_RULE = 8
_BASE, _MEAN = _NUM_RULE, _NUM_RULE + 1
_SHRINK, _OBSERVED, _DISPLACED, _WAIT, _MOST = 3, 4, 5, 6, 7
_PREFIX_LOAD, _HELD = float(BASES.index("prefix-load")), float(BASES.index("added-delay-held"))
#: Where the numbers of each rule stand.
_PLACES: dict[Base, tuple[int, ...]] = {
    "added-delay": (1, 2),
    "prefix-load": (1, 2),
    "added-delay-inferred": (1, 2, _SHRINK, _OBSERVED, _DISPLACED),
    "added-delay-held": (1, 2, _WAIT, _MOST, _SHRINK),
}
_SLOWEST = 1e-6


@inlined
def _added_delay_s(replicas: FloatArray, request: FloatArray, r: int, params: FloatArray) -> float:
    """Seconds that rule `added-delay-inferred` charges for a replica; zeros make `added-delay`."""
    tokens = request[PREDICTED_OUTPUT_TOKENS]
    if params[_SHRINK] > 0.0:
        tokens += params[_SHRINK] * (request[EXPECTED_TOKENS] - tokens)
    others, seq_s = replicas[OUTSTANDING_REQUESTS, r], replicas[DECODE_SEQ_S, r]
    rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
    new = max(request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r], 0.0)
    decode_s = tokens * step_s(replicas[DECODE_STEP_S, r], seq_s, others)
    others_s = delay_s(others, new / rate, seq_s, tokens, params[1], params[2])
    wait_s = replicas[PENDING_PREFILL_TOKENS, r] / rate
    cost_s = added_delay_s(wait_s, new / rate, decode_s, others_s)
    if params[_OBSERVED] > 0.0:
        cost_s *= replicas[STEP_TIME_RATIO, r] ** params[_OBSERVED]
    if params[_DISPLACED] > 0.0:
        kv_tokens = max(replicas[KV_CAPACITY_TOKENS, r], 1.0)
        cost_s += displaced_s(new, kv_tokens, params[_DISPLACED])
    return cost_s


@inlined
def _normalise(params: FloatArray, memory: FloatArray, first: int, stop: int) -> None:
    """Normalise some inputs in place."""
    scale = _MEAN + memory.shape[0]
    for k in range(first, stop):
        memory[k] = (memory[k] - params[_MEAN + k]) / params[scale + k]


@inlined
def _write_own(
    replicas: FloatArray, request: FloatArray, r: int, params: FloatArray, memory: FloatArray
) -> None:
    """Write what is a replica's own of the inputs, normalised."""
    write_inputs(replicas, request, r, memory)
    if memory.shape[0] > NUM_INPUTS:
        write_inferred_inputs(replicas, request, r, memory)
    _normalise(params, memory, 0, min(memory.shape[0], NUM_EXTENDED_INPUTS))


@inlined
def _corrected(params: FloatArray, memory: FloatArray, head: int, num_heads: int) -> float:
    """Return what the units make of the inputs: for a score (0), or for a hold (1)."""
    inputs = memory.shape[0]
    size, total = inputs + 1 + num_heads, 0.0
    for unit in range(_MEAN + 2 * inputs, params.shape[0], size):
        weight = params[unit + inputs + 1 + head]
        if weight == 0.0:
            continue
        activation = params[unit + inputs]
        for k in range(inputs):
            activation += memory[k] * params[unit + k]
        if activation > 0.0:
            total += activation * weight
    return total


@rule
def decide(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `policy.rule`. What it keeps is room for the inputs of a replica."""
    width = mask.shape[0] - 2
    holds = params[_BASE] == _HELD
    num_heads = 2 if holds else 1
    if holds:
        write_router_inputs(replicas, request, memory)
        _normalise(params, memory, NUM_EXTENDED_INPUTS, memory.shape[0])
    best, best_score = -1, -np.inf
    for r in range(width):
        if not mask[r]:
            continue
        _write_own(replicas, request, r, params, memory)
        if params[_BASE] != _PREFIX_LOAD:
            cost_s = _added_delay_s(replicas, request, r, params)
        else:
            rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
            new = max(request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r], 0.0)
            prefill_s = (replicas[PENDING_PREFILL_TOKENS, r] + new) / rate
            speed = max(replicas[RELATIVE_SPEED, r], _SLOWEST)
            load = replicas[OUTSTANDING_REQUESTS, r]
            cost_s = prefix_load_s(prefill_s, load, speed, params[1], params[2])
        score = -params[0] * cost_s + _corrected(params, memory, 0, num_heads)
        if score > best_score:
            best, best_score = r, score
    if best < 0:
        return width if mask[width] else width + 1
    if holds and mask[width] and request[WAITED_S] < params[_MOST]:
        _write_own(replicas, request, best, params, memory)
        rate = max(replicas[PREFILL_TOKENS_PER_S, best], 1.0)
        over_s = replicas[PENDING_PREFILL_TOKENS, best] / rate - params[_WAIT]
        if params[0] * over_s + _corrected(params, memory, 1, num_heads) > 0.0:
            return width
    return best


def perceptron_rule(
    base: Base, weights: FloatArray, nets: Perceptrons, name: str, *, extended: bool = False
) -> Heuristic:
    """Make the rule of one candidate.

    Args:
        base: What it corrects.
        weights: Weight of the cost of that rule, per second, and its numbers,
            `float64[1 + numbers]`.
        nets: One perceptron, which reads what `write_inputs` writes; if it has more inputs, what
            `write_inferred_inputs` writes, too; if the rule holds, what `write_router_inputs`
            writes besides. It has one head, and a second one for holds if the rule holds.
        name: In tables.
        extended: Whether what a router infers is to be seen; else it sees of that what the rule
            goes by.
    """
    units = np.vstack([nets.hidden[0], nets.hidden_bias[0], nets.out[0].T])
    own = np.zeros(_NUM_RULE)
    own[[0, *_PLACES[base]]] = weights
    needs = observed_groups(extended=extended)
    needs |= Group.LENGTHS if own[_SHRINK] > 0.0 else Group(0)
    needs |= Group.STEP_TIMES if own[_OBSERVED] > 0.0 else Group(0)
    return Heuristic(
        name=name,
        information="predictive",
        needs=needs,
        decide=decide,
        params=np.concatenate([own, [BASES.index(base)], nets.mean, nets.scale, units.T.ravel()]),
        memory_size=len(nets.mean),
    )
