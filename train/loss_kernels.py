"""What is between the matrix products of `train.compiled_loss`, each one pass over its arrays."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import kernel
from servegym.policy.numpy_network import MASKED
from servegym.typing import Float32Array, FloatArray, IntArray

_MASKED = float(MASKED)


@kernel
def pool(x: Float32Array, present: Float32Array, pooled: Float32Array, ties: Float32Array) -> None:
    """Put 0 for absent replicas; write means, then the most of each unit, and who has that.

    Args:
        x: Of each replica, `float32[batch, R, H]`; changed in place.
        present: `float32[batch, R]`.
        pooled: `float32[batch, 2 H]`.
        ties: How many replicas have the most of a unit, `float32[batch, H]`.
    """
    size, width, hidden = x.shape
    for b in range(size):
        mean, most, tie = pooled[b, :hidden], pooled[b, hidden:], ties[b]
        count = np.float32(0.0)
        for h in range(hidden):
            mean[h] = 0.0
            most[h] = 0.0  # what is pooled is never negative
            tie[h] = 0.0
        for r in range(width):
            here, row = present[b, r], x[b, r]
            count += here
            for h in range(hidden):
                value = row[h] * here
                row[h] = value
                mean[h] += value
                most[h] = max(most[h], value)
        share = np.float32(1.0) / max(count, np.float32(1.0))
        for r in range(width):
            row = x[b, r]
            for h in range(hidden):
                tie[h] += np.float32(1.0) if row[h] == most[h] else np.float32(0.0)
        for h in range(hidden):
            mean[h] *= share


@kernel
def unpool(
    d_x: Float32Array,
    x: Float32Array,
    present: Float32Array,
    pooled: Float32Array,
    ties: Float32Array,
    d_pooled: Float32Array,
    d_bias: Float32Array,
) -> None:
    """Add to `d_x` what comes back through the pooling; where a unit was not active it is 0.

    Args:
        d_x: Gradient of `x` by other ways, `float32[batch, R, H]`; changed in place.
        x: As `pool` has left it.
        present: As there, and so the next two.
        pooled: Means and most.
        ties: Replicas that have the most.
        d_pooled: Gradient of `pooled`.
        d_bias: Sums of the gradient over all replicas, `float32[H]`.
    """
    size, width, hidden = x.shape
    for h in range(hidden):
        d_bias[h] = 0.0
    for b in range(size):
        count = np.float32(0.0)
        for r in range(width):
            count += present[b, r]
        share = np.float32(1.0) / max(count, np.float32(1.0))
        most, tie = pooled[b, hidden:], ties[b]
        d_mean, d_most = d_pooled[b, :hidden], d_pooled[b, hidden:]
        for r in range(width):
            row, d_row = x[b, r], d_x[b, r]
            for h in range(hidden):
                value = d_row[h] + d_mean[h] * share
                if row[h] == most[h]:
                    value += d_most[h] / tie[h]
                value = value if row[h] > 0.0 else np.float32(0.0)
                d_row[h] = value
                d_bias[h] += value


@kernel
def gate(d_x: Float32Array, x: Float32Array, d_bias: Float32Array) -> None:
    """Put 0 where a unit was not active, `float32[n, H]`; sum what is left, `float32[H]`."""
    for h in range(d_bias.shape[0]):
        d_bias[h] = 0.0
    for i in range(x.shape[0]):
        row, d_row = x[i], d_x[i]
        for h in range(d_bias.shape[0]):
            value = d_row[h] if row[h] > 0.0 else np.float32(0.0)
            d_row[h] = value
            d_bias[h] += value


@kernel
def add_around(y: Float32Array, bias: Float32Array, seen: Float32Array) -> None:
    """Add to what replicas give what all of them see, and rectify: `float32[batch, R, H]`."""
    for b in range(y.shape[0]):
        around = seen[b]
        for r in range(y.shape[1]):
            row = y[b, r]
            for h in range(bias.shape[0]):
                row[h] = max(row[h] + (bias[h] + around[h]), np.float32(0.0))


@kernel
def score_back(
    d_score: Float32Array,
    weight: Float32Array,
    y: Float32Array,
    d_seen: Float32Array,
    d_weight: Float32Array,
) -> None:
    """Write the gradient of `y` over it, and what of it is common to the replicas of a decision.

    Args:
        d_score: Of each replica's score, `float32[batch, >= R]`.
        weight: Of the score, `float32[H]`.
        y: What was scored, `float32[batch, R, H]`; its gradient afterwards.
        d_seen: Gradient of what all replicas see, `float32[batch, H]`.
        d_weight: Gradient of `weight`.
    """
    hidden = weight.shape[0]
    for h in range(hidden):
        d_weight[h] = 0.0
    for b in range(y.shape[0]):
        common = d_seen[b]
        for h in range(hidden):
            common[h] = 0.0
        for r in range(y.shape[1]):
            row, d = y[b, r], d_score[b, r]
            for h in range(hidden):
                d_weight[h] += d * row[h]
                value = d * weight[h] if row[h] > 0.0 else np.float32(0.0)
                row[h] = value
                common[h] += value


@kernel
def policy_loss(
    scores: Float32Array,
    mask: Float32Array,
    action: IntArray,
    log_prob: Float32Array,
    advantage: Float32Array,
    clip: float,
    entropy_weight: float,
    d_scores: Float32Array,
    parts: FloatArray,
) -> None:
    """Write the gradient of `- gain - entropy` by the scores, and the means of `LossParts`.

    Args:
        scores: Of all actions, before what is forbidden is, `float32[batch, A]`.
        mask: 1 where allowed, the same shape.
        action: What was done, `int64[batch]`.
        log_prob: With which it was, `float32[batch]`.
        advantage: Of it, `float32[batch]`.
        clip: Of the ratio.
        entropy_weight: Of the entropy.
        d_scores: The gradient.
        parts: `float64[5]`; the first is left alone.
    """
    size, num_actions = scores.shape
    parts[1:] = 0.0
    for b in range(size):
        row, d_row = scores[b], d_scores[b]
        most = -math.inf
        for a in range(num_actions):
            # d_row is room for the logits until the end
            d_row[a] = row[a] * mask[b, a] + _MASKED * (1.0 - mask[b, a])
            most = max(most, d_row[a])
        total = 0.0
        for a in range(num_actions):
            total += math.exp(d_row[a] - most)
        log_total = most + math.log(total)
        entropy = 0.0
        for a in range(num_actions):
            p = math.exp(d_row[a] - log_total)
            if p > 0.0:
                entropy -= p * (d_row[a] - log_total)
        log_ratio = d_row[action[b]] - log_total - log_prob[b]
        ratio, a_hat = math.exp(log_ratio), advantage[b]
        clipped = min(max(ratio, 1.0 - clip), 1.0 + clip)
        gain = min(ratio * a_hat, clipped * a_hat)
        parts[1] += gain / size
        parts[2] += entropy / size
        parts[3] += (ratio - 1.0 - log_ratio) / size
        parts[4] += (1.0 if abs(ratio - 1.0) > clip else 0.0) / size
        moves = ratio == clipped or ratio * a_hat < clipped * a_hat
        d_action = -ratio * a_hat / size if moves else 0.0
        for a in range(num_actions):
            log_p = d_row[a] - log_total
            p = math.exp(log_p)
            d = -d_action * p
            if a == action[b]:
                d += d_action
            if p > 0.0:
                d += entropy_weight / size * p * (log_p + entropy)
            d_row[a] = d * mask[b, a]
