"""The dispatch network of `servegym.agents` in compiled code, for many observations at a time.

A step of a rollout asks for the actions of a few dozen environments: in PyTorch that is a hundred
small operations, each of which costs more to call than to compute. Here it is two calls. Networks
with the plain observation and the mean of the replicas as context are run, from a rule that there
is in compiled form; `runs` says which. Inputs are computed in float64 and kept in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import fixed, inlined, kernel
from servegym.policy.contract import (
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    RELATIVE_SPEED,
    UP,
    observed,
)
from servegym.policy.costs import prefix_load_s
from servegym.policy.numpy_network import FAMILY, LEAST_COST, MASKED, NetworkShape
from servegym.policy.play_fleet import charged_s
from servegym.policy.replica_inputs import NUM_INPUTS, write_inputs
from servegym.typing import Float32Array, FloatArray, Int8Array

#: Rules from which networks start that are run here.
_BASES = ("added-delay", "prefix-load")
_MASKED = float(MASKED)
_SLOWEST = 1e-6
#: Replicas of which the layers are computed together: what they give stays in a core's own cache.
_BLOCK = 256


class Described(NamedTuple):
    """What a network makes of observations before any weight is used; see `agents.Prepared`."""

    inputs: Float32Array  # [batch, R, NUM_INPUTS]
    present: Float32Array  # [batch, R], 1 where there is a replica
    prior: Float32Array  # [batch, R], the rule's logits
    mask: Float32Array  # [batch, R + num_extra], 1 where allowed


class Layers(NamedTuple):
    """Weights of the actor, by PyTorch's names: `float32[out, in]`, biases `float32[out]`."""

    first: Float32Array
    first_bias: Float32Array
    second: Float32Array
    second_bias: Float32Array
    mix: Float32Array
    mix_bias: Float32Array
    around: Float32Array
    around_bias: Float32Array
    score: Float32Array
    score_bias: Float32Array
    extra: Float32Array
    extra_bias: Float32Array


def runs(shape: NetworkShape) -> bool:
    """Whether such a network is run here."""
    return shape.family == FAMILY and shape.context == "mean" and shape.base in _BASES


@inlined
def _cost_s(replicas: FloatArray, request: FloatArray, r: int, rule: FloatArray) -> float:
    """Cost of a replica by the rule: `rule` has which one it is, and its two parameters.

    Observations may be of either precision.
    """
    if rule[0] == 0.0:
        return charged_s(replicas, request, r, rule)
    rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
    new = max(request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r], 0.0)
    prefill_s = (replicas[PENDING_PREFILL_TOKENS, r] + new) / rate
    speed = max(replicas[RELATIVE_SPEED, r], _SLOWEST)
    return prefix_load_s(prefill_s, replicas[OUTSTANDING_REQUESTS, r], speed, rule[1], rule[2])


@kernel
def _describe(
    replicas: Float32Array,
    request: Float32Array,
    mask: Int8Array,
    rule: FloatArray,
    eta: float,
    relative: bool,
    d: Described,
) -> None:
    for e in range(replicas.shape[0]):
        rows = replicas[e].T
        least = math.inf
        for r in range(replicas.shape[1]):
            write_inputs(rows, request[e], r, d.inputs[e, r])
            d.present[e, r] = 1.0 if rows[UP, r] > 0.0 else 0.0
            cost = _cost_s(rows, request[e], r, rule)
            if relative:
                cost = math.log(max(cost, LEAST_COST))
            d.prior[e, r] = cost
            # of what is kept, so that the least cost has a logit of 0 and no rounding error
            least = min(least, d.prior[e, r] - _MASKED * (1 - mask[e, r]))
        for r in range(replicas.shape[1]):
            d.prior[e, r] = -eta * (d.prior[e, r] - least)
        for a in range(mask.shape[1]):
            d.mask[e, a] = mask[e, a]


class _Memory(NamedTuple):
    """Working memory for a block of environments: columns are replicas, or environments.

    H hidden units; products are sums over rows, so that a vector unit takes eight columns at once.
    """

    inputs: Float32Array  # [NUM_INPUTS, rows]
    hidden: Float32Array  # [H, rows]
    encoded: Float32Array  # [H, rows]
    pooled: Float32Array  # [2 H, envs] mean of the replicas, then the most of each unit
    seen: Float32Array  # [H, envs]
    total: Float32Array  # [rows]


@inlined
def _layer(x: Float32Array, weight: Float32Array, n: int, out: Float32Array) -> None:
    """Add the product of `weight` and the first `n` columns of `x` to `out`."""
    size = weight.shape[1]
    whole = size - size % 4  # four at a time: sums are read and written a quarter as often
    for h in range(weight.shape[0]):
        row, v = out[h], weight[h]
        for k in range(0, whole, 4):
            v0, v1, v2, v3 = v[k], v[k + 1], v[k + 2], v[k + 3]
            x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
            for i in range(n):
                row[i] += (v0 * x0[i] + v1 * x1[i]) + (v2 * x2[i] + v3 * x3[i])
        for k in range(whole, size):
            value, column = v[k], x[k]
            for i in range(n):
                row[i] += value * column[i]


@inlined
def _rectify(x: Float32Array, num_rows: int, n: int) -> None:
    for h in range(num_rows):
        row = x[h]
        for i in range(n):
            row[i] = max(row[i], np.float32(0.0))


@kernel
def _score(d: Described, w: Layers, m: _Memory, logits: Float32Array) -> None:
    num_envs, width = d.present.shape
    num_hidden, num_inputs = w.first.shape
    block = m.seen.shape[1]
    for first in range(0, num_envs, block):
        envs = min(block, num_envs - first)
        n = envs * width
        for e in range(envs):
            for r in range(width):
                for k in range(num_inputs):
                    m.inputs[k, e * width + r] = d.inputs[first + e, r, k]
        for h in range(num_hidden):
            m.hidden[h, :n] = w.first_bias[h]
            m.encoded[h, :n] = w.second_bias[h]
            m.seen[h, :envs] = w.around_bias[h]
        _layer(m.inputs, w.first, n, m.hidden)
        _rectify(m.hidden, num_hidden, n)
        _layer(m.hidden, w.second, n, m.encoded)
        _rectify(m.encoded, num_hidden, n)
        for e in range(envs):
            present = d.present[first + e]
            count = np.float32(0.0)
            for r in range(width):
                count += present[r]
            count = max(count, np.float32(1.0))
            for h in range(num_hidden):
                total, most = np.float32(0.0), np.float32(0.0)
                for r in range(width):
                    value = m.encoded[h, e * width + r] * present[r]
                    m.encoded[h, e * width + r] = value
                    total += value
                    most = max(most, value)
                m.pooled[h, e] = total / count
                m.pooled[num_hidden + h, e] = most
        _layer(m.pooled, w.around, envs, m.seen)
        for h in range(num_hidden):
            for e in range(envs):
                m.hidden[h, e * width : (e + 1) * width] = w.mix_bias[h] + m.seen[h, e]
        _layer(m.encoded, w.mix, n, m.hidden)
        _rectify(m.hidden, num_hidden, n)
        _rectify(m.seen, num_hidden, envs)
        m.total[:n] = 0.0
        for h in range(num_hidden):
            value, row = w.score[0, h], m.hidden[h]
            for i in range(n):
                m.total[i] += value * row[i]
        for e in range(envs):
            scores, mask = logits[first + e], d.mask[first + e]
            for r in range(width):
                scores[r] = d.prior[first + e, r] + (m.total[e * width + r] + w.score_bias[0])
            for a in range(width, logits.shape[1]):
                total = w.extra_bias[a - width]
                for h in range(num_hidden):
                    total += w.extra[a - width, h] * m.seen[h, e]
                scores[a] = total
            for a in range(logits.shape[1]):
                scores[a] = scores[a] * mask[a] + _MASKED * (np.float32(1.0) - mask[a])


class CompiledNetwork:
    """A network that `runs` here; its weights may change between calls.

    Args:
        shape: What the weights alone do not say.
        layers: Weights; C-contiguous, and read at every call.
    """

    def __init__(self, shape: NetworkShape, layers: Layers) -> None:
        self._shape, self._layers = shape, layers
        self._rule = np.array([_BASES.index(shape.base), *shape.base_params], np.float64)

    def describe(self, replicas: Float32Array, request: Float32Array, mask: Int8Array) -> Described:
        """Turn observations into what `logits` takes, in new arrays.

        Args:
            replicas: Raw features, `float32[batch, R, F]`.
            request: Raw features, `float32[batch, G]`.
            mask: 1 where allowed, `int8[batch, R + num_extra]`.
        """
        inputs = self._layers.first.shape[1]
        described = Described(
            np.empty((*replicas.shape[:2], inputs), np.float32),
            np.empty(replicas.shape[:2], np.float32),
            np.empty(replicas.shape[:2], np.float32),
            np.empty(mask.shape, np.float32),
        )
        shape = self._shape
        eta, relative = float(shape.eta), bool(shape.relative)
        arguments = (
            np.ascontiguousarray(replicas, np.float32),
            np.ascontiguousarray(request, np.float32),
            np.ascontiguousarray(mask, np.int8),
            self._rule,
            eta,
            relative,
            described,
        )
        fixed(_describe, *arguments)(*arguments)
        return described

    def logits(self, described: Described) -> Float32Array:
        """Score all actions, `float32[batch, R + num_extra]`, forbidden ones at about -1e8."""
        num_envs, width = described.present.shape
        hidden, inputs = self._layers.first.shape
        block = max(1, min(num_envs, _BLOCK // width))
        rows = block * width

        def room(*sizes: int) -> Float32Array:
            return np.empty(sizes, np.float32)

        memory = _Memory(
            room(inputs, rows),
            room(hidden, rows),
            room(hidden, rows),
            room(2 * hidden, block),
            room(hidden, block),
            room(rows),
        )
        logits = room(*described.mask.shape)
        arguments = (described, self._layers, memory, logits)
        fixed(_score, *arguments)(*arguments)
        return logits


def rehearse() -> None:
    """Compile."""
    sizes = {"first": (4, NUM_INPUTS), "around": (4, 8), "score": (1, 4), "extra": (1, 4)}
    layers = [
        np.zeros(sizes.get(name, (4, 4)), np.float32)
        if not name.endswith("_bias")
        else np.zeros(4, np.float32)
        for name in Layers._fields
    ]
    shape = NetworkShape(FAMILY, "mean", "added-delay", (1.0, 1.0), 1.0, 0)
    seen = observed(extended=False)
    network = CompiledNetwork(shape, Layers(*layers))
    network.logits(
        network.describe(
            np.zeros((1, 2, seen.replicas), np.float32),
            np.zeros((1, seen.request), np.float32),
            np.ones((1, 2), np.int8),
        )
    )
