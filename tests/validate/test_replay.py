"""Closed loops: by hand, and replayed through the plain simulator."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType
from servegym.validate.replay import replay_closed, replay_open
from servegym.workloads.table import RequestTable


def engine(grid, **limits):
    return ReplicaType("toy", grid, **{"num_blocks": 100, "max_num_seqs": 8, **limits})


def test_one_client_sends_its_next_request_when_the_last_has_ended(second_steps):
    two = np.full(3, 2)
    replay = replay_closed(engine(second_steps), 1, np.full(3, 4), two)
    np.testing.assert_allclose(replay.arrival_s, [0, 2, 4])
    np.testing.assert_allclose(replay.ttft_s, 1)  # the engine is idle: a prefill step
    np.testing.assert_allclose(replay.e2e_s, 2)
    assert replay.makespan_s == pytest.approx(6)
    assert replay.output_tokens_per_s == pytest.approx(1)


def test_request_misses_the_step_that_begins_as_it_arrives(second_steps):
    # 0 ends at 1; 2 arrives then, while 1 decodes from 1 to 2, and is admitted at 2
    replay = replay_closed(engine(second_steps), 2, np.full(3, 4), np.array([1, 3, 1]))
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
    replay = replay_closed(replica, clients, prompt, output, block_size=4 + seed)
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
