"""Requests that wait for the ends of others: by hand, and what holds of every closed loop."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    DECISION,
    DONE,
    EV_ARRIVE,
    EV_FINISH,
    EV_REJECT,
    FAULT_DOWN,
    FAULT_UP,
    NEVER,
    Asks,
)
from servegym.errors import WorkloadError
from servegym.scenario import load_scenario
from servegym.workloads.table import ANY_END, RequestTable

from ..toys import linear_grid  # noqa: TID252 - tests are no package
from .strategies import random_case, with_followers
from .test_invariants import play as play_to_the_end
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)


def waiting_episode(requests, after, delay_s, **settings):
    """Make a toy episode whose requests wait for others."""
    episode = toy_episode(requests, **settings)
    table = replace(
        episode.table, after=np.array(after, np.int32), delay_s=np.array(delay_s, float)
    )
    return replace(episode, table=table)


def test_a_request_arrives_its_delay_after_the_end_of_the_one_it_waits_for(play):  # noqa: F811
    episode = waiting_episode([(0, 10, 3), (0, 10, 1)], [-1, 0], [0, 5])
    played = play(toy_cluster(), episode, {})
    # the first ends at 2 + 1.111 + 1.112 (test_toys); the second arrives 5 s later, and its prompt
    # takes 2 s
    assert_times(played, arrival_s=[0, 9.223], scheduled_s=[0, 9.223], finish_s=[4.223, 11.223])
    assert [request for _, request in played.decided] == [0, 1]


def test_without_a_delay_it_misses_the_step_that_begins_when_the_other_ends(play):  # noqa: F811
    episode = waiting_episode([(0, 10, 1), (0, 10, 3), (0, 10, 1)], [-1, -1, 0], [0, 0, 0])
    played = play(toy_cluster(), episode, {})
    # prefill of both 1 + 20 * 0.1 = 3, the first ends. Decode of the second, kv 11: 1.111. Then its
    # decode of kv 12 with the 10 tokens of the third: 1 + 1.1 + 0.012 = 2.112
    assert_times(played, arrival_s=[0, 0, 3], scheduled_s=[0, 0, 4.111], finish_s=[3, 6.223, 6.223])


def test_an_idle_engine_serves_it_at_once_with_what_arrives_at_that_instant(play):  # noqa: F811
    episode = waiting_episode([(0, 10, 1), (0, 5, 1), (2, 5, 1)], [-1, 0, -1], [0, 0, 0])
    played = play(toy_cluster(), episode, {})
    # the first ends at 2, when the third arrives: in table order, both in one step of 2 s
    assert_times(played, arrival_s=[0, 2, 2], finish_s=[2, 4, 4])
    assert played.decided == [(0.0, 0), (2.0, 1), (2.0, 2)]


def test_arrivals_of_an_instant_go_in_table_order_whether_they_waited_or_not(play):  # noqa: F811
    episode = waiting_episode([(0, 10, 1), (2, 5, 1), (2, 5, 1)], [-1, -1, 0], [0, 0, 0])
    played = play(toy_cluster(), episode, {})
    assert played.decided == [(0.0, 0), (2.0, 1), (2.0, 2)]


def test_several_may_wait_for_the_same_one(play):  # noqa: F811
    episode = waiting_episode([(0, 10, 1), (0, 10, 1), (0, 10, 1)], [-1, 0, 0], [0, 4, 1])
    played = play(toy_cluster(), episode, {})
    assert_times(played, arrival_s=[0, 6, 3], finish_s=[2, 8, 5])


def test_whoever_is_free_next_sends_the_next_request(play):  # noqa: F811
    # two clients, five requests of one step each; both replicas serve one request at a time
    requests = [(0, 10, 1), (0, 30, 1), (0, 20, 1), (0, 20, 1), (0, 10, 1)]
    episode = waiting_episode(
        requests, [-1, -1, ANY_END, ANY_END, ANY_END], [0, 0, 1, 0, 0], type_idx=[0, 0]
    )
    played = play(toy_cluster(), episode, {1: [1], 2: [0], 3: [1], 4: [0]})
    # a step of so many tokens: 10 -> 2 s, 20 -> 3 s, 30 -> 4 s. The first is free at 2 and waits
    # 1 s: 3 to 6; the second sends the fourth at 4: to 7; the first the fifth at 6: to 8
    assert_times(played, arrival_s=[0, 0, 3, 4, 6], finish_s=[2, 4, 6, 7, 8])


def test_a_rejection_is_an_end_too(play):  # noqa: F811
    episode = waiting_episode([(1, 10, 1), (1, 10, 1)], [-1, 0], [0, 3])
    played = play(toy_cluster(allow_reject=True), episode, {0: [2]})  # 2 rejects
    assert played.outcomes["rejected"].tolist() == [True, False]
    assert_times(played, arrival_s=[1, 4], finish_s=[1, 6])


def test_a_hold_or_a_failure_of_the_one_puts_the_other_off(play):  # noqa: F811
    episode = waiting_episode(
        [(0, 10, 1), (0, 10, 1)],
        [-1, 0],
        [0, 1],
        faults=[(1.0, 0, FAULT_DOWN, 0.0), (2.0, 0, FAULT_UP, 0.0)],
    )
    played = play(toy_cluster(allow_hold=True, hold_s=0.5), episode, {0: [1]})  # 1 holds
    # held to 0.5, on the replica when it fails at 1; held by itself to 1.5 and 2 (the fault comes
    # first: it is up), then 2 s of prefill
    assert_times(played, arrival_s=[0, 5], finish_s=[4, 7])


def test_a_chain_is_one_request_at_a_time_to_the_end():
    n = 200
    rng = np.random.default_rng(0)
    requests = [(0.0, int(p), int(o)) for p, o in rng.integers(1, 40, (n, 2))]
    delay_s = rng.exponential(2.0, n)
    episode = waiting_episode(requests, np.arange(n) - 1, delay_s)
    sim = play_to_the_end(toy_cluster(), episode)
    run = sim.outcomes()
    np.testing.assert_allclose(run["arrival_s"][1:], run["finish_s"][:-1] + delay_s[1:], rtol=1e-12)
    assert (run["scheduled_s"] >= run["arrival_s"]).all()


def test_more_users_than_an_open_loop_could_bear_slow_themselves_down():
    # 64 users who think for 1 s each; one request costs 1.5 s alone, and only one is served at once
    spec = toy_cluster(replica_type(linear_grid(cpu_s=0.5, pair_s=0.0), seqs=1, budget=256))
    users, turns = 64, 20
    after = np.arange(users * turns) - users
    episode = waiting_episode(
        [(0.0, 10, 1)] * users * turns, np.maximum(after, -1), np.full(users * turns, 1.0)
    )
    run = play_to_the_end(spec, episode).outcomes()
    # after the first round everybody waits for the 63 others: R = N / X - Z, with X = 1 / 1.5
    later = run["finish_s"][users:-users] - run["arrival_s"][users:-users]
    np.testing.assert_allclose(later, users * 1.5 - 1.0, rtol=1e-9)


def loops(seed: int, users: int, turns: int, think_s: float):
    """Users whose turns wait for their last answers; the first ones arrive at random."""
    spec, _ = random_case(seed)
    rng = np.random.default_rng((seed, 4))
    n = users * turns
    after = np.maximum(np.arange(n) - users, -1)
    first_s = np.sort(rng.uniform(0, 2, users))
    arrival_s = np.concatenate((first_s, np.full(n - users, first_s[-1])))
    delay_s = np.where(after < 0, 0.0, rng.exponential(think_s, n))
    table = RequestTable.build(
        arrival_s, rng.integers(1, 70, n), rng.integers(1, 50, n), after=after, delay_s=delay_s
    )
    episode = toy_episode([(0.0, 1, 1)] * n, speed=[1.0, 0.7], type_idx=[0, 0])
    return spec, replace(episode, table=table)


@pytest.mark.parametrize("seed", range(20))
def test_the_laws_of_little_and_of_interactive_response_times_hold_exactly(seed):
    users, turns = 6, 8
    spec, episode = loops(seed, users, turns, think_s=0.2)
    sim = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER))
    sim.advance()
    run, events = sim.outcomes(), sim.events()
    response_s = run["finish_s"] - run["arrival_s"]
    # Little: the integral of those in the system is the sum of their times there
    ended = np.isin(events["kind"], (EV_FINISH, EV_REJECT))
    in_system = np.cumsum((events["kind"] == EV_ARRIVE) * 1 - ended)[:-1]
    assert in_system.max() <= users
    integral = math.fsum(in_system * np.diff(events["time_s"]))
    assert integral == pytest.approx(math.fsum(response_s), rel=1e-9)
    assert float(sim.state.env[0]["area"]) == pytest.approx(math.fsum(response_s), rel=1e-9)
    # N = X (R + Z): each user is waiting or thinking, from the first turn's arrival to the last end
    span_s = run["finish_s"][-users:] - run["arrival_s"][:users]
    mean_span_s = math.fsum(span_s) / users
    throughput_rps = users * turns / mean_span_s
    cycle_s = math.fsum(response_s) + math.fsum(episode.table.delay_s)
    assert throughput_rps * cycle_s / (users * turns) == pytest.approx(users, rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_every_request_of_a_random_closed_loop_ends_once(seed):
    spec, episode = with_followers(*random_case(seed), seed)
    sim = play_to_the_end(spec, episode)
    run, table = sim.outcomes(), episode.table
    assert np.isfinite(run["finish_s"]).all()
    waits = table.after >= 0
    sent = table.after == ANY_END
    assert sent.sum() > 0
    ends = np.sort(run["finish_s"])[: sent.sum()]
    np.testing.assert_array_equal(run["arrival_s"][sent], ends + table.delay_s[sent])
    np.testing.assert_array_equal(
        run["arrival_s"][waits], run["finish_s"][table.after[waits]] + table.delay_s[waits]
    )
    np.testing.assert_array_equal(run["arrival_s"][~waits & ~sent], table.arrival_s[~waits & ~sent])


def test_who_has_not_arrived_yet_has_no_arrival():
    episode = waiting_episode([(0, 10, 1), (0, 10, 1), (50, 10, 1)], [-1, 0, -1], [0, 5, 0])
    sim = Simulator(toy_cluster(), [episode])
    for expected in ([0, np.nan, np.nan], [0, 7, np.nan], [0, 7, 50]):
        assert sim.advance()[0] == DECISION
        np.testing.assert_allclose(sim.outcomes()["arrival_s"], expected)
        sim.apply(np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"after": [-1, 1]}, r"after must be an earlier request, .* got 1 in request 1"),
        ({"after": [-1, -3]}, "got -3 in request 1"),
        ({"after": [-2, -1]}, "the first request has no end to wait for"),
        ({"delay_s": [0.0, -1.0]}, "delay_s must be finite and at least 0, got -1.0 in request 1"),
        ({"delay_s": [0.0, np.nan]}, "got nan in request 1"),
    ],
)
def test_a_table_refuses_what_nobody_can_wait_for(columns, message):
    arrays = {name: np.array(values) for name, values in columns.items()}
    with pytest.raises(WorkloadError, match=message):
        RequestTable.build(np.zeros(2), np.ones(2), np.ones(2), **arrays)


def test_a_part_of_a_table_keeps_who_waits_for_whom():
    table = RequestTable.build(
        np.arange(5.0), np.ones(5), np.ones(5), after=np.array([-1, 0, 1, 1, -1])
    )
    assert table.take(np.array([0, 1, 3])).after.tolist() == [-1, 0, 1]
    # the first is left out: the second arrives by itself
    assert table.take(np.array([1, 2, 4])).after.tolist() == [-1, 0, -1]
    assert table.window(1.0, 3.0).after.tolist() == [-1, 0, 0]
    queue = RequestTable.build(np.arange(4.0), np.ones(4), np.ones(4), after=[-1, -2, -2, 1])
    assert queue.take(np.array([1, 2, 3])).after.tolist() == [-1, -2, 0]


def test_overload_slows_users_who_wait_and_buries_those_who_do_not():
    def worst_s(wait: bool) -> float:
        scenario = load_scenario("mixed-chat")
        sessions = scenario.workload.sessions.model_copy(update={"wait_for_answers": wait})
        workload = scenario.workload.model_copy(update={"sessions": sessions})
        scenario = scenario.model_copy(update={"workload": workload})
        episode = scenario.episode(0, load=4.0, num_requests=1500)
        sim = Simulator(scenario.spec, [episode], asks=Asks(dispatch=NEVER))
        assert sim.advance()[0] == DONE
        run = sim.outcomes()
        return float((run["first_token_s"] - run["arrival_s"]).max())

    assert worst_s(True) < 0.8 * worst_s(False)
