"""Ranks whose steps begin and end together, by hand; both programs must get every timestamp right.

A rank's own step lasts what `test_toys` says. Together, ranks add 0.5 s for each token of the
fullest, and for each token of all 0.01 s in a step of decodes, 0.03 s in one with chunks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.lockstep import graph_tokens
from servegym.cluster.nominal import nominal_facts, request_alone_s
from servegym.cluster.rank_rules import PrefillTogether
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import (
    FAULT_DOWN,
    FAULT_SLOW,
    FAULT_UP,
    NEVER,
    OBSERVED_WHAT_IF_E2E,
    Asks,
)
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.errors import ConfigError
from servegym.policy.what_if import fill_what_if

from .test_toys import (
    assert_times,
    linear_grid,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

KNOTS = 1.0 + np.arange(NUM_SHARED_KNOTS)
SHARED = SharedCost(
    2,
    KNOTS,
    experts_s=0.01 * KNOTS,
    skewed_experts_s=0.03 * KNOTS,
    exchange_s=0.5 * KNOTS,
    largest_graph=0,
)


def rank_type(shared: SharedCost = SHARED, **limits):
    """Make a toy engine that is a rank."""
    return replace(replica_type(**limits), shared=shared)


def pair(requests, **settings) -> tuple[ClusterSpec, Episode]:
    """Make two ranks that serve requests."""
    return toy_cluster(rank_type()), toy_episode(requests, type_idx=(0, 0), **settings)


def test_an_idle_rank_takes_part_with_a_dummy_token(play):  # noqa: F811
    played = play(*pair([(0, 10, 3)]), {})
    # prefill 2 + 0.5 * 10 + 0.03 * 11; decodes 1.111 and 1.112, and 0.5 * 1 + 0.01 * 2
    first_s = 2 + 5 + 0.33
    assert_times(played, first_token_s=[first_s], finish_s=[first_s + 1.631 + 1.632])


def test_a_slow_rank_holds_the_others_up_even_if_it_is_idle(play):  # noqa: F811
    played = play(*pair([(0, 10, 3)], speed=[1.0, 0.4]), {})
    # its dummy token takes 1.1 / 0.4 = 2.75 s: longer than the other's prefill and decodes
    first_s = 2.75 + 5.33
    assert_times(played, first_token_s=[first_s], finish_s=[first_s + 2 * (2.75 + 0.52)])


def test_a_rank_that_slows_down_slows_the_group_from_the_next_step_on(play):  # noqa: F811
    # the first decode began at 7.33 and keeps its length; the second takes 1.1 / 0.5 s
    played = play(*pair([(0, 10, 3)], faults=[(7.5, 1, FAULT_SLOW, 0.5)]), {})
    assert_times(played, finish_s=[7.33 + 1.631 + 2.2 + 0.52])


def test_all_are_padded_to_the_graph_of_the_fullest(play):  # noqa: F811
    shared = replace(SHARED, largest_graph=8)
    spec = toy_cluster(rank_type(shared))
    episode = toy_episode([(0, 4, 2), (0, 4, 2), (0, 4, 2), (0, 2, 2)], type_idx=(0, 0))
    played = play(spec, episode, {3: [1]})
    # prefills of 12 and 2 tokens, beyond the largest graph: 2.2 + 0.5 * 12 + 0.03 * 14
    # decodes of 3 and 1: 1.3 + 0.015 of their own; a graph of 4 on both, 0.5 * 4 + 0.01 * 8
    first_s = 2.2 + 6 + 0.42
    assert_times(played, first_token_s=[first_s] * 4, finish_s=[first_s + 1.315 + 2.08] * 4)


def test_a_stretch_of_decodes_is_cut_where_another_rank_gets_a_prompt(play):  # noqa: F811
    played = play(*pair([(0, 10, 4), (8, 20, 1)]), {1: [1]})
    # prefill to 7.33, a decode to 8.961; then the prompt of the other rank, 3 + 0.5 * 20 +
    # 0.03 * 21, while the first has its next token; then a decode over 13 tokens
    then_s = 7.33 + 1.631
    both_s = then_s + 3 + 10 + 0.63
    assert_times(
        played,
        scheduled_s=[0, then_s],
        first_token_s=[7.33, both_s],
        finish_s=[both_s + 1.113 + 0.52, both_s],
    )


def test_ranks_that_are_all_idle_wake_together(play):  # noqa: F811
    played = play(*pair([(0, 10, 1), (20, 4, 1), (20, 6, 1)]), {1: [1], 2: [0]})
    # 1.6 + 0.5 * 6 + 0.03 * 10
    assert_times(played, scheduled_s=[0, 20, 20], finish_s=[7.33, 24.9, 24.9])


def test_groups_and_single_replicas_do_not_wait_for_each_other(play):  # noqa: F811
    spec = toy_cluster(rank_type(), replica_type())
    episode = toy_episode([(0, 10, 3), (0, 10, 3), (0, 20, 1)], type_idx=(1, 0, 0, 0, 0))
    played = play(spec, episode, {1: [2], 2: [3]})
    assert_times(
        played,
        first_token_s=[2, 7.33, 3 + 10 + 0.63],
        finish_s=[2 + 1.111 + 1.112, 7.33 + 1.631 + 1.632, 13.63],
    )


def test_a_prefill_pauses_the_decodes_of_its_own_rank_alone(play):  # noqa: F811
    kind = replace(rank_type(), engine="vllm-v0", num_blocks=64)
    episode = toy_episode([(0, 10, 3), (0, 10, 3), (8, 20, 1)], type_idx=(0, 0))
    played = play(toy_cluster(kind), episode, {1: [1], 2: [1]})
    # prefills 2 + 5 + 0.03 * 20 = 7.6; decodes 1.111 + 0.5 + 0.02 to 9.231; prompt and decode
    # 3 + 10 + 0.63 to 22.861, the first ends; decode of the other over 12 tokens beside a dummy
    assert_times(
        played,
        first_token_s=[7.6, 7.6, 22.861],
        finish_s=[22.861, 22.861 + 1.112 + 0.52, 22.861],
    )


def test_sizes_of_graphs():
    found = [graph_tokens(n) for n in (1, 2, 3, 5, 8, 9, 250, 257, 500)]
    assert found == [1, 2, 4, 8, 8, 16, 256, 272, 512]


def test_what_is_known_of_a_rank_holds_what_ranks_do_together():
    kind = rank_type()
    facts = nominal_facts(toy_cluster(kind))[0]
    # a full prefill of 64 tokens on both, one decode of 1,024 tokens on both
    assert facts[1] == pytest.approx(64 / (1 + 6.4 + 32 + 0.03 * 128))
    assert facts[2] == pytest.approx(1 + 0.1 + 1.024 + 0.5 + 0.02)
    assert request_alone_s(kind, 64, 2) == pytest.approx(
        1 + 6.4 + 64 * 32 * 0.01 + 32 + 3.84 + 2 * (1.1 + 0.065 + 0.52)
    )


def test_a_planner_knows_when_the_joint_step_ends():
    spec, episode = pair([(0, 10, 3), (8, 4, 3)])
    sim = Simulator(spec, [episode])
    sim.advance()
    sim.apply(np.array([0]))
    sim.advance()  # the second request comes in the joint decode from 7.33 to 8.961
    assert sim.state.env[0]["now_s"] == 8.0
    fill_what_if(sim, 0)
    # what comes then is planned as if each rank stepped by itself: a prefill, on the first beside
    # the last token of the other as a chunk over 11 tokens, then two decodes
    planned_s = sim.state.observation[0, OBSERVED_WHAT_IF_E2E, :2]
    np.testing.assert_allclose(planned_s, 0.961 + np.array([1.61, 1.4]) + 1.105 + 1.106)


def test_ranks_play_on_after_a_reset_as_before():
    spec, episode = pair([(0, 10, 4), (8, 20, 1), (9, 5, 3)])
    sim = Simulator(spec, [episode, episode], asks=Asks(dispatch=NEVER))
    sim.advance()
    once = sim.outcomes(0)
    sim.load(0, episode)
    sim.advance()
    assert once.dtype.names
    for column in once.dtype.names:
        np.testing.assert_array_equal(sim.outcomes(0)[column], once[column])
        np.testing.assert_array_equal(sim.outcomes(1)[column], once[column])


@pytest.mark.parametrize("type_idx", [(0,), (0, 1, 0), (0, 0, 0), (1, 0)])
def test_a_group_stands_side_by_side(type_idx):
    spec = toy_cluster(rank_type(), replica_type())
    with pytest.raises(ConfigError, match="first of 2 ranks in lockstep"):
        Simulator(spec, [toy_episode([(0, 4, 1)], type_idx=type_idx)])


def test_ranks_do_not_fail_one_by_one():
    spec, episode = pair([(0, 4, 1)], faults=[(1.0, 1, FAULT_DOWN, 0.0), (2.0, 1, FAULT_UP, 0.0)])
    with pytest.raises(ConfigError, match="replica 1 is one of several ranks in lockstep"):
        Simulator(spec, [episode])


def test_ranks_form_their_steps_without_asking():
    with pytest.raises(ConfigError, match="must not be vllm-priority"):
        replace(rank_type(), engine="vllm-priority")


def test_the_own_work_of_a_rank_is_a_grid_of_any_other_replica():
    assert rank_type().step_s([(10, 0)]) == pytest.approx(
        linear_grid().step_s([(10, 0)]) + 0.5 * 10 + 0.03 * 20
    )
    assert replica_type().step_s([(10, 0)], 2, 9) == linear_grid().step_s([(10, 0)], 2, 9)


def test_ranks_that_prefill_together_wait_for_each_other(play):  # noqa: F811
    kind = replace(rank_type(), engine="trtllm", together=PrefillTogether(3, 0))
    episode = toy_episode([(0, 4, 9), (0, 4, 9), (0.1, 4, 1), (6, 4, 1)], type_idx=(0, 0))
    played = play(toy_cluster(kind), episode, {1: [1], 2: [0], 3: [1]})
    # both prefill at once, as nobody decodes: 1 + 0.4 + 0.5 * 4 + 0.03 * 8 = 3.64. Then the first
    # rank has a prompt and the other none: two decodes of 1.105 + 0.52 and 1.106 + 0.52; the other
    # has one, too, from 6 on, before the third step without prefills: all prefill, with one decode
    # each, 1 + 0.5 + 0.007 + 0.5 * 5 + 0.03 * 10
    together_s = 3.64 + 1.625 + 1.626
    both_s = together_s + 1.507 + 2.5 + 0.3
    assert_times(
        played,
        scheduled_s=[0, 0, together_s, together_s],
        first_token_s=[3.64, 3.64, both_s, both_s],
    )


def test_ranks_that_wait_for_prefills_stop_after_so_many_steps(play):  # noqa: F811
    kind = replace(rank_type(), engine="trtllm", together=PrefillTogether(3, 0))
    episode = toy_episode([(0, 4, 9), (0, 4, 9), (0.1, 4, 1)], type_idx=(0, 0))
    played = play(toy_cluster(kind), episode, {1: [1], 2: [0]})
    # the first step of both is no wait; the third without a prefill on either would be too many
    timeout_s = 3.64 + 1.625 + 1.626
    assert_times(played, scheduled_s=[0, 0, timeout_s])


def test_ranks_that_could_all_prefill_wait_for_more_prompts(play):  # noqa: F811
    kind = replace(rank_type(), engine="trtllm", together=PrefillTogether(9, 2))
    episode = toy_episode([(0, 4, 9), (0, 4, 9), (0.1, 4, 1), (0.2, 4, 1)], type_idx=(0, 0))
    played = play(toy_cluster(kind), episode, {1: [1], 2: [0], 3: [1]})
    # two decodes, though all could prefill
    gathered_s = 3.64 + 1.625 + 1.626
    assert_times(played, scheduled_s=[0, 0, gathered_s, gathered_s])


def test_a_rank_without_room_keeps_the_others_waiting(play):  # noqa: F811
    rule = PrefillTogether(50, 0)
    kind = replace(rank_type(num_blocks=7), engine="trtllm", together=rule)
    # of 7 blocks of 4 tokens one request of the first rank takes 3 to its end, the next one 6
    episode = toy_episode([(0, 4, 9), (0, 4, 20), (0.1, 4, 20), (0.2, 4, 1)], type_idx=(0, 0))
    played = play(toy_cluster(kind), episode, {1: [1], 2: [0], 3: [1]})
    # eight decodes of 1.625 to 1.632 s; then the first rank decodes no more, and nobody waits
    ended_s = 3.64 + 8 * 1.625 + 0.028
    assert_times(played, scheduled_s=[0, 0, ended_s, ended_s])
    assert played.outcomes["finish_s"][0] == pytest.approx(ended_s)


def test_only_ranks_of_tensorrt_llm_wait_for_each_other():
    with pytest.raises(ConfigError, match="only ranks in lockstep of engine trtllm"):
        replace(rank_type(), together=PrefillTogether())
    with pytest.raises(ConfigError, match="timeout_steps must be at least 1, got 0"):
        PrefillTogether(timeout_steps=0)
    with pytest.raises(ConfigError, match="gather_steps must be at least 0, got -1"):
        PrefillTogether(gather_steps=-1)
