"""Speculative decoding: by hand, and both programs alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.drafts import count_accepted
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, ReplicaType
from servegym.cluster.state import DONE, EV_PREEMPT, FAULT_DOWN, FAULT_UP, NEVER, Asks
from servegym.cluster.tier_rules import KvTier
from servegym.costs.grid import NUM_BATCH_KNOTS, CostGrid
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.costs.speculation import Speculation
from servegym.errors import ConfigError

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from ..toys import constant_grid, token_grid  # noqa: TID252
from .strategies import (
    long_answers,
    random_case,
    with_conversations,
    with_drafts,
    with_followers,
    with_ranks,
)
from .test_differential import assert_same_events, assert_same_log
from .test_pipeline import staged
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

ENGINES = ("vllm", "trtllm")
ALL, NONE = 1.0, 0.0


def drafting(
    *acceptance: float, steps: CostGrid | None = None, draft_s: float = 0.0, **limits: int
) -> ReplicaType:
    """Make a toy engine with drafts; a step lasts a second unless told."""
    speculation = Speculation(
        acceptance, steps or constant_grid(1.0), np.full(NUM_BATCH_KNOTS, draft_s)
    )
    kind = replica_type(speculation.per_token(limits.get("seqs", 4)), **limits)
    return replace(kind, speculation=speculation)


def toy(*acceptance: float, **settings: object) -> ClusterSpec:
    return toy_cluster(drafting(*acceptance, **settings))  # type: ignore[arg-type]


def test_accepted_drafts_come_out_with_the_next_token(play):  # noqa: F811
    # the first token at 1, then three a step: 7 are out at 3, 10 at 4
    played = play(toy(ALL, ALL), toy_episode([(0, 10, 10)]), {})
    assert_times(played, first_token_s=[1], finish_s=[4])


def test_rejected_drafts_cost_their_computation_and_nothing_else(play):  # noqa: F811
    # 1 s + 0.1 s a token: a prompt of 10 takes 2 s, a token with two drafts 1.3 s
    played = play(toy(NONE, NONE, steps=token_grid(1.0, 0.1)), toy_episode([(0, 10, 4)]), {})
    assert_times(played, first_token_s=[2], finish_s=[2 + 3 * 1.3])


def test_drafts_beyond_the_last_token_come_to_nothing(play):  # noqa: F811
    # of 4 drafts behind the second of 3 tokens one is wanted
    played = play(toy(ALL, ALL, ALL, ALL), toy_episode([(0, 10, 3)]), {})
    assert_times(played, first_token_s=[1], finish_s=[2])


def test_drafting_takes_its_time_with_every_step(play):  # noqa: F811
    played = play(toy(ALL, draft_s=0.25), toy_episode([(0, 10, 5)]), {})
    assert_times(played, first_token_s=[1.25], finish_s=[1.25 + 2 * 1.25])


def test_a_budget_that_is_short_cuts_drafts(play):  # noqa: F811
    # 5 tokens a step: the first request has 4 of them, the second its next token alone. They have
    # 4 + 1 tokens a step, until the first has ended
    spec = toy(ALL, ALL, ALL, budget=5, seqs=2)
    played = play(spec, toy_episode([(0, 1, 9), (0, 1, 4)]), {})
    assert_times(played, first_token_s=[1, 1], finish_s=[3, 4])


def test_blocks_are_taken_for_drafts_and_for_what_the_drafter_writes(play):  # noqa: F811
    # blocks of 4: a prompt of 4 has 2 (2 tokens ahead), then 4 + 3 + 2 tokens need 3. Two requests
    # do not fit into 5 blocks: the second is preempted at 1, and begins anew when the first ends
    spec = toy(NONE, NONE, num_blocks=5)
    played = play(spec, toy_episode([(0, 4, 2), (0, 4, 2)]), {})
    assert played.outcomes["num_preemptions"].tolist() == [0, 1]
    assert_times(played, first_token_s=[1, 1], finish_s=[2, 3])


def test_a_failure_loses_the_step(play):  # noqa: F811
    spec = toy_cluster(drafting(ALL, ALL), hold_s=4.0)
    faults = [(1.5, 0, FAULT_DOWN, 0.0), (5.0, 0, FAULT_UP, 0.0)]
    played = play(spec, toy_episode([(0, 10, 7)], faults=faults), {})
    # one token is out; six are left, with the text computed anew
    assert_times(played, first_token_s=[1], finish_s=[5.5 + 1 + 2])


def test_as_many_are_accepted_as_the_rates_say():
    rates = np.array([0.8, 0.5, 0.1])
    drawn = [count_accepted(np.uint64(7), request, 10, 3, rates) for request in range(20_000)]
    counts = [np.mean(np.array(drawn) >= place) for place in (1, 2, 3)]
    np.testing.assert_allclose(counts, rates, atol=4 * 0.5 / np.sqrt(20_000))
    at_other_places = [count_accepted(np.uint64(7), 3, place, 3, rates) for place in range(20_000)]
    assert np.mean(at_other_places) == pytest.approx(rates.sum(), abs=0.04)
    assert all(
        count_accepted(np.uint64(7), i, 10, 1, rates) == min(1, n) for i, n in enumerate(drawn)
    )


def test_what_is_accepted_does_not_depend_on_where_and_with_whom_a_request_decodes():
    # alone or beside others, on a fast or a slow engine: the same number of steps
    slow = toy(0.7, 0.4, steps=token_grid(0.5, 0.1), seqs=1)
    fast = toy(0.7, 0.4, seqs=4)
    lasting = []
    for spec in (slow, fast):
        episode = toy_episode([(0, 10, 40), (0, 10, 40)])
        sim = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER))
        assert sim.advance()[0] == DONE
        outcomes = sim.outcomes()
        lasting.append(outcomes["finish_s"] - outcomes["first_token_s"])
    # alone a step takes 0.5 s and 0.1 s for each of its 3 tokens
    np.testing.assert_allclose(lasting[0] / 0.8, lasting[1], rtol=1e-9)
    assert 40 / 3 < lasting[1].min() < 39


def test_without_accepted_drafts_requests_take_the_steps_of_an_engine_without():
    # costs do not depend on tokens, and memory is ample: who drafts in vain is as fast
    steps = constant_grid(1.0)
    episode = toy_episode([(0.1 * i, 10, 1 + i) for i in range(8)])
    logs = []
    for kind in (drafting(NONE, NONE, num_blocks=400), replica_type(steps, num_blocks=400)):
        sim = Simulator(toy_cluster(kind), [episode], record=True, asks=Asks(dispatch=NEVER))
        assert sim.advance()[0] == DONE
        logs.append(sim.events())
    assert_same_log(*logs)


@pytest.mark.parametrize("block", blocks(3))
def test_compiled_and_plain_simulator_agree_on_drafts(block):
    for seed in range(9000 + 20 * block, 9020 + 20 * block):
        assert_same_events(*with_drafts(*random_case(seed, ENGINES), seed))


def test_they_agree_beside_replicas_of_other_engines_and_clients_that_wait():
    for seed in range(9200, 9212):
        spec, episode = random_case(seed, ("vllm", "trtllm", "sglang", "vllm-priority"))
        assert_same_events(*with_followers(*with_drafts(spec, episode, seed), seed))


def test_they_agree_on_ranks_that_verify_in_lockstep():
    waiting = 0
    for seed in range(9400, 9430):
        spec, episode = random_case(seed, ("vllm", "trtllm", "sglang"))
        spec, episode = with_ranks(*with_drafts(spec, episode, seed), seed)
        assert_same_events(spec, episode)
        waiting += any(kind.together and kind.speculation for kind in spec.types)
    assert waiting > 2


def test_ranks_wait_for_the_one_with_most_tokens_drafts_included(play):  # noqa: F811
    # a rank's own step takes 1 s and 0.1 s a token. One has a prompt of 10 tokens, 2 s, the other
    # nothing; then the first has its next token and 2 drafts, 1.3 s. Experts take 1 s a step,
    # exchanges none
    knots = 1.0 + np.arange(NUM_SHARED_KNOTS)
    shared = SharedCost(2, knots, 1.0 + 0.0 * knots, 1.0 + 0.0 * knots, 0.0 * knots, 0)
    kind = replace(drafting(ALL, ALL, steps=token_grid(1.0, 0.1)), shared=shared)
    episode = toy_episode([(0, 10, 7)], type_idx=(0, 0))
    assert_times(play(toy_cluster(kind), episode, {}), first_token_s=[3], finish_s=[3 + 2 * 2.3])


def test_they_agree_on_turns_that_keep_their_blocks():
    for seed in range(9300, 9308):
        spec, episode = with_drafts(*random_case(seed), seed)
        assert_same_events(*with_conversations(spec, episode, seed))


def test_they_agree_on_requests_that_outgrow_their_blocks():
    preempted = 0
    for seed in range(2):
        spec, episode = with_drafts(*long_answers(seed, "vllm"), seed)
        slow = assert_same_events(replace(spec, chunked_prefill=True), episode)
        preempted += int((slow.events()["kind"] == EV_PREEMPT).sum())
    assert preempted > 10


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"engine": "sglang"}, "must be vllm or trtllm.*drafts, got sglang"),
        ({"async_scheduling": True}, "async_scheduling, which do not go together"),
        ({"role": "prefill"}, "the role prefill"),
        ({"host_kv": KvTier(4, 1e3, 1e3, 0.0)}, "KV tiers"),
        ({"pipeline": staged(constant_grid(1.0)).pipeline}, "stages of a pipeline and drafts"),
        ({"max_num_batched_tokens": 1, "max_num_seqs": 1}, "above the 1 drafts"),
    ],
)
def test_what_drafts_do_not_go_with_is_said(setting, said):
    with pytest.raises(ConfigError, match=said):
        replace(drafting(ALL), **setting)


@pytest.mark.parametrize(
    ("acceptance", "said"),
    [
        ((), "at least 1, got none"),
        ((1.2,), r"from 0 to 1, got \[1.2\]"),
        ((0.5, 0.6), r"must not increase.*\[0.5, 0.6\]"),
    ],
)
def test_rates_that_cannot_be_are_refused(acceptance, said):
    with pytest.raises(ConfigError, match=said):
        drafting(*acceptance)
