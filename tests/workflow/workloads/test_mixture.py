"""Families mixed in one stream."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import yaml

from servegym.errors import ConfigError
from servegym.scenario.files import parse
from servegym.workflow.workloads.mixture import Mixture
from servegym.workflow_scenario import WorkflowScenario

PARTS = [
    {"share": 3.0, "workload": {"kind": "map-reduce"}},
    {"share": 1.0, "workload": {"kind": "random-dag", "device_types": ["x", "y"]}},
]


def test_families_come_by_their_shares_and_keep_their_steps():
    mixture = Mixture.model_validate({"parts": PARTS})
    rng = np.random.default_rng(0)
    jobs = [mixture.job(rng) for _ in range(400)]
    count = Counter("llm" if job.template == "map-reduce" else "task" for job in jobs)
    assert count["llm"] / 400 == pytest.approx(0.75, abs=0.06)
    assert mixture.device_types == ("x", "y")
    assert mixture.step_name("map-reduce", 1) == "reduce"
    assert mixture.step_name("another", 1) == "step 1"


def test_same_seed_gives_the_same_jobs():
    mixture = Mixture.model_validate({"parts": PARTS})
    first, again = ([mixture.job(np.random.default_rng(3)) for _ in range(5)] for _ in range(2))
    assert [job.num_stages for job in first] == [job.num_stages for job in again]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts"),
        ([{"share": 0.0, "workload": {"kind": "map-reduce"}}], "share"),
        ([{"share": 1.0, "workload": {"kind": "map-reduced"}}], "kind"),
        ([*PARTS, {"share": 1.0, "workload": {"kind": "random-dag"}}], "the same device_types"),
    ],
)
def test_wrong_parts_are_refused_in_one_sentence(parts, message):
    text = yaml.safe_dump(
        {
            "name": "mine",
            "devices": [{"name": "x"}],
            "engines": [{"gpu": "L40S"}],
            "model": "Llama-3.1-8B",
            "workload": {"kind": "mixture", "parts": parts},
        }
    )
    with pytest.raises(ConfigError, match=message) as error:
        parse(text, "mine.yaml", WorkflowScenario)
    assert "\n" not in str(error.value)
