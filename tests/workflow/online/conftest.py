from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import DECISION, DONE

from ...toys import token_grid  # noqa: TID252 - tests are no package


@pytest.fixture
def engine() -> Callable[..., ReplicaType]:
    """Return a maker of engines whose step takes 1 s and 0.1 s a token, attention nothing."""

    def make(**changes: int) -> ReplicaType:
        settings = {"num_blocks": 100, "max_num_batched_tokens": 20, "max_num_seqs": 4}
        return ReplicaType("toy", token_grid(1.0, 0.1), **(settings | changes))

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
