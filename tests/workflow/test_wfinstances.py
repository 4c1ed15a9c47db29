"""Recorded workflows of WfCommons, where the extract of them is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.workflow.registry import DAG_RULES
from servegym.workflow.bounds import lower_bound_s
from servegym.workflow.schedule import violations
from servegym.workflow.wfformat import Fleet
from servegym.workflow.workloads.wfcommons import read_records

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"


@pytest.fixture(scope="module")
def flows():
    """Every recorded workflow; an edge carries at most what its parent wrote and its child read."""
    pytest.importorskip("pyarrow")
    if not (TRACES / "wfinstances_nodes_le1000tasks.parquet").exists():
        pytest.skip("the extract of WfCommons is not at hand")
    return [record.workflow for record in read_records(TRACES, Fleet())]


@pytest.mark.parametrize("name", list(DAG_RULES))
def test_recorded_workflow_is_scheduled(flows, name):
    assert flows
    for flow in flows:
        schedule = DAG_RULES[name](flow)
        assert violations(schedule) == [], flow.name
        assert schedule.makespan_s >= lower_bound_s(flow), flow.name


def test_heft_beats_cpop_and_met_on_recorded_workflows(flows):
    mean = {
        name: np.mean([DAG_RULES[name](flow).slr for flow in flows])
        for name in ("heft", "cpop", "met")
    }
    assert mean["heft"] < mean["cpop"]
    assert mean["heft"] < mean["met"]
