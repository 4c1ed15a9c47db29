from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from servegym.cluster.spec import Episode
from servegym.scenario import Scenario
from servegym.workloads.table import RequestTable

#: One fast and two slower replicas; 40 short requests; a full episode takes milliseconds.
SMALL = {
    "name": "small",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [30.0], "max_tokens": 100},
    },
    "num_requests": 40,
}


@pytest.fixture(scope="session")
def make_scenario() -> Callable[..., Scenario]:
    """Return a maker of the small scenario with some keys replaced."""

    def make(**changes: Any) -> Scenario:
        return Scenario.model_validate({**SMALL, **changes})

    return make


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """Return a maker of episodes of given arrivals, equal requests and nominal speeds."""

    def make(
        arrival_s: list[float], *, num_replicas: int = 3, prompt: int = 100, output: int = 10
    ) -> Episode:
        n = len(arrival_s)
        table = RequestTable.build(np.array(arrival_s), np.full(n, prompt), np.full(n, output))
        types = np.array([0, 1, 1][:num_replicas], np.int16)
        return Episode(table, types, np.ones(num_replicas))

    return make


@pytest.fixture
def choose() -> Callable[[np.ndarray], np.ndarray]:
    """Return a chooser of random allowed actions, one for each row of a mask."""
    rng = np.random.default_rng(0)

    def draw(mask: np.ndarray) -> np.ndarray:
        return (rng.random(mask.shape) * mask).argmax(-1)

    return draw
