"""Jobs of tasks from random DAGs and from recorded workflows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.errors import ServeGymError, WorkloadError
from servegym.workflow.workloads.from_workflow import job_from_workflow
from servegym.workflow.workloads.registry import draw
from servegym.workflow.workloads.wfcommons import WfCommons, read_records


def test_workflow_keeps_durations_and_sizes_in_an_order_of_parents_first(classic):
    job = job_from_workflow(classic, "classic", link_bytes_per_s=10.0)
    order = classic.graph.order
    assert np.array_equal(job.duration_s, classic.graph.duration_s[order])
    place = np.argsort(order)
    for e in range(classic.num_edges):
        ends = place[classic.graph.parent[e]], place[classic.graph.child[e]]
        (mine,) = np.flatnonzero((job.parent == ends[0]) & (job.child == ends[1]))
        assert job.data_bytes[mine] == 10.0 * classic.graph.transfer_s[e]


@pytest.mark.parametrize("ccr", [0.1, 1.0, 10.0])
def test_random_dags_have_the_ratio_and_the_spread_asked_for(ccr):
    jobs = draw("random-dag", np.random.default_rng(0), 60, ccr=ccr, heterogeneity=0.5)
    duration_s = np.concatenate([job.duration_s for job in jobs])
    assert duration_s.mean() == pytest.approx(1.0, rel=0.06)
    moving_s = np.concatenate([job.data_bytes for job in jobs]) / 1.25e9
    assert moving_s.mean() == pytest.approx(ccr, rel=0.06)
    spread = duration_s / duration_s.mean(1, keepdims=True)
    # each within a quarter of the task's mean; the row's own mean is of four of them
    assert 0.6 < spread.min() < 0.75
    assert 1.25 < spread.max() < 1.45
    assert all(job.num_stages == 50 for job in jobs)


@pytest.mark.parametrize(("shape", "levels"), [(0.5, 20), (2.0, 5)])
def test_random_dags_have_the_depth_of_their_shape(shape, levels):
    depths = []
    for job in draw("random-dag", np.random.default_rng(1), 200, num_tasks=100, shape=shape):
        depth = np.ones(job.num_stages, int)
        for u, v in zip(job.parent, job.child, strict=True):
            depth[v] = max(depth[v], depth[u] + 1)
        depths.append(depth.max())
    assert np.mean(depths) == pytest.approx(levels, rel=0.15)


def test_records_of_a_folder_share_labels(records_folder):
    jobs = WfCommons(path=str(records_folder), time_scale=0.5).jobs()
    assert [job.template for job in jobs] == ["chain", "fork"]
    assert [job.label.tolist() for job in jobs] == [[0, 1], [0, 1, 1]]
    assert jobs[1].duration_s[:, 0].tolist() == [5.0, 5.5, 6.0]
    assert jobs[1].duration_s[0].tolist() == [5.0, 2.5, 1.25]
    assert jobs[1].data_bytes.tolist() == [1000, 1000]


def test_records_are_drawn_by_size(records_folder):
    drawn = draw("wfcommons", np.random.default_rng(0), 30, path=str(records_folder))
    assert {job.template for job in drawn} == {"chain", "fork"}
    few = draw("wfcommons", np.random.default_rng(0), 9, path=str(records_folder), max_tasks=2)
    assert {job.template for job in few} == {"chain"}
    with pytest.raises(WorkloadError, match="no workflow of 9 to 1000 tasks"):
        draw("wfcommons", np.random.default_rng(0), 1, path=str(records_folder), min_tasks=9)


def test_folder_without_records_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match=r"must hold WfFormat files"):
        WfCommons(path=str(tmp_path)).jobs()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(WorkloadError, match=r"a\.json is not JSON"):
        WfCommons(path=str(tmp_path)).jobs()


def test_tables_are_read_as_files_are(tmp_path, records_folder):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nodes = {
        "workflow": [],
        "task": [],
        "name": [],
        "runtime_s": [],
        "input_bytes": [],
        "output_bytes": [],
    }
    edges = {"workflow": [], "parent": [], "child": []}
    for name in ("chain", "fork"):
        body = json.loads((records_folder / f"{name}.json").read_text())["workflow"]
        for i, task in enumerate(body["specification"]["tasks"]):
            values = (name, i, task["name"], 10.0 + i, 1000 if i else None, 0 if i else 1500)
            for key, value in zip(nodes, values, strict=True):
                nodes[key].append(value)
            if i:
                for key, value in zip(edges, (name, 0, i), strict=True):
                    edges[key].append(value)
    parquet.write_table(pa.table(nodes), tmp_path / "my_nodes.parquet")
    parquet.write_table(pa.table(edges), tmp_path / "my_edges.parquet")
    ours = WfCommons(path=str(tmp_path)).jobs()
    theirs = WfCommons(path=str(records_folder)).jobs()
    for a, b in zip(ours, theirs, strict=True):
        assert a.template == b.template
        for key in ("label", "duration_s", "parent", "child", "data_bytes"):
            assert np.array_equal(getattr(a, key), getattr(b, key)), key
    parquet.write_table(pa.table({"workflow": ["x"]}), tmp_path / "my_edges.parquet")
    read_records.cache_clear()
    with pytest.raises(WorkloadError, match=r"my_edges.parquet has no column child, parent"):
        WfCommons(path=str(tmp_path)).jobs()


def test_recorded_workflows_of_wfcommons_become_jobs(wfinstances_folder):
    jobs = WfCommons(path=str(wfinstances_folder)).jobs()
    assert len(jobs) == 70
    assert sum(job.num_stages for job in jobs) == 13417
    blast = [job for job in jobs if job.template.startswith("blast")]
    # split, search in many parts, and two that join them
    assert all(len(set(job.label.tolist())) == 4 for job in blast)


NODES = {
    "workflow": ["w", "w"],
    "task": [0, 1],
    "name": ["a_1", "b_1"],
    "runtime_s": [1.0, 2.0],
    "input_bytes": [0, 7],
    "output_bytes": [9, 0],
}
EDGES = {"workflow": ["w"], "parent": [0], "child": [1]}


def tables(folder, nodes=NODES, edges=EDGES):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(nodes), folder / "nodes.parquet")
    parquet.write_table(pa.table(edges), folder / "edges.parquet")
    return WfCommons(path=str(folder))


def test_tables_are_read_as_they_are(tmp_path):
    (job,) = tables(tmp_path).jobs()
    assert job.data_bytes.tolist() == [7]


@pytest.mark.parametrize(
    ("nodes", "edges", "sentence"),
    [
        ({"runtime_s": [1.0, None]}, {}, "task 1 of w, column runtime_s: None is not a number"),
        ({"output_bytes": [None, 0]}, {}, "task 0 of w, column output_bytes: None is not a number"),
        (
            {"input_bytes": [0, -7]},
            {},
            "task 1 of w, column input_bytes: must be at least 0, got -7",
        ),
        ({"task": [0, 0]}, {"child": [0]}, "task 0 occurs twice"),
        ({}, {"child": [5]}, "an edge of w names task 5, which nodes.parquet lacks"),
        ({}, {"workflow": ["v"]}, "edges.parquet has edges of v, which nodes.parquet lacks"),
    ],
)
def test_tables_that_are_wrong_are_refused_by_task(tmp_path, nodes, edges, sentence):
    with pytest.raises(ServeGymError, match=sentence):
        tables(tmp_path, NODES | nodes, EDGES | edges).jobs()
