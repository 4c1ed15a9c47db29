"""SLO classes of requests that say none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.typing import Int16Array
from servegym.workloads.table import RequestTable


def draw_classes(
    rng: np.random.Generator, table: RequestTable, shares: Sequence[float]
) -> Int16Array:
    """Draw an SLO class for each conversation, `int16[n]`."""
    below = np.cumsum(shares) / np.sum(shares)
    draw = rng.random(len(table))[table.conversation]
    return np.searchsorted(below[:-1], draw, side="right").astype(np.int16)
