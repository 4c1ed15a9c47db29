"""Compiling a step cost: sampled terms, with knots where lines between them follow best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servegym.costs.engines import FUSION
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.errors import ConfigError
from servegym.typing import FloatArray

if TYPE_CHECKING:
    from servegym.costs.step import StepCost


def sample(cost: StepCost, max_tokens: int, max_context: int, queries: int = 1) -> CostGrid:
    """Sample a step's terms on the grids that the simulator interpolates.

    Args:
        cost: Of a step.
        max_tokens: Largest token budget of a step.
        max_context: Longest context.
        queries: Tokens of each decoding sequence.

    Raises:
        ConfigError: If a budget leaves too few sizes for the knots.
    """
    latent, operators = bool(cost.model.latent_dim), cost.operators
    tokens = np.round(np.geomspace(1, max_tokens, 400))
    last = FUSION[cost.engine].shared_tokens
    if cost.model.shared_ffn_dim and 0 < last < max_tokens:
        tokens = np.append(tokens, (last, last + 1))  # a step up
    tokens = np.unique(tokens)
    dense = np.array([cost.dense_s(t) for t in tokens])
    cpu_s = operators.cpu_s()
    at = _knots(dense[:, None], tokens, cpu_s + dense[:, None], NUM_DENSE_KNOTS)
    step_s = cpu_s + dense[0]

    chunks = np.unique(np.round(np.geomspace(1, max_tokens, 60)))
    contexts = np.concatenate(([0.0], np.geomspace(16, max_context, 40)))
    prefill = np.array([[cost.prefill_s(c, h) for h in contexts] for c in chunks])
    prefill = np.maximum.accumulate(np.maximum.accumulate(prefill, axis=0), axis=1)
    beside = prefill + cpu_s + np.interp(chunks, tokens, dense)[:, None]
    c = _knots(prefill, chunks, beside, NUM_CHUNK_KNOTS)
    h = _knots(prefill.T, contexts, beside.T, NUM_CONTEXT_KNOTS)

    bends: tuple[float, ...] = ()
    if not latent:
        bends = operators.mixed_bends(cost.shard.heads, cost.shard.kv_heads)
    batches = np.concatenate((np.geomspace(1, 1024, 40), np.clip(bends, 1, 1024)))
    batches = np.unique(np.round(batches))
    kv = np.geomspace(1, 4.0e6, 73)
    decode, mixed = (
        np.array(
            [[cost.decode_s(b, k, mixed=beside, queries=queries) for k in kv] for b in batches]
        )
        for beside in (False, True)
    )
    if operators.decode_grows_with_batch and not latent:
        decode = np.maximum.accumulate(decode, axis=0)
    decode = np.maximum.accumulate(decode, axis=1)
    # the same tokens in more sequences may take less time: they leave no multiprocessor idle
    mixed = np.maximum.accumulate(mixed, axis=1)
    both = np.concatenate((decode, mixed), axis=1)
    b = _knots(both, batches, both + step_s, NUM_BATCH_KNOTS)
    both = np.concatenate((decode, mixed), axis=0).T
    k = _knots(both, kv, both + step_s, NUM_KV_KNOTS)
    return CostGrid(
        cpu_s=cpu_s,
        dense_tokens=tokens[at],
        dense_s=dense[at],
        prefill_chunk=chunks[c],
        prefill_context=contexts[h],
        prefill_s=prefill[np.ix_(c, h)],
        decode_batch=batches[b],
        decode_kv=kv[k],
        decode_s=decode[np.ix_(b, k)],
        mixed_s=mixed[np.ix_(b, k)],
        empty_tiles_s=cost.empty_tiles_s(),
    )


def _knots(values: FloatArray, x: FloatArray, scale: FloatArray, count: int) -> list[int]:
    """Choose knots along the first axis, so that lines between them follow all columns.

    Args:
        values: Samples, `float64[N, columns]`.
        x: Where, ascending, `float64[N]`.
        scale: What an error is measured against, same shape as the samples.
        count: Knots to choose; first and last are among them.

    Returns:
        Indices, ascending.
    """
    chosen = [0, len(x) - 1]
    while len(chosen) < min(count, len(x)):
        i = np.searchsorted(x[chosen], x, side="right").clip(1, len(chosen) - 1)
        low, high = np.array(chosen)[i - 1], np.array(chosen)[i]
        share = ((x - x[low]) / (x[high] - x[low]))[:, None]
        line = values[low] + share * (values[high] - values[low])
        off = np.max(np.abs(line - values) / scale, axis=1)
        off[chosen] = -1.0
        chosen = sorted([*chosen, int(np.argmax(off))])
    if len(chosen) < count:
        raise ConfigError(f"max_tokens must leave {count} sizes to sample, got {int(x[-1])}")
    return chosen
