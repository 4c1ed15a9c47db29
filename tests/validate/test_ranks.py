"""Ranks in lockstep, by hand and against ranks that share nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.validate.engine import EngineConstants, EngineSetup
from servegym.validate.ranks import SharedCost, graph_tokens
from servegym.validate.replay import replay_closed, replay_open

NOTHING = SharedCost(np.array([1.0, 2.0]), np.zeros(2), np.zeros(2), np.zeros(2), 0)


def engine(grid, **limits):
    return ReplicaType("toy", grid, **{"num_blocks": 100, "max_num_seqs": 8, **limits})


def test_request_of_an_idle_rank_waits_for_the_joint_step(second_steps):
    shared = replace(
        NOTHING,
        experts_s=np.full(2, 1.0),
        skewed_experts_s=np.full(2, 1.0),
        exchange_s=np.full(2, 0.5),
    )
    replay = replay_open(
        engine(second_steps),
        np.array([0.0, 1.0]),
        np.full(2, 4),
        np.full(2, 2),
        num_replicas=2,
        shared=shared,
        record=True,
    )
    # steps of 1 s on a rank and 1.5 s together; the second request misses the first of them
    np.testing.assert_allclose(replay.ttft_s, [2.5, 4.0])
    np.testing.assert_allclose(replay.e2e_s, [5.0, 6.5])
    assert set(replay.steps["replica"]) == {0, 1}


def test_clients_send_again_when_a_rank_has_finished_for_them(second_steps):
    # two ranks, three clients with six requests of one token: a step of 1 s each, and a request
    # sent at its end misses the step that begins then
    replay = replay_closed(
        engine(second_steps),
        3,
        np.full(6, 4),
        np.full(6, 1),
        num_ranks=2,
        shared=NOTHING,
    )
    np.testing.assert_allclose(replay.arrival_s[:3], 0.0)
    assert (replay.arrival_s[3:] >= 1.0).all()
    assert (replay.e2e_s >= 1.0).all()
    assert len(replay.e2e_s) == 6


def test_one_rank_serves_clients_as_an_engine_does(second_steps):
    prompt, output = np.array([4, 9, 2, 7, 5, 5, 3]), np.array([3, 1, 4, 2, 2, 5, 1])
    rank, alone = (
        replay_closed(engine(second_steps), 3, prompt, output, shared=shared)
        for shared in (NOTHING, None)
    )
    np.testing.assert_allclose(rank.arrival_s, alone.arrival_s)
    np.testing.assert_allclose(rank.e2e_s, alone.e2e_s)


def test_rank_with_more_work_holds_the_others_up(second_steps):
    # a rank's own step takes a second a token; the second rank has a prompt of 9 tokens
    slow = replace(second_steps, cpu_s=0.0, dense_s=second_steps.dense_tokens.copy())
    times = replay_open(
        engine(slow),
        np.zeros(2),
        np.array([2, 9]),
        np.array([1, 1]),
        num_replicas=2,
        shared=NOTHING,
    )
    np.testing.assert_allclose(times.e2e_s, [9, 9])


KNOTS = np.array([1.0, 100.0])
TERMS = SharedCost(
    KNOTS,
    experts_s=10 * KNOTS,
    skewed_experts_s=30 * KNOTS,
    exchange_s=1000 * KNOTS,
    largest_graph=0,
)


@pytest.mark.parametrize(
    ("largest_graph", "fullest", "tokens"),
    [(0, 9, 11), (8, 9, 11), (16, 16, 32)],  # a graph of 16 holds 9 tokens, on both ranks
)
def test_exchange_goes_by_the_fullest_rank_and_experts_by_all_tokens(
    second_steps, largest_graph, fullest, tokens
):
    replay = replay_open(
        engine(second_steps),
        np.zeros(2),
        np.array([2, 9]),
        np.array([1, 1]),
        num_replicas=2,
        shared=replace(TERMS, largest_graph=largest_graph),
    )
    np.testing.assert_allclose(replay.e2e_s, 1 + 30 * tokens + 1000 * fullest)


def test_decodes_fall_evenly_on_experts_and_chunks_do_not(second_steps):
    replay = replay_open(
        engine(second_steps),
        np.zeros(2),
        np.array([2, 9]),
        np.array([2, 2]),
        num_replicas=2,
        shared=TERMS,
    )
    np.testing.assert_allclose(replay.e2e_s - replay.ttft_s, 1 + 10 * 2 + 1000 * 1)


def test_sizes_of_graphs():
    found = [graph_tokens(n) for n in (1, 2, 3, 5, 8, 9, 250, 257, 500)]
    assert found == [1, 2, 4, 8, 8, 16, 256, 272, 512]


def test_fullest_rank_takes_longer_than_its_share():
    setup = EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B", expert_ranks=2, max_num_seqs=128)
    shared = setup.shared()
    many = (shared.tokens > 1000) & (shared.tokens < 9000)
    assert (shared.skewed_experts_s[many] > 1.1 * shared.experts_s[many]).all()
    assert shared.largest_graph == 256


@pytest.mark.parametrize("seed", range(3))
def test_one_rank_that_shares_nothing_is_an_engine_of_its_own(second_steps, seed):
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0, 60, 40))
    prompt, output = rng.integers(1, 40, 40), rng.integers(1, 12, 40)
    # few blocks and slots: requests are preempted and queue inside the engine
    replica = engine(second_steps, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=32)
    alone = replay_open(replica, arrival, prompt, output, block_size=4)
    rank = replay_open(replica, arrival, prompt, output, block_size=4, shared=NOTHING)
    np.testing.assert_allclose(rank.e2e_s, alone.e2e_s, rtol=1e-9)
    np.testing.assert_allclose(rank.ttft_s, alone.ttft_s, rtol=1e-9)
    assert rank.num_preemptions == alone.num_preemptions > 0


def test_shared_terms_and_own_work_are_the_whole_step():
    setup = EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B", expert_ranks=2)
    cost, shared = setup.cost(), setup.shared()
    grid = setup.replica(EngineConstants()).grid
    tokens = shared.tokens[40]
    own_s = grid.cpu_s + grid.dense(tokens)
    # two ranks compute half the experts each
    assert own_s + 2 * shared.experts_s[40] == pytest.approx(
        sum(cost.terms(tokens).values()), rel=0.02
    )
    assert shared.exchange_s[40] > 2 * cost.model.layers * cost.operators.all_gather_s(
        2 * 2 * tokens * cost.model.hidden, 2
    )
    assert EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B").shared() is None
