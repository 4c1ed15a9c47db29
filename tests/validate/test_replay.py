"""Closed loops: by hand, and replayed through the plain simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.spec import ClusterSpec, Episode, Link, ReplicaType
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.validate.replay import replay_closed, replay_open
from servegym.workloads.table import RequestTable

KNOTS = 1.0 + np.arange(NUM_SHARED_KNOTS)
NOTHING = SharedCost(2, KNOTS, 0 * KNOTS, 0 * KNOTS, 0 * KNOTS, 0)
TERMS = SharedCost(2, KNOTS, 10 * KNOTS, 30 * KNOTS, 1000 * KNOTS, 0)


def engine(grid, **limits):
    return ReplicaType("toy", grid, **{"num_blocks": 100, "max_num_seqs": 8, **limits})


def test_one_client_sends_its_next_request_when_the_last_has_ended(second_steps):
    two = np.full(3, 2)
    replay = replay_closed([(engine(second_steps), 1)], 1, np.full(3, 4), two)
    np.testing.assert_allclose(replay.arrival_s, [0, 2, 4])
    np.testing.assert_allclose(replay.ttft_s, 1)  # the engine is idle: a prefill step
    np.testing.assert_allclose(replay.e2e_s, 2)
    assert replay.makespan_s == pytest.approx(6)
    assert replay.output_tokens_per_s == pytest.approx(1)


def test_request_misses_the_step_that_begins_as_it_arrives(second_steps):
    # 0 ends at 1; 2 arrives then, while 1 decodes from 1 to 2, and is admitted at 2
    replay = replay_closed([(engine(second_steps), 1)], 2, np.full(3, 4), np.array([1, 3, 1]))
    np.testing.assert_allclose(replay.arrival_s, [0, 0, 1])
    np.testing.assert_allclose(replay.ttft_s, [1, 1, 2])
    np.testing.assert_allclose(replay.e2e_s, [1, 3, 2])
    np.testing.assert_allclose(replay.tpot_s, [np.nan, 1, np.nan])


@pytest.mark.parametrize("seed", range(4))
def test_closed_loop_is_what_the_plain_simulator_makes_of_its_arrivals(second_steps, seed):
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(1, 40, 30), rng.integers(1, 12, 30)
    clients = int(rng.integers(1, 12))
    # few blocks and slots: requests are preempted and queue inside the engine
    replica = engine(second_steps, num_blocks=12, max_num_seqs=4, max_num_batched_tokens=32)
    replay = replay_closed([(replica, 1)], clients, prompt, output, block_size=4 + seed)
    ends = np.sort(replay.arrival_s + replay.e2e_s)
    np.testing.assert_array_equal(replay.arrival_s[:clients], 0)
    np.testing.assert_allclose(replay.arrival_s[clients:], ends[: 30 - clients], rtol=1e-12)

    table = RequestTable.build(replay.arrival_s, prompt, output)
    episode = Episode(table, np.zeros(1, np.int16), np.ones(1))
    plain = ReferenceSimulator(ClusterSpec((replica,), block_size=4 + seed), episode)
    plain.run(lambda simulator, request: 0)
    outcomes = outcomes_from_events(plain.events(), table)
    np.testing.assert_allclose(outcomes["finish_s"], replay.arrival_s + replay.e2e_s, rtol=1e-9)
    np.testing.assert_allclose(
        outcomes["first_token_s"], replay.arrival_s + replay.ttft_s, rtol=1e-9
    )


def test_open_loop_is_the_same_with_and_without_its_steps_recorded(second_steps):
    rng = np.random.default_rng(0)
    arrival = np.sort(rng.uniform(0, 50, 40))
    prompt, output = rng.integers(1, 40, 40), rng.integers(1, 12, 40)
    replica = engine(second_steps, max_num_seqs=4)
    fast = replay_open(replica, arrival, prompt, output)
    recorded = replay_open(replica, arrival, prompt, output, record=True)
    np.testing.assert_array_equal(fast.e2e_s, recorded.e2e_s)
    assert len(fast.steps) == 0
    assert len(recorded.steps) > 0


def test_series_counts_requests_and_blocks_at_each_time(second_steps):
    # at 0 two requests of 16 tokens; one slot: the second waits until the first ends at 3
    replica = engine(second_steps, max_num_seqs=1, num_blocks=10)
    replay = replay_open(
        replica, np.zeros(2), np.full(2, 16), np.full(2, 3), block_size=16, record=True
    )
    series = replay.series(np.array([0.5, 3.5, 6.5]))
    np.testing.assert_array_equal(series["running"], [1, 1, 0])
    np.testing.assert_array_equal(series["waiting"], [1, 0, 0])
    np.testing.assert_allclose(series["kv_cache_pct"], [10, 10, 0])


def test_ranks_take_turns_while_they_are_equally_loaded(second_steps):
    # two slots in all: each rank serves one request at a time, the third waits for either
    replica = engine(second_steps, max_num_seqs=1)
    replay = replay_open(
        replica, np.array([0.0, 0.5, 0.6]), np.full(3, 4), np.full(3, 2), num_replicas=2
    )
    np.testing.assert_allclose(replay.e2e_s, [2, 2, 1.4 + 2])
    assert replay.num_blocks == 200


def test_request_of_an_idle_rank_waits_for_the_joint_step(second_steps):
    shared = replace(NOTHING, experts_s=0 * KNOTS + 1, skewed_experts_s=0 * KNOTS + 1)
    shared = replace(shared, exchange_s=0 * KNOTS + 0.5)
    replay = replay_open(
        engine(second_steps, shared=shared),
        np.array([0.0, 1.0]),
        np.full(2, 4),
        np.full(2, 2),
        num_replicas=2,
        record=True,
    )
    # steps of 1 s on a rank and 1.5 s together; the second request misses the first of them
    np.testing.assert_allclose(replay.ttft_s, [2.5, 4.0])
    np.testing.assert_allclose(replay.e2e_s, [5.0, 6.5])
    assert set(replay.steps["replica"]) == {0, 1}


def test_clients_send_again_when_a_rank_has_finished_for_them(second_steps):
    # two ranks, three clients with six requests of one token: a step of 1 s each, and a request
    # sent at its end misses the step that begins then
    rank = engine(second_steps, shared=NOTHING)
    replay = replay_closed([(rank, 2)], 3, np.full(6, 4), np.full(6, 1))
    np.testing.assert_allclose(replay.arrival_s[:3], 0.0)
    assert (replay.arrival_s[3:] >= 1.0).all()
    assert (replay.e2e_s >= 1.0).all()
    assert len(replay.e2e_s) == 6


def test_one_rank_serves_clients_as_an_engine_does(second_steps):
    prompt, output = np.array([4, 9, 2, 7, 5, 5, 3]), np.array([3, 1, 4, 2, 2, 5, 1])
    rank, alone = (
        replay_closed([(engine(second_steps, shared=shared), 1)], 3, prompt, output)
        for shared in (replace(NOTHING, num_ranks=1), None)
    )
    np.testing.assert_allclose(rank.arrival_s, alone.arrival_s)
    np.testing.assert_allclose(rank.e2e_s, alone.e2e_s)


def test_rank_with_more_work_holds_the_others_up(second_steps):
    # a rank's own step takes a second a token; the second rank has a prompt of 9 tokens
    slow = replace(second_steps, cpu_s=0.0, dense_s=second_steps.dense_tokens.copy())
    rank = engine(slow, shared=NOTHING)
    times = replay_open(rank, np.zeros(2), np.array([2, 9]), np.array([1, 1]), num_replicas=2)
    np.testing.assert_allclose(times.e2e_s, [9, 9])


@pytest.mark.parametrize(
    ("largest_graph", "fullest", "tokens"),
    [(0, 9, 11), (8, 9, 11), (16, 16, 32)],  # a graph of 16 holds 9 tokens, on both ranks
)
def test_exchange_goes_by_the_fullest_rank_and_experts_by_all_tokens(
    second_steps, largest_graph, fullest, tokens
):
    rank = engine(second_steps, shared=replace(TERMS, largest_graph=largest_graph))
    replay = replay_open(rank, np.zeros(2), np.array([2, 9]), np.array([1, 1]), num_replicas=2)
    np.testing.assert_allclose(replay.e2e_s, 1 + 30 * tokens + 1000 * fullest)


def test_decodes_fall_evenly_on_experts_and_chunks_do_not(second_steps):
    rank = engine(second_steps, shared=TERMS)
    replay = replay_open(rank, np.zeros(2), np.array([2, 9]), np.array([2, 2]), num_replicas=2)
    np.testing.assert_allclose(replay.e2e_s - replay.ttft_s, 1 + 10 * 2 + 1000 * 1)


@pytest.mark.parametrize("seed", range(3))
def test_one_rank_that_shares_nothing_is_an_engine_of_its_own(second_steps, seed):
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0, 60, 40))
    prompt, output = rng.integers(1, 40, 40), rng.integers(1, 12, 40)
    # few blocks and slots: requests are preempted and queue inside the engine
    replica = engine(second_steps, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=32)
    alone = replay_open(replica, arrival, prompt, output, block_size=4)
    replica = replace(replica, shared=replace(NOTHING, num_ranks=1))
    rank = replay_open(replica, arrival, prompt, output, block_size=4)
    np.testing.assert_allclose(rank.e2e_s, alone.e2e_s, rtol=1e-9)
    np.testing.assert_allclose(rank.ttft_s, alone.ttft_s, rtol=1e-9)
    assert rank.num_preemptions == alone.num_preemptions > 0


def test_workers_that_prefill_serve_those_that_decode(second_steps):
    prefill, decode = (
        replace(engine(second_steps), role=role, link=Link(8.0)) for role in ("prefill", "decode")
    )
    fleet = [(prefill, 1), (decode, 2)]
    three = np.full(4, 3)
    replay = replay_closed(fleet, 2, np.full(4, 16), three, block_size=4, kv_token_bytes=1.0)
    # both prompts in one step to 1; 16 bytes take 2 s, one after the other; then a step a token
    np.testing.assert_allclose(replay.ttft_s[:2], [1 + 2 + 1, 1 + 4 + 1])
    np.testing.assert_allclose(replay.tpot_s[:2], 1)
    assert replay.num_blocks == 300
