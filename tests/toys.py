"""Step costs whose sums can be done by hand."""

from __future__ import annotations

import numpy as np

from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)


def linear_grid(
    cpu_s: float = 1.0, token_s: float = 0.1, pair_s: float = 0.01, kv_s: float = 0.001
) -> CostGrid:
    """Make a grid without kinks: `cpu + token * tokens + pair * chunk * context + kv * kv`."""
    dense = 1.0 + 100.0 * np.arange(NUM_DENSE_KNOTS)  # no step is without tokens
    chunk, context = 50.0 * np.arange(NUM_CHUNK_KNOTS), 50.0 * np.arange(NUM_CONTEXT_KNOTS)
    batch, kv = 8.0 * np.arange(NUM_BATCH_KNOTS), 100.0 * np.arange(NUM_KV_KNOTS)
    return CostGrid(
        cpu_s=cpu_s,
        dense_tokens=dense,
        dense_s=token_s * dense,
        prefill_chunk=chunk,
        prefill_context=context,
        prefill_s=pair_s * np.outer(chunk, context),
        decode_batch=batch,
        decode_kv=kv,
        decode_s=np.add.outer(0.0 * batch, kv_s * kv),
    )


def token_grid(cpu_s: float, token_s: float) -> CostGrid:
    """Make a grid in which a step takes a while, and each of its tokens a while more."""
    return linear_grid(cpu_s, token_s, pair_s=0.0, kv_s=0.0)


def constant_grid(step_s: float) -> CostGrid:
    """Make a grid in which every step takes the same time, whatever is in it."""
    return token_grid(step_s, 0.0)
