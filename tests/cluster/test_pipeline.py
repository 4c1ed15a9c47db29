"""Replicas with the stages of a pipeline: by hand, and both programs alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, ReplicaType
from servegym.cluster.state import DONE, EV_PREEMPT, FAULT_DOWN, FAULT_UP, NEVER, Asks
from servegym.cluster.tier_rules import KvTier
from servegym.costs.grid import NUM_DENSE_KNOTS, CostGrid
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.costs.stages import StageGrids
from servegym.errors import ConfigError

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from ..toys import constant_grid, token_grid  # noqa: TID252
from .strategies import (
    long_answers,
    random_case,
    with_conversations,
    with_followers,
    with_stages,
)
from .test_differential import assert_same_events, assert_same_log
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

ENGINES = ("vllm", "trtllm")


def staged(*stages: CostGrid, handover_s: float = 0.0, **limits: int) -> ReplicaType:
    """Make a toy engine with stages."""
    pipeline = StageGrids(stages, np.full(NUM_DENSE_KNOTS, handover_s))
    return replace(replica_type(pipeline.shared_round, **limits), pipeline=pipeline)


def toy(*stages: CostGrid, handover_s: float = 0.0, **limits: int) -> ClusterSpec:
    return toy_cluster(staged(*stages, handover_s=handover_s, **limits))


def test_a_batch_alone_takes_the_time_of_all_stages_and_handovers(play):  # noqa: F811
    # 1 s, half a second on the way, 2 s: the other stage is idle meanwhile
    spec = toy(constant_grid(1.0), constant_grid(2.0), handover_s=0.5)
    played = play(spec, toy_episode([(0, 10, 3)]), {})
    assert_times(played, scheduled_s=[0], first_token_s=[3.5], finish_s=[10.5])


def test_two_batches_go_round_in_the_time_of_the_slowest_stage(play):  # noqa: F811
    # prompts of 10 tokens, a budget of 10: the second batch is on the first stage from 1 to 2, and
    # on the second when the first has left it, 3.5 to 5.5; from then on the slowest stage is never
    # idle, and either request has a token every 2 x 2 s
    spec = toy(constant_grid(1.0), constant_grid(2.0), handover_s=0.5, budget=10)
    played = play(spec, toy_episode([(0, 10, 3), (0, 10, 3)]), {})
    assert_times(played, scheduled_s=[0, 0], first_token_s=[3.5, 5.5], finish_s=[11.5, 13.5])


def test_requests_that_share_a_batch_leave_the_other_stage_idle(play):  # noqa: F811
    # with room for both prompts there is one batch, now and ever after: a bubble of half the time
    spec = toy(constant_grid(2.0), constant_grid(2.0), budget=20)
    played = play(spec, toy_episode([(0, 10, 3), (0, 10, 3)]), {})
    assert_times(played, first_token_s=[4, 4], finish_s=[12, 12])


def test_stages_take_what_the_tokens_of_each_batch_cost_there(play):  # noqa: F811
    # 1 s + 0.1 s a token, and 0.5 s + 0.2 s: 8 tokens take 1.8 and 2.1 s, 4 tokens 1.4 and 1.3 s
    spec = toy(token_grid(1.0, 0.1), token_grid(0.5, 0.2), budget=8)
    played = play(spec, toy_episode([(0, 8, 1), (0, 4, 1)]), {})
    # the second enters at 1.8, is ready at 3.2, and waits until the first leaves, at 3.9
    assert_times(played, first_token_s=[3.9, 5.2])


def test_the_next_chunk_of_a_prompt_follows_in_the_next_batch(play):  # noqa: F811
    # the second chunk is on the first stage while the first is on the second
    spec = toy(constant_grid(1.0), constant_grid(1.0), budget=4, seqs=4)
    played = play(spec, toy_episode([(0, 8, 2)]), {})
    assert_times(played, first_token_s=[3], finish_s=[5])


def test_a_request_that_comes_meanwhile_waits_for_the_oldest_batch(play):  # noqa: F811
    # there is room for a batch at 0.5, but the engine waits for the first; both then share one
    spec = toy(constant_grid(1.0), constant_grid(1.0))
    played = play(spec, toy_episode([(0, 8, 2), (0.5, 8, 1)]), {})
    assert_times(played, scheduled_s=[0, 2], first_token_s=[2, 4], finish_s=[4, 4])


def test_who_is_preempted_in_flight_loses_the_token(play):  # noqa: F811
    # two blocks: at 2 the first request needs the one of the second, whose batch is on the last
    # stage until 3 and keeps the next one waiting; the second begins anew at 6, when the first ends
    spec = toy(constant_grid(1.0), constant_grid(1.0), budget=4, seqs=4, num_blocks=2)
    played = play(spec, toy_episode([(0, 4, 3), (0, 4, 2)]), {})
    assert_times(played, first_token_s=[2, 8], finish_s=[6, 10])
    assert played.outcomes["num_preemptions"].tolist() == [0, 1]


def test_a_failure_loses_all_batches_in_flight(play):  # noqa: F811
    # both prompts are under way at 1.5; nobody takes them then, and 4 s later all begins anew
    spec = toy_cluster(staged(constant_grid(1.0), constant_grid(1.0), budget=10), hold_s=4.0)
    faults = [(1.5, 0, FAULT_DOWN, 0.0), (5.0, 0, FAULT_UP, 0.0)]
    played = play(spec, toy_episode([(0, 10, 1), (0, 10, 1)], faults=faults), {})
    assert_times(played, finish_s=[7.5, 8.5])
    assert played.outcomes["num_restarts"].tolist() == [1, 1]


def test_limit_on_sequences_is_of_all_batches_in_vllm_and_of_each_in_trtllm(play):  # noqa: F811
    stages = constant_grid(1.0), constant_grid(1.0)
    kind = staged(*stages, budget=40, seqs=1)
    episode = toy_episode([(0, 10, 1), (0, 10, 1)])
    assert_times(play(toy_cluster(kind), episode, {}), scheduled_s=[0, 2])
    trtllm = replace(kind, engine="trtllm")
    assert trtllm.max_num_running == 2
    assert_times(play(toy_cluster(trtllm), episode, {}), scheduled_s=[0, 0], finish_s=[2, 3])


def test_a_pipeline_of_one_stage_does_what_an_engine_does():
    for seed in range(8400, 8420):
        spec, episode = random_case(seed, ENGINES)
        spec = replace(spec, prefix_caching=False)
        types = tuple(
            replace(kind, pipeline=StageGrids((kind.grid,), np.zeros(NUM_DENSE_KNOTS)))
            for kind in spec.types
        )
        logs = []
        for played in (spec, replace(spec, types=types)):
            sim = Simulator(played, [episode], record=True, asks=Asks(dispatch=NEVER))
            assert sim.advance()[0] == DONE
            logs.append(sim.events())
        assert_same_log(*logs)


@pytest.mark.parametrize("block", blocks(3))
def test_compiled_and_plain_simulator_agree_on_batches_in_flight(block):
    for seed in range(8000 + 20 * block, 8020 + 20 * block):
        assert_same_events(*with_stages(*random_case(seed, ENGINES), seed))


def test_they_agree_beside_replicas_of_other_engines_and_clients_that_wait():
    for seed in range(8200, 8212):
        spec, episode = random_case(seed, ("vllm", "trtllm", "sglang", "vllm-priority"))
        assert_same_events(*with_followers(*with_stages(spec, episode, seed), seed))


def test_they_agree_on_turns_that_keep_their_blocks():
    for seed in range(8300, 8308):
        spec, episode = with_stages(*random_case(seed), seed)
        assert_same_events(*with_conversations(spec, episode, seed))


def test_they_agree_on_requests_that_outgrow_their_blocks():
    preempted = 0
    for seed in range(2):
        spec, episode = with_stages(*long_answers(seed, "vllm"), seed)
        slow = assert_same_events(replace(spec, chunked_prefill=True), episode)
        preempted += int((slow.events()["kind"] == EV_PREEMPT).sum())
    assert preempted > 10


KNOTS = 1.0 + np.arange(NUM_SHARED_KNOTS)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"engine": "sglang"}, "must be vllm or trtllm.*got sglang"),
        ({"async_scheduling": True}, "async_scheduling, which do not go together"),
        ({"shared": SharedCost(1, *[KNOTS] * 4, largest_graph=0)}, "ranks in lockstep"),
        ({"role": "prefill"}, "the role prefill"),
        ({"host_kv": KvTier(4, 1e3, 1e3, 0.0)}, "KV tiers"),
    ],
)
def test_what_stages_do_not_go_with_is_said(setting, said):
    with pytest.raises(ConfigError, match=said):
        replace(staged(constant_grid(1.0), constant_grid(1.0)), **setting)


def test_a_round_of_equal_batches_is_what_a_full_pipeline_takes():
    # two batches of 5 decodes over 50 tokens: each takes 1 + 5 x 0.1 s on the slower stage, so a
    # round of all 10 takes 3 s
    kind = staged(token_grid(1.0, 0.1), token_grid(0.5, 0.1))
    assert kind.step_s([], 10, 100) == pytest.approx(3.0, rel=1e-12)
