"""The three kinds of files, and one sentence for each that is none."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from servegym.workflow.dag_file import write_dag
from servegym.workflow.generate import RandomDag
from servegym.workflow.graph import WorkflowError, make_workflow
from servegym.workflow.reader import read_workflow
from servegym.workflow.wfformat import Fleet

DAG = {
    "schema": "servegym-dag-1",
    "name": "small",
    "devices": [
        {"name": "gpu0", "type": "fast"},
        {"name": "gpu1", "type": "fast"},
        {"name": "cpu"},
    ],
    "default_link": {"bytes_per_s": 100.0},
    "links": [{"between": ["gpu0", "gpu1"], "latency_s": 0.5, "bytes_per_s": 1000.0}],
    "tasks": [
        {"name": "a", "duration_s": {"fast": 1.0, "cpu": 5.0}},
        {"name": "b", "duration_s": {"fast": 2.0, "cpu": None}},
        {"name": "c", "duration_s": {"fast": 3.0, "cpu": 4.0}},
    ],
    "edges": [
        {"parent": "a", "child": "b", "bytes": 200.0},
        {"parent": "b", "child": "c", "transfer_s": 0.25},
    ],
}
RECENT = {
    "name": "recent",
    "schemaVersion": "1.5",
    "workflow": {
        "specification": {
            "tasks": [
                {
                    "name": "x",
                    "id": "x1",
                    "parents": [],
                    "children": ["y1"],
                    "outputFiles": ["f", "g"],
                },
                {
                    "name": "y",
                    "id": "y1",
                    "parents": ["x1"],
                    "children": [],
                    "inputFiles": ["f", "h"],
                },
            ],
            "files": [
                {"id": "f", "sizeInBytes": 100},
                {"id": "g", "sizeInBytes": 1000},
                {"id": "h", "sizeInBytes": 1000},
            ],
        },
        # not in the order of the tasks
        "execution": {
            "tasks": [{"id": "y1", "runtimeInSeconds": 6}, {"id": "x1", "runtimeInSeconds": 4}]
        },
    },
}
OLDER = {
    "name": "older",
    "schemaVersion": "1.3",
    "workflow": {
        "tasks": [
            {
                "name": "x",
                "runtimeInSeconds": 4,
                "parents": [],
                "files": [{"link": "output", "name": "f", "sizeInBytes": 100}],
            },
            {
                "name": "y",
                "runtimeInSeconds": 6,
                "parents": ["x"],
                "files": [{"link": "input", "name": "f", "sizeInBytes": 100}],
            },
        ]
    },
}
SHOP = "# two jobs\n2 2\n0 3 1 5\n1 2  0 4\n"


@pytest.fixture
def read(tmp_path):
    """Return a reader of a file that holds the document."""

    def from_document(document, fleet=None):
        path = tmp_path / "dag.json"
        text = document if isinstance(document, str) else json.dumps(document)
        path.write_text(text, encoding="utf-8")
        return read_workflow(path, fleet)

    return from_document


def test_dag_gives_durations_by_type_and_links_by_name(read):
    flow = read(DAG)
    assert (flow.name, flow.tasks, flow.devices) == ("small", (*"abc",), ("gpu0", "gpu1", "cpu"))
    inf = math.inf
    assert flow.graph.duration_s.tolist() == [[1, 1, 5], [2, 2, inf], [3, 3, 4]]
    assert flow.graph.transfer_s.tolist() == [0, 0.25]
    assert flow.graph.data_bytes.tolist() == [200, 0]
    np.testing.assert_allclose(flow.graph.latency_s, [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(
        flow.graph.s_per_byte, [[0, 1e-3, 1e-2], [1e-3, 0, 1e-2], [1e-2, 1e-2, 0]]
    )


def test_one_way_links_may_differ(read):
    there = {"between": ["gpu0", "gpu1"], "bytes_per_s": 1.0, "one_way": True}
    back = {"between": ["gpu1", "gpu0"], "bytes_per_s": 2.0, "one_way": True}
    speeds = read(DAG | {"links": [there, back]}).graph.s_per_byte
    assert (speeds[0, 1], speeds[1, 0]) == (1.0, 0.5)


@pytest.mark.parametrize(
    "flow",
    [
        RandomDag(num_tasks=30, num_devices=3).sample(0),
        make_workflow(
            ["a", "b", "c"],
            ["p", "q"],
            [[1, math.inf], [2, 3], [4, 5]],
            [(0, 1), (0, 2)],
            transfer_s=[0.5, 0.0],
            data_bytes=[math.nan, 8.0],
            latency_s=[[0, 1], [2, 0]],
            s_per_byte=[[0, 0.25], [0, 0]],
            name="both",
        ),
    ],
)
def test_written_dag_reads_back_the_same(tmp_path, flow):
    write_dag(flow, tmp_path / "dag.json")
    back = read_workflow(tmp_path / "dag.json")
    assert (back.name, back.tasks, back.devices) == (flow.name, flow.tasks, flow.devices)
    for one, other in zip(flow.graph, back.graph, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("document", [RECENT, OLDER])
def test_wfformat_scales_runtimes_and_carries_shared_files(read, document):
    flow = read(document, Fleet(speeds=(1.0, 4.0), link_bytes_per_s=50.0, latency_s=0.5))
    assert flow.name == document["name"]
    assert flow.graph.duration_s.tolist() == [[4, 1], [6, 1.5]]
    assert flow.graph.data_bytes.tolist() == [100]
    assert flow.mean_moving_s.tolist() == [0.5 + 100 / 50]


def test_job_shop_is_chains_of_tasks_with_one_machine_each(read):
    flow = read(SHOP)
    inf = math.inf
    assert flow.tasks == ("job0-0", "job0-1", "job1-0", "job1-1")
    assert flow.graph.duration_s.tolist() == [[3, inf], [inf, 5], [inf, 2], [4, inf]]
    assert list(zip(flow.graph.parent, flow.graph.child, strict=True)) == [(0, 1), (2, 3)]


def changed(document, **changes):
    """Return the document with other values at places such as `tasks__0__name`."""
    made = copy.deepcopy(document)
    for place, value in changes.items():
        *keys, last = (int(key) if key.isdigit() else key for key in place.split("__"))
        part = made
        for key in keys:
            part = part[key]
        if value is ...:
            del part[last]
        else:
            part[last] = value
    return made


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (changed(DAG, tasks__1__duration_s={"fast": 2.0}), "task b has no duration on device cpu"),
        (changed(DAG, tasks__1__duration_s__fast=-1), r"tasks\.b\.duration_s\.fast: .* got -1"),
        (changed(DAG, tasks__1__duration_s__fast="long"), r"tasks\.b\.duration_s\.fast: .*'long'"),
        (changed(DAG, tasks__1__name="a"), "task a occurs twice"),
        (changed(DAG, edges__1__child="a"), "in a cycle: a -> b -> a"),
        (changed(DAG, edges__1__child="d"), "unknown task 'd': choose one of a, b, c"),
        (changed(DAG, edges__1__bytes=3), r"edges\.1: an edge has either transfer_s or bytes"),
        (changed(DAG, default_link=...), "device cpu cannot be reached from gpu0"),
        (
            changed(DAG, links__0__between=["gpu0", "gpu2"]),
            "unknown device 'gpu2'.*choose one of cpu, gpu0, gpu1",
        ),
        (changed(DAG, links__0__bytes_per_s=0), "links.0.bytes_per_s: .* greater than 0, got 0"),
        (DAG | {"links": DAG["links"] * 2}, "link from gpu0 to gpu1 is given twice"),
        (changed(DAG, tasks__0__duration={"fast": 1}), r"unknown key tasks\.a\.duration"),
        (changed(DAG, devices=...), "devices: field required"),
        (DAG | {"schema": "servegym-dag-9"}, "schema: .*servegym-dag-1"),
        (DAG | {"tasks": [], "edges": []}, "at least one task"),
        ({}, "must be an object with"),
        ("[1, 2]", "must be an object with"),
        ("{", "is not JSON"),
        ("a,b\n1,2\n", "is no DAG"),
        ("", "must begin with the numbers of jobs and machines"),
        ("2 nan\n", "must begin with the numbers of jobs and machines"),
        ("0 2\n", "must begin with the numbers of jobs and machines"),
        ("2 2\n0 3 1 5\n", "promises 2 jobs and has 1"),
        ("1 2\n0 3 1\n", "job 0 must have 2 pairs"),
        ("1 2\n0 3 2 5\n", "job 0 must visit each machine from 0 to 1 once"),
        ("1 2\n0 3 1 -5\n", "duration of task job0-1 on device machine1 must be at least 0"),
        (changed(RECENT, workflow__execution=...), "'execution' is missing in this WfFormat file"),
        (
            changed(RECENT, workflow__specification__tasks__1__parents=["z"]),
            "task y1 has the parent z, which is no task there",
        ),
        (changed(RECENT, workflow__specification__tasks=3), "is not WfFormat"),
        (
            changed(OLDER, workflow__tasks__1__runtimeInSeconds="long"),
            "the runtime of task y must be a number of seconds from 0, got 'long'",
        ),
    ],
)
def test_wrong_file_is_refused_by_name(read, document, sentence):
    with pytest.raises(WorkflowError, match=sentence) as caught:
        read(document)
    assert "\n" not in str(caught.value)


SPEC, RUN = "workflow__specification__", "workflow__execution__tasks__"
#: Each breaks one thing, and is refused by the name of the task.
BROKEN_RECORDS = {
    "no output files": (
        changed(RECENT, **{SPEC + "tasks__0__outputFiles": []}),
        "task y1 reads f, which no task writes, and nothing that its parent x1 writes",
    ),
    "no output files at all": (
        changed(RECENT, **{SPEC + "tasks__0__outputFiles": ...}),
        "task y1 reads f, which no task writes, and nothing that its parent x1 writes",
    ),
    "input that nobody writes": (
        changed(RECENT, **{SPEC + "tasks__1__inputFiles": ["h"]}),
        "task y1 reads h, which no task writes",
    ),
    "input that nobody writes, older": (
        changed(OLDER, workflow__tasks__1__files__0__name="h"),
        "task y reads h, which no task writes",
    ),
    "null runtime": (
        changed(RECENT, **{RUN + "0__runtimeInSeconds": None}),
        "the runtime of task y1 must be a number of seconds from 0, got null",
    ),
    "no runtime": (
        changed(RECENT, **{RUN + "0__runtimeInSeconds": ...}),
        "the runtime of task y1 must be a number of seconds from 0, got null or none",
    ),
    "negative runtime": (changed(RECENT, **{RUN + "1__runtimeInSeconds": -1}), "task x1 .* got -1"),
    "runtime that is none": (
        changed(RECENT, **{RUN + "1__runtimeInSeconds": math.nan}),
        "task x1 .* got nan",
    ),
    "true runtime": (
        changed(OLDER, workflow__tasks__0__runtimeInSeconds=True),
        "task x .* got True",
    ),
    "two runtimes": (changed(RECENT, **{RUN + "0__id": "x1"}), "task x1 has two runtimes"),
    "not executed": (changed(RECENT, **{RUN + "1": ...}), "task x1 has no runtime"),
    "two tasks of a name": (
        changed(RECENT, **{SPEC + "tasks__1__id": "x1"}),
        "task x1 occurs twice",
    ),
    "unknown child": (
        changed(RECENT, **{SPEC + "tasks__0__children": ["y1", "z"]}),
        "task x1 has the child z, which is no task there",
    ),
    "child without its parent": (
        changed(RECENT, **{SPEC + "tasks__1__parents": []}),
        "task x1 has the child y1, which does not name it among its parents",
    ),
    "no parents": (changed(RECENT, **{SPEC + "tasks__0__parents": ...}), "task x1 .* got nothing"),
    "parents in one word": (
        changed(RECENT, **{SPEC + "tasks__1__parents": "x1"}),
        "task y1 must have a list of names as parents, empty for none, got 'x1'",
    ),
    "own parent": (
        changed(OLDER, workflow__tasks__0__parents=["x"]),
        "in a cycle: x -> x",
    ),
    "cycle": (changed(OLDER, workflow__tasks__0__parents=["y"]), "in a cycle: x -> y -> x"),
    "no size": (
        changed(RECENT, **{SPEC + "files__0__sizeInBytes": None}),
        "the size of f, which task x1 writes and task y1 reads, must be .* got None",
    ),
    "file not listed": (changed(RECENT, **{SPEC + "files__0": ...}), "size of f, .* task x1"),
    "two sizes": (
        changed(OLDER, workflow__tasks__1__files__0__sizeInBytes=200),
        "size of f, .* task x writes .* got 100 and 200",
    ),
    "negative size": (
        changed(RECENT, **{SPEC + "files__0__sizeInBytes": -1}),
        "size of f, .* got -1",
    ),
    "link of another kind": (
        changed(OLDER, workflow__tasks__0__files__0__link="both"),
        "file f of task x has link 'both'",
    ),
    "key twice": (
        json.dumps(RECENT).replace('"id": "x1",', '"id": "x0", "id": "x1",', 1),
        "the key 'id' is given twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN_RECORDS)
def test_a_broken_record_is_refused_by_the_name_of_the_task(read, case):
    document, sentence = BROKEN_RECORDS[case]
    with pytest.raises(WorkflowError, match=sentence) as caught:
        read(document)
    assert "\n" not in str(caught.value)


def test_raw_inputs_and_edges_of_order_alone_are_read(read):
    # y1 also reads h, which nobody writes; z1 waits for y1 and reads nothing
    more = copy.deepcopy(RECENT)
    spec, run = more["workflow"]["specification"], more["workflow"]["execution"]
    spec["tasks"].append({"name": "z", "id": "z1", "parents": ["y1"], "children": []})
    spec["tasks"][1]["children"] = ["z1"]
    run["tasks"].append({"id": "z1", "runtimeInSeconds": 1})
    assert read(more).graph.data_bytes.tolist() == [100, 0]


@pytest.mark.parametrize("document", [DAG, RECENT, OLDER, SHOP])
def test_a_byte_order_mark_is_no_part_of_the_file(read, document):
    text = document if isinstance(document, str) else json.dumps(document)
    assert read("\ufeff" + text).tasks == read(text).tasks


def test_a_duration_given_twice_is_refused(read):
    text = json.dumps(DAG).replace('{"fast": 1.0,', '{"fast": 1.0, "fast": 9.0,')
    with pytest.raises(WorkflowError, match="the key 'fast' is given twice"):
        read(text)


@pytest.mark.parametrize("document", [DAG, SHOP])
def test_devices_for_a_file_that_names_its_own_are_refused(read, document):
    with pytest.raises(WorkflowError, match=r"dag\.json names its own devices"):
        read(document, Fleet())


def nodes_of(part, way=()):
    """Yield the way to every value of a document."""
    items = part.items() if isinstance(part, dict) else enumerate(part)
    for key, value in items:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from nodes_of(value, (*way, key))


ANY_VALUE = [
    None,
    True,
    -1,
    0,
    3.5,
    1e400,
    2**70,
    "",
    "x1",
    "z",
    [],
    ["x1"],
    [[]],
    {},
    {"id": "x1"},
]


@pytest.mark.parametrize("value", ANY_VALUE, ids=repr)
@pytest.mark.parametrize("document", [DAG, RECENT, OLDER], ids=["dag", "recent", "older"])
def test_any_value_anywhere_is_read_or_refused(read, document, value):
    refused = 0
    for way in nodes_of(document):
        made = copy.deepcopy(document)
        part = made
        for key in way[:-1]:
            part = part[key]
        part[way[-1]] = value
        try:
            read(made)
        except WorkflowError:
            refused += 1
    assert refused > 0


def test_missing_file_and_bytes_are_refused(tmp_path):
    with pytest.raises(WorkflowError, match=r"none\.json cannot be read: No such file"):
        read_workflow(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkflowError, match=r"bytes\.json cannot be read: it is no text"):
        read_workflow(tmp_path / "bytes.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speeds": ()}, "speeds must be numbers above 0"),
        ({"speeds": (1.0, 0.0)}, "speeds must be numbers above 0"),
        ({"link_bytes_per_s": 0.0}, "link_bytes_per_s must be above 0"),
        ({"latency_s": math.nan}, "latency_s must be at least 0"),
    ],
)
def test_impossible_fleet_is_refused(changes, sentence):
    with pytest.raises(WorkflowError, match=sentence):
        Fleet(**changes)
