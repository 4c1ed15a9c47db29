"""Ranks in lockstep, by hand and against ranks that share nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.validate.engine import EngineConstants, EngineSetup, step_cost
from servegym.validate.ranks import SharedCost
from servegym.validate.replay import replay_open

NOTHING = SharedCost(np.array([1.0, 2.0]), np.zeros(2), np.zeros(2))


def engine(grid, **limits):
    return ReplicaType("toy", grid, **{"num_blocks": 100, "max_num_seqs": 8, **limits})


def test_request_of_an_idle_rank_waits_for_the_joint_step(second_steps):
    shared = replace(NOTHING, experts_s=np.full(2, 1.0), exchange_s=np.full(2, 0.5))
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


def test_exchange_goes_by_the_fullest_rank_and_experts_by_all_tokens(second_steps):
    knots = np.array([1.0, 100.0])
    shared = SharedCost(knots, experts_s=10 * knots, exchange_s=1000 * knots)
    replay = replay_open(
        engine(second_steps),
        np.zeros(2),
        np.array([2, 9]),
        np.array([1, 1]),
        num_replicas=2,
        shared=shared,
    )
    np.testing.assert_allclose(replay.e2e_s, 1 + 10 * 11 + 1000 * 9)


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
    cost, shared = step_cost("RTX-PRO-6000", "Qwen3-30B-A3B", 1, "bf16"), setup.shared()
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
