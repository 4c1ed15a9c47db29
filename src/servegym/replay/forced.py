"""The simulator with the logged dispatches forced, under costs that may change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType
from servegym.errors import WorkloadError
from servegym.replay.fleet import Fleet
from servegym.replay.log import ReplayLog
from servegym.replay.terms import TERMS, scaled
from servegym.typing import FloatArray, IntArray
from servegym.workloads.table import RequestTable

#: Variants simulated side by side; each holds the state of all KV blocks.
_AT_ONCE = 8


class Factors(NamedTuple):
    """Factors on the terms of each replica's costs over time.

    Attributes:
        edges_s: When a window begins but for the first, `float64[W - 1]`.
        values: In the order of `terms.TERMS`, `float64[W, R, len(TERMS)]`.
    """

    edges_s: FloatArray
    values: FloatArray

    @classmethod
    def ones(cls, num_replicas: int) -> Factors:
        """Return the costs as they are."""
        return cls(np.zeros(0), np.ones((1, num_replicas, len(TERMS))))


class Prediction(NamedTuple):
    """What the simulator makes of each simulated request.

    Attributes:
        ttft_s: From its dispatch, `float64[m]`.
        e2e_s: From its dispatch, `float64[m]`.
        cached_tokens: Prompt tokens found in the prefix cache, `int64[m]`.
        num_preemptions: `int64[m]`.
    """

    ttft_s: FloatArray
    e2e_s: FloatArray
    cached_tokens: IntArray
    num_preemptions: IntArray


@dataclass(frozen=True)
class Forced:
    """The dispatches of a log, ready to be simulated.

    Attributes:
        fleet: Its replicas.
        rows: Rows of the log that are simulated, in order of their last dispatch, `int64[m]`.
        table: They; each arrives when it was dispatched.
        actions: Where each goes, `int64[m]`.
        num_unfit: Requests left out because their replica could not hold them.
    """

    fleet: Fleet
    rows: IntArray
    table: RequestTable
    actions: IntArray
    num_unfit: int

    @classmethod
    def of(cls, log: ReplayLog) -> Forced:
        """Take the dispatched requests of a log.

        Raises:
            WorkloadError: If there is none.
        """
        table, fleet = log.table, log.fleet
        rows = np.flatnonzero(log.dispatched)
        need = table.prompt_tokens.astype(np.int64) + table.output_tokens
        room = np.array([t.num_blocks for t in fleet.types]) * fleet.spec.block_size
        fits = need[rows] <= room[log.replica[rows]]
        num_unfit = int((~fits).sum())
        rows = rows[fits]
        if not len(rows):
            raise WorkloadError("no request of the log was dispatched to a replica it fits in")
        at_s = table.arrival_s[rows] + log.dispatch_s[rows]
        order = np.argsort(at_s, kind="stable")
        # none waits for another: they are dispatched when they were
        free = table.open_loop().take(rows)
        taken = replace(free, arrival_s=np.zeros(len(rows))).take(order)
        at_s = at_s[order]
        return cls(
            fleet=fleet,
            rows=rows[order],
            table=replace(taken, arrival_s=at_s - at_s[0]),
            actions=log.replica[rows][order].astype(np.int64),
            num_unfit=num_unfit,
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def span_s(self) -> float:
        """From the first dispatch to the last."""
        return float(self.table.arrival_s[-1])

    def play(self, variants: Sequence[Factors]) -> list[Prediction]:
        """Simulate the dispatches under each of several costs."""
        found: list[Prediction] = []
        for first in range(0, len(variants), _AT_ONCE):
            found += self._play(variants[first : first + _AT_ONCE])
        return found

    def _play(self, variants: Sequence[Factors]) -> list[Prediction]:
        costs = CostWindows.of(self.fleet, variants)
        episodes = [
            Episode(self.table, types[0].astype(np.int16), self.fleet.speed)
            for types in costs.types
        ]
        simulator = Simulator(costs.spec, episodes)
        switches = costs.switches(variants, self.table.arrival_s)
        actions = np.repeat(self.actions[:, None], len(variants), axis=1)
        for request in range(len(self)):  # dispatches come at the same times in all of them
            simulator.advance()
            for env, types in switches.get(request, ()):
                simulator.state.replica[env]["type_idx"] = types
            simulator.apply(actions[request])
        simulator.advance()
        return [_prediction(simulator.outcomes(env)) for env in range(len(variants))]


def _prediction(out: NDArray[np.void]) -> Prediction:
    return Prediction(
        out["first_token_s"] - out["arrival_s"],
        out["finish_s"] - out["arrival_s"],
        out["cached_tokens"].astype(np.int64),
        out["num_preemptions"].astype(np.int64),
    )


class CostWindows(NamedTuple):
    """Replica types for costs that change over time.

    Attributes:
        spec: The cluster with a type for each replica and set of factors.
        types: Of each variant, index into `spec.types`, `int64[W, R]`.
    """

    spec: ClusterSpec
    types: list[IntArray]

    @classmethod
    def of(cls, fleet: Fleet, variants: Sequence[Factors]) -> CostWindows:
        """Make each scaled type once."""
        types: list[ReplicaType] = list(fleet.types)
        index = {(r, *(1.0,) * len(TERMS)): r for r in range(len(types))}
        chosen = []
        for factors in variants:
            rows = []
            for window in factors.values.tolist():
                row = []
                for r, (step, kv, prefill) in enumerate(window):
                    key = (r, step, kv, prefill)
                    if key not in index:
                        index[key] = len(types)
                        base = fleet.types[r]
                        types.append(replace(base, grid=scaled(base.grid, step, kv, prefill)))
                    row.append(index[key])
                rows.append(row)
            chosen.append(np.array(rows, np.int64))
        return cls(replace(fleet.spec, types=tuple(types)), chosen)

    def switches(
        self, variants: Sequence[Factors], at_s: FloatArray
    ) -> dict[int, list[tuple[int, IntArray]]]:
        """Return before which request which variant's replicas change their types.

        What a replica is decoding at that moment goes on under the new costs. All but the costs
        of a replica's types is the same.
        """
        found: dict[int, list[tuple[int, IntArray]]] = {}
        for env, (factors, types) in enumerate(zip(variants, self.types, strict=True)):
            first = np.searchsorted(at_s, factors.edges_s, side="left")
            for window, request in enumerate(first.tolist(), start=1):
                found.setdefault(request, []).append((env, types[window]))
        return found
