"""What a centralised critic sees of many fleets, in one compiled call."""

from __future__ import annotations

from typing import NamedTuple

from servegym.cluster.jit import kernel
from servegym.cluster.state import Params, State
from servegym.envs.cluster_kernels import KernelSettings, Memory, look_as_dispatcher
from servegym.envs.retention_kernels import see_tiers
from servegym.policy.ordering_rows import write_engine_columns
from servegym.typing import Float32Array, IntArray


class FleetViews(NamedTuple):
    """What there is to see of fleets; axes: E fleets, R replica rows, S schedulers."""

    replicas: Float32Array  # [E, R, F], as in `cluster_kernels.Output`
    request: Float32Array  # [E, NUM_OBSERVED_REQUEST_FEATURES], 0 where none is due
    engine: Float32Array  # [E, S, number of an engine's features, or 0 without orders]
    tiers: Float32Array  # [E, S, len(TIER_FEATURES), or 0 where nobody is asked about turns]


@kernel
def look_at_fleets(
    p: Params, s: State, c: KernelSettings, v: FleetViews, first: int, stop: int, m: Memory
) -> None:
    """Write what there is to see of fleets `first..stop-1`, whoever is asked."""
    width = v.engine.shape[2]
    for e in range(first, stop):
        look_as_dispatcher(p, s, c, e, v.replicas[e], v.request[e], m.request)
        for r in range(v.engine.shape[1]):
            there = r < s.env[e].num_replicas
            if width > 0:
                if there:
                    write_engine_columns(p, s, e, r, m.row)
                for k in range(width):
                    v.engine[e, r, k] = m.row[m.row.shape[0] - width + k] if there else 0.0
            if v.tiers.shape[2] > 0:
                v.tiers[e, r] = 0.0
                if there:
                    see_tiers(p, s, e, r, v.tiers[e, r])


@kernel
def gather(source: Float32Array, rows: IntArray, out: Float32Array, first: int) -> None:
    """Copy rows to where a column begins; NumPy would copy them twice.

    Args:
        source: `float32[N, K]`.
        rows: Which of them, `int64[n]`.
        out: `float32[n, >= first + K]`, written to.
        first: Where they begin in it.
    """
    for i in range(rows.shape[0]):
        row, target = source[rows[i]], out[i, first:]
        for k in range(row.shape[0]):
            target[k] = row[k]
