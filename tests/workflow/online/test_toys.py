"""Small episodes computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.online.registry import online_rule
from servegym.cluster.jit import kernel
from servegym.cluster.spec import Faults
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.errors import InvalidAction
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec, Links
from servegym.workflow.online.state import DECISION, WAIT
from servegym.workflow.online.view import duration_s, view

ONE = FleetSpec((DeviceType("P"),))


def task_job(*durations_s: float, edges: tuple[tuple[int, int], ...] = ()):
    builder = JobBuilder("toy", ("P",))
    for i, work_s in enumerate(durations_s):
        builder.task(i, {"P": work_s})
    for edge in edges:
        builder.edge(*edge)
    return builder.build()


def llm_job(*requests: tuple[int, int], edges: tuple[tuple[int, int, int], ...] = ()):
    builder = JobBuilder("toy")
    for i, (prompt, output) in enumerate(requests):
        builder.llm(i, prompt, output)
    for parent, child, shared in edges:
        builder.edge(parent, child, shared_tokens=shared)
    return builder.build()


def faults(*rows: tuple[float, int, int, float]) -> Faults:
    columns = zip(*rows, strict=True)
    types = (float, np.int16, np.int8, float)
    time_s, device, kind, value = (np.array(x, t) for x, t in zip(columns, types, strict=True))
    return Faults(time_s, device, kind, value)


def test_planned_heft_is_carried_out_as_planned(classic, play):
    names = tuple(f"P{i}" for i in range(3))
    builder = JobBuilder("classic", names)
    for i, row in enumerate(classic.graph.duration_s.tolist()):
        builder.task(i, dict(zip(names, row, strict=True)))
    g = classic.graph
    for u, v, size in zip(g.parent.tolist(), g.child.tolist(), g.transfer_s.tolist(), strict=True):
        builder.edge(u, v, data_bytes=size)
    spec = FleetSpec(tuple(DeviceType(name) for name in names))
    links = Links.uniform(3, bytes_per_s=1.0)
    episode = Episode.of([builder.build()], [0, 1, 2], links=links)
    ranks = Simulator(spec, [episode]).state.stage["rank_s"][0]
    expected = [108, 77, 80, 80, 69, 63 + 1 / 3, 42 + 2 / 3, 35 + 2 / 3, 44 + 1 / 3, 14 + 2 / 3]
    np.testing.assert_allclose(ranks, expected)
    simulator = play(spec, episode, online_rule("heft-replan"))
    assert simulator.jobs()["finish_s"][0] == 80.0
    np.testing.assert_array_equal(simulator.stages()["device"], heft(classic).device_idx)


def test_stage_begins_when_its_data_is_there(play):
    builder = JobBuilder("toy", ("P",))
    first, second = builder.task(0, {"P": 2.0}), builder.task(1, {"P": 1.0})
    builder.edge(first, second, data_bytes=30.0)
    links = Links.uniform(2, latency_s=0.5, bytes_per_s=10.0)
    episode = Episode.of([builder.build()], [0, 0], links=links)
    there = play(ONE, episode, actions=[0 * 2 + 0, 1 * 2 + 1]).stages()
    np.testing.assert_allclose(there["begin_s"], [0.0, 2.0 + 0.5 + 3.0])
    np.testing.assert_allclose(there["finish_s"], [2.0, 6.5])
    here = play(ONE, episode, actions=[0 * 2 + 0, 1 * 2 + 0]).stages()
    np.testing.assert_allclose(here["finish_s"], [2.0, 3.0])


@pytest.mark.parametrize(("move_on", "moves"), [("job", 4), ("template", 1)])
def test_device_pays_for_moving(move_on, moves, play):
    spec = FleetSpec((DeviceType("P"),), move_delay_s=0.5, move_on=move_on)
    job = task_job(1.0, 1.0, edges=((0, 1),))
    # stages 0, 1 are of the first job, 2, 3 of the second: to, fro and to again
    simulator = play(spec, Episode.of([job, job], [0]), actions=[0, 2, 1, 3])
    assert simulator.jobs()["finish_s"].max() == 4.0 + 0.5 * moves


def test_failure_costs_the_work_done_so_far(play):
    episode = Episode.of(
        [task_job(4.0, 1.0)],
        [0, 0],
        faults=faults((3.0, 0, FAULT_DOWN, 0.0), (10.0, 0, FAULT_UP, 0.0)),
    )
    # device 0 fails at 3 under stage 0; stage 1 is over by then, and device 1 free
    stages = play(ONE, episode, actions=[0 * 2 + 0, 1 * 2 + 1, 0 * 2 + 1]).stages()
    assert stages["finish_s"].tolist() == [7.0, 1.0]
    assert stages["num_restarts"].tolist() == [1, 0]
    assert stages["device"].tolist() == [1, 1]


def test_slow_device_stretches_what_is_left(play):
    episode = Episode.of([task_job(4.0)], [0], faults=faults((1.0, 0, FAULT_SLOW, 0.5)))
    assert play(ONE, episode).jobs()["finish_s"][0] == 1.0 + 3.0 / 0.5


def test_slots_run_side_by_side(play):
    spec = FleetSpec((DeviceType("P", slots=2),))
    simulator = play(spec, Episode.of([task_job(2.0, 3.0, 1.0)], [0]), online_rule("fifo"))
    assert simulator.stages()["finish_s"].tolist() == [2.0, 3.0, 3.0]
    devices = simulator.devices()
    assert (devices["busy_s"][0], devices["slot_s"][0]) == (3.0, 6.0)


def test_tool_call_needs_no_device_and_hidden_stage_shows_late(play):
    builder = JobBuilder("toy", ("P",))
    tool, hidden, seen = builder.tool(0, 2.0), builder.task(1, {"P": 1.0}, hidden=True), 2
    builder.task(seen, {"P": 5.0})
    builder.edge(tool, hidden)
    simulator = Simulator(ONE, [Episode.of([builder.build()], [0])])
    assert simulator.advance()[0] == DECISION
    assert simulator.state.job["work_left_s"][0, 0] == 5.0
    assert simulator.startable().tolist() == [2]
    simulator.apply(np.array([WAIT]))
    simulator.advance()
    assert simulator.state.env["now_s"][0] == 2.0
    assert simulator.state.job["work_left_s"][0, 0] == 6.0
    assert sorted(simulator.startable().tolist()) == [1, 2]


def test_lone_llm_stage_takes_its_prefill_and_a_step_a_token(engine, play):
    spec = FleetSpec((DeviceType("E", engine=engine()),))
    # 50 tokens in steps of 20: 3 x 1 s + 50 x 0.1 s, then 3 more tokens of 1.1 s
    stages = play(spec, Episode.of([llm_job((50, 4))], [0])).stages()
    np.testing.assert_allclose(stages["finish_s"], 8.0 + 3.3)


def test_prompts_of_one_moment_share_a_prefill_and_decodes_share_steps(engine, play):
    spec = FleetSpec((DeviceType("E", engine=engine()),))
    stages = play(spec, Episode.of([llm_job((10, 3), (10, 5))], [0])).stages()
    # one step of 20 tokens, 3 s; two steps of two decodes, 1.2 s each; two of one, 1.1 s each
    np.testing.assert_allclose(stages["finish_s"], [3.0 + 2.4, 3.0 + 2.4 + 2.2])


def test_decode_gets_a_token_from_every_step_of_a_prefill(engine, play):
    spec = FleetSpec((DeviceType("E", engine=engine()),))
    episode = Episode.of([llm_job((10, 7)), llm_job((38, 1))], [0], [0.0, 4.2])
    stages = play(spec, episode).stages()
    # prefill 2 s, two decodes 2.2 s; prefill of 38 tokens beside a decode, 19 a step: 2 x 3 s;
    # meanwhile 2 tokens; then 2 more of 1.1 s
    np.testing.assert_allclose(stages["finish_s"], [4.2 + 6.0 + 2.2, 4.2 + 6.0])


def test_full_kv_memory_keeps_a_stage_out(engine, play):
    # 6 blocks of 16: 96 tokens; the stages need 60, 40 and 36
    spec = FleetSpec((DeviceType("E", engine=engine(num_blocks=6)),))
    stages = play(spec, Episode.of([llm_job((50, 10), (35, 5), (30, 6))], [0])).stages()
    assert stages["start_s"][0] == stages["start_s"][2] == 0.0
    assert stages["finish_s"][2] < stages["start_s"][1] == stages["finish_s"][0]


@pytest.mark.parametrize(
    ("devices", "between", "hit"), [((0, 0), 0, 25), ((0, 1), 0, 0), ((0, 0), 70, 0)]
)
def test_shared_prompt_is_cached_where_the_parent_ran_until_overwritten(
    engine, play, devices, between, hit
):
    # 96 tokens of KV memory: the parent leaves 30 in it
    spec = FleetSpec((DeviceType("E", engine=engine(num_blocks=6)),))
    requests = [(25, 5), (40, 2)] + [(between, 1)] * (between > 0)
    edges = [(0, 1, 25)] + ([(0, 2, 0), (2, 1, 0)] if between else [])
    if between:  # parents come first
        requests = [requests[0], requests[2], requests[1]]
        edges = [(0, 2, 25), (0, 1, 0), (1, 2, 0)]
    episode = Episode.of([llm_job(*requests, edges=tuple(edges))], [0, 0])
    last = len(requests) - 1
    actions = [devices[0]] + [1 * 2 + 0] * (between > 0) + [last * 2 + devices[1]]
    stages = play(spec, episode, actions=actions).stages()
    assert stages["cached_tokens"][last] == hit
    prefill_s = stages["finish_s"][last] - stages["start_s"][last] - 1.1
    steps = -(-(40 - hit) // 20)
    assert prefill_s == pytest.approx(steps + 0.1 * (40 - hit))


def test_expected_duration_of_an_llm_stage_is_that_beside_a_typical_batch(engine):
    spec = FleetSpec((DeviceType("E", engine=engine(), typical_batch=3),))
    builder = JobBuilder("toy")
    builder.llm(0, 20, 50, 11.0)
    simulator = Simulator(spec, [Episode.of([builder.build()], [0])])
    stage = simulator.state.stage[0, 0]
    assert stage["mean_s"] == pytest.approx(3.0 + 10 * 1.3)
    assert stage["work_s"] == pytest.approx(3.0 + 10 * 1.3 / 3)
    simulator.tell_truth()
    assert simulator.state.stage[0, 0]["mean_s"] == pytest.approx(3.0 + 49 * 1.3)


def test_wait_lasts_until_something_changes_and_is_refused_for_nothing(play):
    episode = Episode.of([task_job(1.0), task_job(1.0)], [0], [0.0, 5.0])
    simulator = Simulator(ONE, [episode])
    simulator.advance()
    simulator.apply(np.array([WAIT]))
    simulator.advance()
    assert simulator.state.env["now_s"][0] == 5.0
    with pytest.raises(InvalidAction, match="cannot wait: nothing is running"):
        simulator.apply(np.array([WAIT]))


def test_expected_duration_on_an_engine_counts_in_what_runs_and_waits_there(engine):
    spec = FleetSpec((DeviceType("E", engine=engine(), typical_batch=3),))
    jobs = [llm_job((20, 40)), llm_job((30, 21))]
    simulator = Simulator(spec, [Episode.of(jobs, [0])])
    simulator.advance()
    # alone: 5 s for 30 tokens in two steps, 20 tokens at 1 s + 1 x 0.1 s
    assert expected(simulator, 1) == pytest.approx(5.0 + 20 * 1.1)
    simulator.apply(np.array([0]))
    # beside one more, behind its 20 tokens at 3 s / 20 each
    assert expected(simulator, 1) == pytest.approx(5.0 + 20 * 1.2 + 20 * 0.15)


@kernel
def _duration_s(p, s, stage):
    return duration_s(view(p, s, 0), stage, 0)


def expected(simulator: Simulator, stage: int) -> float:
    return _duration_s(simulator.params, simulator.state, stage)
