from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import pytest
import torch

import servegym  # noqa: F401 - registers the environments
from servegym.scenario import load_scenario, scenario_names
from servegym.workflow_scenario import workflow_scenario_names

#: The environments as they are, and with the settings for stock algorithms.
IDS = sorted(name for name in gymnasium.registry if name.startswith("servegym/"))


class Case(NamedTuple):
    """An environment and a bundled scenario, made small."""

    env_id: str
    settings: dict[str, Any]

    def make(self, **settings: Any) -> gymnasium.Env:
        return gymnasium.make(self.env_id, **self.settings, **settings)

    def make_vec(self, num_envs: int, **settings: Any) -> gymnasium.vector.VectorEnv:
        return gymnasium.make_vec(self.env_id, num_envs, **self.settings, **settings)


SMALL: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Dispatch": (scenario_names(), {"num_requests": 40}),
    "Preemption": (
        [name for name in scenario_names() if load_scenario(name).orders_requests],
        {"num_requests": 40, "load": 4.0},
    ),
    "Cluster": (
        [name for name in scenario_names() if name.endswith("-fleet")],
        {"num_requests": 40, "load": 4.0, "max_waiting": 8},
    ),
    "Workflow": (workflow_scenario_names(), {"num_jobs": 3, "pool_size": 4, "max_stages": 6}),
}


def _cases() -> list[Case]:
    cases = []
    for env_id in IDS:
        name = env_id.removeprefix("servegym/").split("-")[0]
        plain = name.removesuffix("Shaped")
        scenarios, settings = SMALL[plain]
        for scenario in scenarios if name == plain else scenarios[:1]:
            cases.append(Case(env_id, {"scenario": scenario, **settings}))
    return cases


def _name(case: Case) -> str:
    return f"{case.env_id.split('/')[1]}-{case.settings['scenario']}"


@pytest.fixture(params=_cases(), ids=_name)
def case(request) -> Case:
    """Return every environment with every bundled scenario that it plays."""
    return request.param


@pytest.fixture(params=IDS)
def one(request) -> Case:
    """Return every environment with one scenario."""
    return next(case for case in _cases() if case.env_id == request.param)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
