"""A dispatcher of few weights as a compiled rule, for searches that play whole episodes.

Rule `added-delay` or `prefix-load`, corrected by a perceptron: what `train.dispatch_space` makes of
flat weights, and exports as a network. It decides as that network does; a test holds both equal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from servegym.policy.contract import (
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    RELATIVE_SPEED,
    observed_groups,
)
from servegym.policy.costs import prefix_load_s
from servegym.policy.play_fleet import charged_s
from servegym.policy.play_perceptron import Perceptrons
from servegym.policy.policy import Heuristic
from servegym.policy.replica_inputs import NUM_INPUTS, write_inputs
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: A rule that can be corrected.
Base = Literal["added-delay", "prefix-load"]
#: All of them; each has two numbers.
BASES: tuple[Base, ...] = ("added-delay", "prefix-load")
#: Where its parameters stand: weight of the rule's cost and the rule's numbers, which rule, what
#: inputs are normalised by, then the units, each with its weights, its bias and its weight in the
#: score.
_BASE, _MEAN = 3, 4
_SCALE = _MEAN + NUM_INPUTS
_UNITS = _SCALE + NUM_INPUTS
_UNIT = NUM_INPUTS + 2
_SLOWEST = 1e-6


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
    best, best_score = -1, -np.inf
    for r in range(width):
        if not mask[r]:
            continue
        write_inputs(replicas, request, r, memory)
        for k in range(NUM_INPUTS):
            memory[k] = (memory[k] - params[_MEAN + k]) / params[_SCALE + k]
        if params[_BASE] == 0.0:
            cost_s = charged_s(replicas, request, r, params)
        else:
            rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
            new = max(request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r], 0.0)
            prefill_s = (replicas[PENDING_PREFILL_TOKENS, r] + new) / rate
            speed = max(replicas[RELATIVE_SPEED, r], _SLOWEST)
            load = replicas[OUTSTANDING_REQUESTS, r]
            cost_s = prefix_load_s(prefill_s, load, speed, params[1], params[2])
        score = -params[0] * cost_s
        for unit in range(_UNITS, params.shape[0], _UNIT):
            activation = params[unit + NUM_INPUTS]
            for k in range(NUM_INPUTS):
                activation += memory[k] * params[unit + k]
            if activation > 0.0:
                score += activation * params[unit + NUM_INPUTS + 1]
        if score > best_score:
            best, best_score = r, score
    if best < 0:
        return width if mask[width] else width + 1
    return best


def perceptron_rule(base: Base, weights: FloatArray, nets: Perceptrons, name: str) -> Heuristic:
    """Make the rule of one candidate.

    Args:
        base: What it corrects.
        weights: Weight of the cost of that rule, per second, and its numbers, `float64[3]`.
        nets: One perceptron of one head, which reads what `write_inputs` writes.
        name: In tables.
    """
    units = np.vstack([nets.hidden[0], nets.hidden_bias[0], nets.out[0, :, 0]])
    return Heuristic(
        name=name,
        information="predictive",
        needs=observed_groups(extended=False),
        decide=decide,
        params=np.concatenate(
            [weights, [BASES.index(base)], nets.mean, nets.scale, units.T.ravel()]
        ),
        memory_size=NUM_INPUTS,
    )
