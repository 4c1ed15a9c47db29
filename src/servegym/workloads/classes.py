"""SLO classes and tenants of requests that say none, drawn by conversation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.typing import Int16Array, Int32Array
from servegym.workloads.table import RequestTable


def draw_classes(
    rng: np.random.Generator, table: RequestTable, shares: Sequence[float]
) -> Int16Array:
    """Draw an SLO class for each conversation, `int16[n]`."""
    below = np.cumsum(shares) / np.sum(shares)
    draw = rng.random(len(table))[table.conversation]
    return np.searchsorted(below[:-1], draw, side="right").astype(np.int16)


def draw_tenants(rng: np.random.Generator, table: RequestTable, num_tenants: int) -> Int32Array:
    """Draw a tenant for each conversation, all alike, `int32[n]`."""
    return rng.integers(0, num_tenants, len(table))[table.conversation].astype(np.int32)
