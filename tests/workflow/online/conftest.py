from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import DECISION, DONE


@pytest.fixture
def engine() -> Callable[..., ReplicaType]:
    """Return a maker of engines whose step takes 1 s and 0.1 s a token, attention nothing."""

    def make(**changes: int) -> ReplicaType:
        grid = CostGrid(
            cpu_s=1.0,
            dense_tokens=np.arange(NUM_DENSE_KNOTS, dtype=float),
            dense_s=0.1 * np.arange(NUM_DENSE_KNOTS),
            prefill_chunk=np.arange(NUM_CHUNK_KNOTS, dtype=float),
            prefill_context=np.arange(NUM_CONTEXT_KNOTS, dtype=float),
            prefill_s=np.zeros((NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS)),
            decode_batch=np.arange(NUM_BATCH_KNOTS, dtype=float),
            decode_kv=np.arange(NUM_KV_KNOTS, dtype=float),
            decode_s=np.zeros((NUM_BATCH_KNOTS, NUM_KV_KNOTS)),
        )
        settings = {"num_blocks": 100, "max_num_batched_tokens": 20, "max_num_seqs": 4}
        return ReplicaType("toy", grid, **(settings | changes))

    return make


@pytest.fixture
def play() -> Callable[..., Simulator]:
    """Return a player: a policy, or at each decision the first start or the given actions."""

    def play(spec, episode, policy=None, actions=None) -> Simulator:
        simulator = Simulator(spec, [episode])
        if policy is not None:
            run(simulator, policy)
            return simulator
        given = iter(actions) if actions is not None else None
        while simulator.advance()[0] == DECISION:
            action = simulator.startable()[0] if given is None else next(given)
            simulator.apply(np.array([action]))
        assert simulator.reasons[0] == DONE
        return simulator

    return play
