"""A dispatcher of few weights as a compiled rule, for searches that play whole episodes.

Rule `added-delay`, `prefix-load` or `added-delay-inferred`, corrected by a perceptron: what
`train.dispatch_space` makes of flat weights, and exports as a network. It decides as that network
does; a test holds both equal.
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
    Group,
    observed_groups,
)
from servegym.policy.costs import added_delay_s, delay_s, displaced_s, prefix_load_s, step_s
from servegym.policy.play_perceptron import Perceptrons
from servegym.policy.policy import Heuristic
from servegym.policy.replica_inputs import NUM_INPUTS, write_inferred_inputs, write_inputs
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: A rule that can be corrected.
Base = Literal["added-delay", "prefix-load", "added-delay-inferred"]
#: All of them.
BASES: tuple[Base, ...] = ("added-delay", "prefix-load", "added-delay-inferred")
#: Numbers of each that a search moves, by their places: what is a share stays as it is given.
SEARCHED: dict[Base, tuple[int, ...]] = {
    "added-delay": (0, 1),
    "prefix-load": (0, 1),
    "added-delay-inferred": (0, 1, 4),
}
#: Where its parameters stand: weight of the rule's cost and the rule's numbers (0 where it has
#: fewer), which rule, what inputs are normalised by, then the units, each with its weights, its
#: bias and its weight in the score.
_NUM_RULE = 6
_BASE, _MEAN = _NUM_RULE, _NUM_RULE + 1
_SHRINK, _OBSERVED, _DISPLACED = 3, 4, 5
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
    width, inputs = mask.shape[0] - 2, memory.shape[0]
    scale, first, size = _MEAN + inputs, _MEAN + 2 * inputs, inputs + 2
    best, best_score = -1, -np.inf
    for r in range(width):
        if not mask[r]:
            continue
        write_inputs(replicas, request, r, memory)
        if inputs > NUM_INPUTS:
            write_inferred_inputs(replicas, request, r, memory)
        for k in range(inputs):
            memory[k] = (memory[k] - params[_MEAN + k]) / params[scale + k]
        if params[_BASE] != 1.0:
            cost_s = _added_delay_s(replicas, request, r, params)
        else:
            rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
            new = max(request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r], 0.0)
            prefill_s = (replicas[PENDING_PREFILL_TOKENS, r] + new) / rate
            speed = max(replicas[RELATIVE_SPEED, r], _SLOWEST)
            load = replicas[OUTSTANDING_REQUESTS, r]
            cost_s = prefix_load_s(prefill_s, load, speed, params[1], params[2])
        score = -params[0] * cost_s
        for unit in range(first, params.shape[0], size):
            activation = params[unit + inputs]
            for k in range(inputs):
                activation += memory[k] * params[unit + k]
            if activation > 0.0:
                score += activation * params[unit + inputs + 1]
        if score > best_score:
            best, best_score = r, score
    if best < 0:
        return width if mask[width] else width + 1
    return best


def perceptron_rule(base: Base, weights: FloatArray, nets: Perceptrons, name: str) -> Heuristic:
    """Make the rule of one candidate.

    Args:
        base: What it corrects.
        weights: Weight of the cost of that rule, per second, and its numbers,
            `float64[1 + numbers]`.
        nets: One perceptron of one head, which reads what `write_inputs` writes; if it has more
            inputs, what `write_inferred_inputs` writes, too.
        name: In tables.
    """
    units = np.vstack([nets.hidden[0], nets.hidden_bias[0], nets.out[0, :, 0]])
    own = np.zeros(_NUM_RULE)
    own[: len(weights)] = weights
    needs = observed_groups(extended=len(nets.mean) > NUM_INPUTS)
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
