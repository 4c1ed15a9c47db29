from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import pytest
import torch

import servegym  # noqa: F401 - registers the environments
from servegym.scenario import load_scenario, scenario_names
from servegym.workflow_scenario import workflow_scenario_names

IDS = ("servegym/Dispatch-v0", "servegym/Preemption-v0", "servegym/Workflow-v0")


class Case(NamedTuple):
    """An environment and a bundled scenario, made small."""

    env_id: str
    settings: dict[str, Any]

    def make(self, **settings: Any) -> gymnasium.Env:
        return gymnasium.make(self.env_id, **self.settings, **settings)

    def make_vec(self, num_envs: int, **settings: Any) -> gymnasium.vector.VectorEnv:
        return gymnasium.make_vec(self.env_id, num_envs, **self.settings, **settings)


def _cases() -> list[Case]:
    dispatch, preemption, workflow = IDS
    ordered = [name for name in scenario_names() if load_scenario(name).orders_requests]
    return [
        *(Case(dispatch, {"scenario": s, "num_requests": 40}) for s in scenario_names()),
        *(Case(preemption, {"scenario": s, "num_requests": 150, "load": 2.0}) for s in ordered),
        *(
            Case(workflow, {"scenario": s, "num_jobs": 3, "pool_size": 4, "max_stages": 6})
            for s in workflow_scenario_names()
        ),
    ]


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
