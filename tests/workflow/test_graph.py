"""What a workflow may be, and the sentence for each that is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.workflow.graph import WorkflowError, make_workflow

TWO = ["p", "q"]


def chain(**changes):
    """Two tasks, one edge of 10 bytes, two devices."""
    given = {
        "tasks": ["a", "b"],
        "devices": TWO,
        "duration_s": [[1, 2], [3, 4]],
        "edges": [(0, 1)],
        "data_bytes": [10.0],
        "latency_s": 0.5,
        "s_per_byte": 0.1,
    }
    return make_workflow(**(given | changes))


def test_mean_moving_time_is_over_pairs_of_distinct_devices():
    flow = chain(latency_s=[[9, 1], [3, 9]], s_per_byte=[[9, 0.1], [0.3, 9]])
    # there 1 + 10 * 0.1 = 2, back 3 + 10 * 0.3 = 6
    assert flow.mean_moving_s.tolist() == [4.0]


def test_time_given_for_an_edge_holds_on_any_link_and_needs_none():
    flow = chain(data_bytes=None, transfer_s=[7.0], latency_s=math.inf)
    assert flow.mean_moving_s.tolist() == [7.0]


def test_moving_between_tasks_of_a_single_device_costs_nothing():
    flow = chain(devices=["p"], duration_s=[[1], [3]])
    assert flow.mean_moving_s.tolist() == [0.0]


def test_mean_duration_leaves_out_devices_that_cannot_run_a_task():
    flow = chain(duration_s=[[1, math.inf], [3, 4]])
    assert flow.mean_duration_s.tolist() == [1.0, 3.5]


def test_order_of_edges_as_given_does_not_matter():
    duration_s = [[1, 1]] * 3
    edges, times = [(0, 1), (0, 2), (1, 2)], [1.0, 2.0, 3.0]
    flow = make_workflow(["a", "b", "c"], TWO, duration_s, edges, transfer_s=times)
    back = make_workflow(["a", "b", "c"], TWO, duration_s, edges[::-1], transfer_s=times[::-1])
    assert len(flow.graph)
    for one, other in zip(flow.graph, back.graph, strict=True):
        np.testing.assert_array_equal(one, other)


def test_order_puts_parents_first_when_they_come_last_in_the_file():
    flow = make_workflow(["c", "b", "a"], TWO, [[1, 1]] * 3, [(2, 1), (1, 0)])
    assert flow.graph.order.tolist() == [2, 1, 0]


def test_cycle_is_refused_by_the_names_of_its_tasks():
    # e lies behind the cycle, a ahead of it: neither is part of it
    tasks = ["a", "b", "c", "d", "e"]
    edges = [(0, 1), (1, 2), (2, 3), (3, 1), (3, 4)]
    with pytest.raises(WorkflowError, match=r"in a cycle: b -> c -> d -> b$"):
        make_workflow(tasks, TWO, [[1, 1]] * 5, edges)


def test_task_that_waits_for_itself_is_refused():
    with pytest.raises(WorkflowError, match=r"in a cycle: b -> b$"):
        chain(edges=[(1, 1)])


def test_long_cycle_is_named_in_one_line():
    n = 3000
    edges = [(v, (v + 1) % n) for v in range(n)]
    with pytest.raises(WorkflowError, match=r"t0 -> t1 -> .* -> \.\.\. -> t0$") as caught:
        make_workflow([f"t{v}" for v in range(n)], ["p"], [[1]] * n, edges)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ["a", "a"]}, "task a occurs twice"),
        ({"devices": ["p", "p"]}, "device p occurs twice"),
        ({"devices": [], "duration_s": []}, "at least one device"),
        ({"duration_s": [[1, 2], [3, math.nan]]}, "task b has no duration on device q"),
        ({"duration_s": [[1, 2], [-3, 4]]}, "duration of task b on device p must be at least 0"),
        ({"duration_s": [[math.inf, math.inf], [3, 4]]}, "task a can run on none of the devices"),
        ({"edges": [(0, 2)]}, "a task that does not exist"),
        ({"edges": [(0, 1), (0, 1)], "data_bytes": [1, 1]}, "edge from a to b occurs twice"),
        ({"data_bytes": [-1.0]}, "bytes of the edge from a to b must be .* got -1"),
        ({"transfer_s": [math.nan]}, "transfer_s of the edge from a to b .* got nan"),
        ({"s_per_byte": [[0, 1], [math.inf, 0]]}, "device p cannot be reached from q: give a link"),
        ({"latency_s": -1.0}, "link from p to q must take at least 0 s"),
    ],
)
def test_wrong_workflow_is_refused_by_name(changes, sentence):
    with pytest.raises(WorkflowError, match=sentence):
        chain(**changes)
