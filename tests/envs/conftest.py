from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from servegym.cluster.spec import Episode
from servegym.envs.cluster import ClusterEnv, ClusterVectorEnv
from servegym.envs.dispatch import DispatchEnv, DispatchVectorEnv
from servegym.envs.preemption import PreemptionEnv, PreemptionVectorEnv
from servegym.envs.workflow import WorkflowEnv, WorkflowVectorEnv
from servegym.scenario import Scenario
from servegym.workflow_scenario import WorkflowScenario
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
#: An engine short of KV blocks.
TIGHT = {
    "name": "tight",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}],
    "workload": {
        "kind": "generated",
        "rate_rps": 3.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "num_requests": 12,
}
#: Small jobs on three devices.
DAGS = {
    "name": "dags",
    "devices": [{"name": "a", "count": 2}, {"name": "b", "count": 1}],
    "workload": {"kind": "random-dag", "device_types": ["a", "b"], "num_tasks": 6, "ccr": 0.5},
    "rate_jobs_per_s": 0.3,
    "num_jobs": 3,
}


class Problem(NamedTuple):
    """One of the environments, on a small scenario."""

    env_id: str
    single: type
    vector: type
    settings: dict[str, Any]


@pytest.fixture(params=["dispatch", "preemption", "workflow", "cluster"])
def problem(request) -> Problem:
    """Return each environment in turn; masks forbid something in all."""
    if request.param == "dispatch":
        scenario = Scenario.model_validate({**SMALL, "num_requests": 15})
        settings = {"scenario": scenario, "r_max": 5}
        return Problem("servegym/Dispatch-v1", DispatchEnv, DispatchVectorEnv, settings)
    if request.param == "preemption":
        settings = {"scenario": Scenario.model_validate(TIGHT), "max_waiting": 4}
        return Problem("servegym/Preemption-v0", PreemptionEnv, PreemptionVectorEnv, settings)
    if request.param == "cluster":
        fleet = [{**TIGHT["fleet"][0], "count": 2}]
        scenario = Scenario.model_validate({**TIGHT, "fleet": fleet})
        settings = {"scenario": scenario, "max_waiting": 4}
        return Problem("servegym/Cluster-v0", ClusterEnv, ClusterVectorEnv, settings)
    dags = WorkflowScenario.model_validate(DAGS)
    settings = {"scenario": dags, "pool_size": 6, "max_stages": 4}
    return Problem("servegym/Workflow-v0", WorkflowEnv, WorkflowVectorEnv, settings)


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
