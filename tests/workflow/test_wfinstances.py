"""Recorded workflows of WfCommons, where the extract of them is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.workflow.registry import DAG_RULES
from servegym.workflow.bounds import lower_bound_s
from servegym.workflow.schedule import violations
from servegym.workflow.wfformat import Fleet, workflow_on_fleet

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"


@pytest.fixture(scope="module")
def flows():
    """Every recorded workflow; an edge carries at most what its parent wrote and its child read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [TRACES / f"wfinstances_{part}_le1000tasks.parquet" for part in ("nodes", "edges")]
    if not all(file.exists() for file in files):
        pytest.skip("the extract of WfCommons is not at hand")
    nodes, edges = (parquet.read_table(file).to_pydict() for file in files)
    made = []
    for name in dict.fromkeys(nodes["workflow"]):
        rows = [i for i, other in enumerate(nodes["workflow"]) if other == name]
        pairs = [i for i, other in enumerate(edges["workflow"]) if other == name]
        place = {nodes["task"][i]: v for v, i in enumerate(rows)}
        ends = sorted({(place[edges["parent"][i]], place[edges["child"][i]]) for i in pairs})
        wrote, read = (
            np.array([nodes[key][i] or 0 for i in rows], float)
            for key in ("output_bytes", "input_bytes")
        )
        made.append(
            workflow_on_fleet(
                name,
                [str(nodes["task"][i]) for i in rows],
                [nodes["runtime_s"][i] for i in rows],
                ends,
                [min(wrote[u], read[v]) for u, v in ends],
                Fleet(),
            )
        )
    return made


@pytest.mark.parametrize("name", list(DAG_RULES))
def test_recorded_workflow_is_scheduled(flows, name):
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
