"""First choices of the online rules, each computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.workflow.online.registry import online_rule
from servegym.cluster.spec import Faults
from servegym.cluster.state import FAULT_DOWN, FAULT_UP
from servegym.errors import ConfigError
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import begin, run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec, Links
from servegym.workflow.online.state import DECISION, WAIT

SPEC = FleetSpec((DeviceType("A"), DeviceType("B")))
INF = float("inf")


def job(*stages: tuple[float, float], edges=(), deadline_s=INF, weight=1.0):
    builder = JobBuilder("toy", ("A", "B"))
    for i, (a, b) in enumerate(stages):
        builder.task(i, {"A": a, "B": b})
    for edge in edges:
        builder.edge(*edge)
    return builder.build(deadline_s, weight)


def choices(name, jobs, types=(0, 1), arrival_s=0.0, count=99) -> list[tuple[int, int] | int]:
    """(stage, device) of the first decisions, or `WAIT`."""
    simulator = Simulator(SPEC, [Episode.of(jobs, list(types), arrival_s)])
    policy = online_rule(name)
    begin(simulator, policy)
    taken: list[tuple[int, int] | int] = []
    while len(taken) < count and simulator.advance()[0] == DECISION:
        action = policy.act(simulator, np.zeros(1, np.int64))
        taken.append(WAIT if action[0] == WAIT else divmod(int(action[0]), len(types)))
        simulator.apply(action)
    return taken


def starts(*args, **kwargs) -> list[tuple[int, int]]:
    return [x for x in choices(*args, **kwargs) if x != WAIT]


def test_fifo_takes_the_oldest_job_and_its_fastest_free_device():
    # stage 0 on B (1 s), stage 1 on A; at 1 s stage 2 goes to B, which is free
    assert starts("fifo", [job((4, 1), (3, 2)), job((1, 1))]) == [(0, 1), (1, 0), (2, 1)]


def test_fifo_does_not_let_a_long_way_go_first():
    chain = job((1, 1), (1, 1), (5, 5), edges=((1, 2),))
    assert starts("fifo", [chain], types=[0])[:2] == [(0, 0), (1, 0)]


def test_sjf_takes_the_job_with_the_least_work_and_its_critical_path():
    small = job((1, 1), (2, 2), (1, 1), edges=((1, 2),))  # 4 s in all
    assert starts("sjf-cp", [job((5, 5)), small], types=[0]) == [(2, 0), (1, 0), (3, 0), (0, 0)]


def test_srpt_goes_by_what_is_left():
    # at 3 s: job 0 has 2 s of 5 s left, job 1 has all of its 4 s; SJF would change over
    jobs = [job((3, 3), (2, 2), edges=((0, 1),)), job((4, 4))]
    arrival_s = [0.0, 1.0]
    assert starts("srpt-cp", jobs, [0], arrival_s) == [(0, 0), (1, 0), (2, 0)]
    assert starts("sjf-cp", jobs, [0], arrival_s) == [(0, 0), (2, 0), (1, 0)]


def test_fair_gives_every_job_the_same_number_of_devices():
    jobs = [job((2, 2), (2, 2), (2, 2)), job((2, 2), (2, 2))]
    assert starts("fair", jobs, [0, 0, 0], count=3) == [(0, 0), (3, 1), (1, 2)]


def test_weighted_fair_gives_devices_by_a_power_of_the_work():
    jobs = [job((8, 8), (8, 8)), job((1, 1), (1, 1), (1, 1))]  # 16 s and 3 s
    # alpha 1: (0 + 1) / 16, then 2 / 16 < 1 / 3; alpha -1: 1 * 3, 2 * 3, 3 * 3 < 1 * 16
    assert [v for v, _ in starts("weighted-fair:alpha=1", jobs, [0] * 3, count=3)] == [0, 1, 2]
    assert [v for v, _ in starts("weighted-fair:alpha=-1", jobs, [0] * 3, count=3)] == [2, 3, 4]


def test_etf_takes_what_can_begin_first_where_it_can():
    builder = JobBuilder("toy", ("A", "B"))
    first = builder.task(0, {"A": 1.0, "B": 9.0})
    builder.edge(first, builder.task(1, {"A": 1.0, "B": 1.0}), data_bytes=1.0)
    episode = Episode.of([builder.build()], [0, 1], links=Links.uniform(2, latency_s=3.0))
    simulator = Simulator(SPEC, [episode])
    run(simulator, online_rule("etf"))
    assert simulator.stages()["device"].tolist() == [0, 0]


def test_heft_rt_leaves_a_stage_to_its_best_device_though_another_is_free():
    # by rank: 10 (mean of 2 and 18), then 5.5: A until 2 s, then 1 s there is 3 s < 10 s on B
    assert choices("heft-rt", [job((2, 18), (1, 10))], count=3) == [(0, 0), WAIT, (1, 0)]
    # with 2.5 s on B it does not wait
    assert choices("heft-rt", [job((2, 18), (1, 2.5))], count=2) == [(0, 0), (1, 1)]


def test_heft_rt_goes_by_rank_in_each_job():
    chain = job((1, 1), (1, 1), (5, 5), edges=((1, 2),))
    assert starts("heft-rt", [chain], [0]) == [(1, 0), (2, 0), (0, 0)]


def test_replanned_heft_inserts_and_plans_anew_for_an_arrival():
    # planned at 0: 4 s, then 1 s on the only device; at 1 s a longer job arrives and goes before
    jobs = [job((4, 4), (1, 1)), job((3, 3))]
    assert starts("heft-replan", jobs, [0], [0.0, 1.0]) == [(0, 0), (2, 0), (1, 0)]


def test_mct_commits_when_a_stage_is_ready():
    # 0 to A (2 s); 1: A at 2 + 2 = 4 s, B at 5 s: A; 2: A at 6 s, B at 5 s: B
    jobs = [job((2, 5))] * 3
    assert starts("mct", jobs) == [(0, 0), (2, 1), (1, 0)]


def test_round_robin_goes_round_and_sticks_to_it():
    jobs = [job((5, 1))] * 4
    assert starts("round-robin", jobs) == [(0, 0), (1, 1), (3, 1), (2, 0)]


def test_round_robin_passes_devices_that_cannot_run_the_stage():
    jobs = [job((1, INF)), job((1, INF)), job((1, 1))]
    assert starts("round-robin", jobs) == [(0, 0), (2, 1), (1, 0)]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("edd", [2, 1, 0]),
        # at 0: max(8.5, 1), max(8, 10), max(7, 9)
        ("mdd", [0, 2, 1]),
        # slack 7.5, -2, -2
        ("least-slack", [1, 2, 0]),
        # on the fastest device 10 > 8 and 9 > 7: both hopeless
        ("least-slack:hopeless_last=1", [0, 1, 2]),
        # 1/1 exp(-7.5 / (2 * 20/3)) = 0.57; 1/10; 1/9
        ("atc", [0, 2, 1]),
    ],
)
def test_due_date_rules(name, order):
    jobs = [
        job((1, 1), deadline_s=8.5),
        job((10, 10), deadline_s=8.0),
        job((9, 9), deadline_s=7.0),
    ]
    first = starts(name, jobs, [0], count=1)
    assert first == [(order[0], 0)]
    if name in ("edd", "least-slack"):
        assert [v for v, _ in starts(name, jobs, [0])] == order


def test_hexgen_trades_speed_against_work():
    # stage 0 to A, idle; stage 1: A 0.2 * 1 - 0.8 * 1 = -0.6, B 0.2 * 2/4 - 0 = 0.1: B;
    # stage 2: A -0.6, B 0.1 - 0.8 * 4/2 = -1.5: A
    jobs = [job((2, 4))] * 3
    assert starts("hexgen-fcfs:alpha=0.2", jobs) == [(0, 0), (1, 1), (2, 0)]
    # speed alone: all to A
    assert starts("hexgen-fcfs:alpha=1", jobs) == [(0, 0), (1, 0), (2, 0)]


def test_cumulative_hexgen_remembers_work_that_has_ended():
    jobs, arrival_s = [job((2, 4))] * 3, [0.0, 10.0, 20.0]
    # outstanding: A is idle each time; cumulative: 2 s on A against 0 on B, then 2 against 4
    assert [d for _, d in starts("hexgen-fcfs", jobs, arrival_s=arrival_s)] == [0, 0, 0]
    assert [d for _, d in starts("hexgen-cumulative-fcfs", jobs, arrival_s=arrival_s)] == [0, 1, 0]


def test_urgency_takes_what_is_furthest_behind_its_share_of_the_limit():
    # at 0: 5 - 5 and 2 - 20; at 5 s, when the device is free, job 1: 2 - (20 - 5) = -13; job 2, a
    # chain, has half of its limit of 20 s for its first stage: 2 - (10 - 4) = -4; at 7 s job 1 is
    # at -11, and the rest of job 2, with all of the 14 s that are left, at 2 - 14 = -12
    jobs = [
        job((5, 5), deadline_s=5.0),
        job((2, 2), deadline_s=20.0),
        job((2, 2), (2, 2), edges=((0, 1),), deadline_s=20.0),
    ]
    arrival_s = [0.0, 0.0, 1.0]
    taken = [v for v, _ in starts("round-robin-urgency", jobs, [0], arrival_s)]
    assert taken == [0, 2, 1, 3]
    assert [v for v, _ in starts("round-robin", jobs, [0], arrival_s)] == [0, 1, 2, 3]


def test_queues_of_a_failed_device_go_to_others():
    faults = Faults(
        np.array([1.0, 50.0]),
        np.zeros(2, np.int16),
        np.array([FAULT_DOWN, FAULT_UP], np.int8),
        np.zeros(2),
    )
    episode = Episode.of([job((3, 3))] * 4, [0, 1], faults=faults)
    simulator = Simulator(SPEC, [episode])
    run(simulator, online_rule("round-robin"))
    assert simulator.stages()["device"].tolist() == [1, 1, 1, 1]
    assert simulator.jobs()["finish_s"].max() == 12.0


def test_random_takes_every_start_alike():
    counts = np.zeros((2, 2))
    simulator = Simulator(SPEC, [Episode.of([job((1, 1), (1, 1))], [0, 1])] * 400)
    run(simulator, online_rule("random"), seed=0)
    for env in range(400):
        device = simulator.stages(env)["device"]
        counts[np.arange(2), device] += 1
    assert counts[0, 0] == counts[1, 1]
    assert abs(counts[0, 0] - 200) < 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hexgem", "unknown policy 'hexgem'.*did you mean hexgen"),
        ("hexgen:beta=1", "unknown parameter of hexgen 'beta'"),
        ("fifo:alpha=1", "fifo has no parameters"),
        ("atc:k=0", "parameter k of atc must be a number from 0.001"),
        ("weighted-fair:alpha=x", "must be a number from -10 to 10, got 'x'"),
        ("hexgen:alpha=.3,alpha=.5", "parameter alpha of hexgen must be given once"),
        ("hexgen-oracle:alpha=.3,alpha=.3", "must be given once"),
        ("random-oracle", "unknown policy 'random-oracle'"),
    ],
)
def test_wrong_name_or_parameter_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        online_rule(text)
