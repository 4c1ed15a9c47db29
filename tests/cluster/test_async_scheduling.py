"""Engines that form a step when the one before begins: by hand, and both programs alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.spec import ClusterSpec, Episode
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.errors import ConfigError

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import random_case, with_conversations, with_followers
from .test_differential import assert_same_events
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

KNOTS = 1.0 + np.arange(NUM_SHARED_KNOTS)


def ahead(spec: ClusterSpec, episode: Episode) -> tuple[ClusterSpec, Episode]:
    """Let all engines form their steps ahead."""
    types = tuple(replace(kind, async_scheduling=True) for kind in spec.types)
    return replace(spec, types=types), episode


@pytest.mark.parametrize("block", blocks(3))
def test_compiled_and_plain_simulator_agree_on_steps_formed_ahead(block):
    for seed in range(6000 + 40 * block, 6040 + 40 * block):
        assert_same_events(*ahead(*random_case(seed, ("vllm", "trtllm"))))


def test_they_agree_on_clients_that_send_again_when_a_step_ends():
    for seed in range(6200, 6240):
        assert_same_events(*ahead(*with_followers(*random_case(seed, ("vllm", "trtllm")), seed)))


def test_they_agree_on_turns_that_keep_their_blocks():
    for seed in range(6300, 6312):
        spec, episode = ahead(*random_case(seed, ("vllm", "trtllm")))
        assert_same_events(*with_conversations(spec, episode, seed))


def toy(**limits) -> ClusterSpec:
    return toy_cluster(replace(replica_type(**limits), async_scheduling=True))


def test_a_request_misses_the_step_after_the_one_it_came_in(play):  # noqa: F811
    # the first decodes from 2 on; the second comes in its second token's step, which ends at
    # 2 + 1.111, and misses the next one, to + 1.112, which was formed when that began
    played = play(toy(), toy_episode([(0, 10, 9), (2.5, 20, 1)]), {})
    assert_times(played, scheduled_s=[0, 2 + 1.111 + 1.112])


def test_an_idle_engine_begins_at_once(play):  # noqa: F811
    played = play(toy(), toy_episode([(0, 10, 1), (7, 10, 1)]), {})
    assert_times(played, scheduled_s=[0, 7], finish_s=[2, 9])


def test_who_ends_holds_its_place_for_a_step(play):  # noqa: F811
    # two at a time: the second ends at 2.2 + 1.214, where the third may not begin yet; the first
    # decodes once more alone, over 8 tokens
    played = play(toy(seqs=2), toy_episode([(0, 6, 9), (0, 6, 2), (0.5, 6, 2)]), {})
    assert_times(played, scheduled_s=[0, 0, 2.2 + 1.214 + 1.108])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(replica_type(), engine="sglang", async_scheduling=True), "only engines"),
        (
            lambda: replace(
                replica_type(),
                async_scheduling=True,
                shared=SharedCost(1, *[KNOTS] * 4, largest_graph=0),
            ),
            "step by themselves",
        ),
        (
            lambda: toy_cluster(
                replace(replica_type(), role="prefill", async_scheduling=True),
                replace(replica_type(), role="decode"),
            ),
            "do not go together yet",
        ),
    ],
)
def test_where_steps_cannot_be_formed_ahead_it_is_said(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
