"""Ended turns that keep their KV blocks for the next one: by hand, and what always holds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    DECISION,
    DONE,
    EXPIRY,
    FAULT_DOWN,
    FAULT_UP,
    NEVER,
    SCRAPED_KV_USAGE,
    Asks,
)
from servegym.engines import ENGINES
from servegym.errors import ConfigError
from servegym.policy.contract import Group
from servegym.policy.observe import observe_batch
from servegym.workloads.table import ANY_END, BY_ITSELF

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import choose, random_case, with_conversations
from .test_closed_loop import waiting_episode
from .test_differential import assert_same_log
from .test_invariants import blocks_held, chain, many
from .test_invariants import play as play_to_the_end
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)


def retaining(retain_kv_s, *, num_blocks, **settings):
    """Make an engine that retains turns, in blocks of 4 tokens."""
    return toy_cluster(
        replica_type(num_blocks=num_blocks, **settings),
        prefix_caching=True,
        retain_kv_s=retain_kv_s,
    )


def stranger(number):
    """Make a text that nobody else has."""
    return (100 + number, 1000)


@pytest.mark.parametrize(
    ("retain_kv_s", "cached"), [(0.0, 0), (2.1, 0), (3.0, 0), (5.0, 8), (10.0, 8)]
)
def test_blocks_of_a_retained_turn_are_not_taken_before_its_time_is_over(
    play,  # noqa: F811
    retain_kv_s,
    cached,
):
    # 4 blocks. The first turn computes 8 tokens in 1.8 s and keeps 2. Others of 8 tokens come
    # at 2, 4 and 6, for 1.8 s each: the one at 2 takes the unused blocks. Unless the first turn's
    # blocks are kept, those at 4 and 6 take one after the other the two that were used longest ago:
    # where it lets go at 3.9 or 4.8, that is its blocks at 6. The next turn comes at 1.8 + 7
    requests = [(0, 8, 1), (2, 8, 1), (4, 8, 1), (6, 8, 1), (6, 12, 1)]
    texts = [(1, 1000), stranger(1), stranger(2), stranger(3), (1, 1000)]
    episode = waiting_episode(requests, [-1, -1, -1, -1, 0], [0, 0, 0, 0, 7], texts=texts)
    played = play(retaining(retain_kv_s, num_blocks=4), episode, {})
    assert played.outcomes["cached_tokens"].tolist() == [0, 0, 0, 0, cached]
    # 12 tokens: 1 + 1.2; with 8 of them in the cache: 1 + 0.4 + 4 * 8 * 0.01
    last_s = 8.8 + (1.72 if cached else 2.2)
    assert_times(played, finish_s=[1.8, 3.8, 5.8, 7.8, last_s])


def test_the_turn_with_the_least_time_left_lets_go_when_nothing_else_is_free(play):  # noqa: F811
    # two turns keep 2 of 6 blocks each; a request of 12 tokens takes the other 2 and one more: the
    # last block of the turn that ended first, whose next turn then finds the first block
    requests = [(0, 8, 1), (2, 8, 1), (4, 12, 1), (4, 12, 1), (4, 12, 1)]
    texts = [(1, 1000), (2, 1000), stranger(1), (1, 1000), (2, 1000)]
    episode = waiting_episode(requests, [-1, -1, -1, 0, 1], [0, 0, 0, 8, 10], texts=texts)
    played = play(retaining(100.0, num_blocks=6), episode, {})
    assert played.outcomes["cached_tokens"].tolist() == [0, 0, 0, 4, 8]
    # 8 tokens after 4: 1 + 0.8 + 0.32; 4 after 8: 1 + 0.4 + 0.32
    assert_times(played, finish_s=[1.8, 3.8, 6.2, 9.8 + 2.12, 13.8 + 1.72])


@pytest.mark.parametrize(
    ("delay_s", "first", "cached"),
    [
        ((3.0, 50.0), 3, 8),  # the first turn's next one waits at 4.8, the second's does not
        ((3.0, 1.5), 3, 8),  # both wait, the second's came later: at 5.3
        ((3.5, 1.0), 4, 8),  # both wait, the first's came later: at 5.3
    ],
)
def test_a_turn_whose_next_one_waits_lets_go_last(play, delay_s, first, cached):  # noqa: F811
    # one at a time. A request of 8 tokens comes at 4 and takes the 2 blocks that nobody keeps; its
    # first decode step needs a third at 5.8. It ends after 4 of them: 4.4 + 0.001 * (9 + .. + 12)
    requests = [(0, 8, 1), (2, 8, 1), (4, 8, 5), (4, 12, 1), (4, 12, 1)]
    texts = [(1, 1000), (2, 1000), stranger(1), (1, 1000), (2, 1000)]
    episode = waiting_episode(requests, [-1, -1, -1, 0, 1], [0, 0, 0, *delay_s], texts=texts)
    played = play(retaining(100.0, num_blocks=6, seqs=1), episode, {})
    assert played.outcomes["finish_s"][2] == pytest.approx(10.242)
    assert played.outcomes["cached_tokens"][first] == cached
    assert played.outcomes["finish_s"][first] == pytest.approx(10.242 + 1.72)
    assert played.outcomes["cached_tokens"][7 - first] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_that_turns_keep_is_free_for_whoever_needs_it(play, engine):  # noqa: F811
    # all blocks are kept; a request that needs them all is served as if none were
    kind = replace(replica_type(num_blocks=8, budget=64), engine=engine)
    episode = waiting_episode(
        [(0, 20, 2), (9, 20, 2), (9, 8, 1)],
        [-1, -1, 0],
        [0, 0, 40],
        texts=[(1, 1000), stranger(1), (1, 1000)],
    )
    runs = [
        play(toy_cluster(kind, prefix_caching=True, retain_kv_s=kept_s), episode, {}).outcomes
        for kept_s in (0.0, 100.0)
    ]
    assert runs[0]["finish_s"][:2].tolist() == runs[1]["finish_s"][:2].tolist()


def state_after(spec, episode, actions):
    """Take the decisions of an episode; yield the simulator before each, and at the end."""
    sim = Simulator(spec, [episode])
    for action in actions:
        assert sim.advance()[0] == DECISION
        yield sim
        sim.apply(np.array([action]))
    assert sim.advance()[0] == DONE
    yield sim


def retained(sim, r):
    """Return the retained turns of a replica, in the order in which they let go."""
    first = int(sim.state.replica[0, r]["first_retained"])
    return chain(sim.state.request[0], first, "next_request")


def expiries(sim):
    timers = sim.state.timer[0, : sim.state.env[0]["num_timers"]]
    return sorted(timers["subject"][timers["kind"] == EXPIRY].tolist())


def test_who_is_retained_until_when():
    # the first has a next turn, which another replica gets; the second is followed by nobody in
    # particular, the third by nobody
    requests = [(0, 8, 1), (0, 8, 1), (0, 8, 1), (0, 8, 1), (0, 8, 1), (50, 4, 1)]
    episode = waiting_episode(
        requests, [-1, -1, -1, 0, ANY_END, -1], [0, 0, 0, 5, 9, 0], type_idx=[0, 0]
    )
    spec = toy_cluster(prefix_caching=True, retain_kv_s=20.0)
    seen = [
        (float(sim.state.env[0]["now_s"]), retained(sim, 0), retained(sim, 1), expiries(sim))
        for sim in state_after(spec, episode, [0, 0, 0, 1, 0, 0])
    ]
    # the three take 1 + 2.4 s; all but the last decision come before 3.4 + 20
    assert [s[0] for s in seen[3:6]] == pytest.approx([8.4, 12.4, 50.0])
    assert [s[1:] for s in seen] == [
        ([], [], []),
        ([], [], []),
        ([], [], []),
        ([0], [], [0]),
        ([0], [], [0]),
        ([], [], []),
        ([], [], []),
    ]


def test_the_next_turn_stops_the_time_when_it_comes_and_takes_over_when_it_is_admitted():
    # one at a time: the second request runs from 2.8 on when the next turn comes at 1.8 + 2
    requests = [(0, 8, 1), (2.5, 8, 9), (2.5, 12, 1), (3.9, 4, 1), (30, 4, 1)]
    episode = waiting_episode(requests, [-1, -1, 0, -1, -1], [0, 0, 2, 0, 0], texts=[(1, 1000)] * 5)
    spec = retaining(2.5, num_blocks=64, seqs=1)
    seen = [
        (retained(sim, 0), expiries(sim)) for sim in state_after(spec, episode, [0, 0, 0, 0, 0])
    ]
    assert seen == [([], []), ([0], [0]), ([0], [0]), ([0], []), ([], []), ([], [])]


def test_a_replica_that_fails_forgets_what_it_retains():
    requests = [(0, 8, 1), (0, 12, 1), (2, 4, 1), (9, 4, 1)]
    episode = waiting_episode(
        requests,
        [-1, 0, -1, -1],
        [0, 9, 0, 0],
        faults=[(3.0, 0, FAULT_DOWN, 0.0), (3.5, 0, FAULT_UP, 0.0)],
    )
    seen = [
        (retained(sim, 0), expiries(sim), int(sim.state.replica[0, 0]["kept_blocks"]))
        for sim in state_after(retaining(100.0, num_blocks=8), episode, [0] * 5)
    ]
    # the first ends at 1.8: the decision at 2 is before the failure, the others are behind it
    assert seen == [([], [], 0), ([0], [0], 2)] + 4 * [([], [], 0)]


def test_metrics_count_what_requests_hold():
    episode = waiting_episode([(0, 8, 1), (0, 8, 1), (5, 4, 1)], [-1, 0, -1], [0, 9, 0])
    spec = toy_cluster(replica_type(num_blocks=4), prefix_caching=True, retain_kv_s=100.0)
    sims = state_after(spec, episode, [0, 0, 0])
    next(sims)
    sim = next(sims)
    observe_batch(sim, Group.METRICS)
    assert retained(sim, 0) == [0]
    assert sim.state.replica[0, 0]["kept_blocks"] == 2
    assert sim.state.scraped[0, SCRAPED_KV_USAGE, 0] == 0.0


def kept_now(sim: ReferenceSimulator) -> list[list[int]]:
    return [
        [one.turn for one in sorted(e.pool.retained, key=lambda one: (one.until_s, one.order))]
        for e in sim.replicas
    ]


@pytest.mark.parametrize("block", blocks(4))
def test_compiled_and_plain_simulator_agree_on_conversations(block):
    turns = 0
    for seed in range(5000 + 60 * block, 5060 + 60 * block):
        spec, episode = with_conversations(*random_case(seed, ENGINES), seed)
        slow = ReferenceSimulator(spec, episode)
        visits: dict[int, int] = {}
        told: list[object] = []

        def dispatch(sim, request, visits=visits, told=told, slow=slow):
            visits[request] = visits.get(request, -1) + 1
            hits = [sim.prefix_hit_tokens(request, e.r) if e.up else 0 for e in sim.replicas]
            told.append((request, hits, kept_now(slow)))
            return choose(request, visits[request], sim.allowed(request))

        slow.run(dispatch)
        fast = Simulator(spec, [episode], record=True)
        visits, seen = {}, []
        while fast.advance()[0] == DECISION:
            request = int(fast.state.env[0]["deciding"])
            visits[request] = visits.get(request, -1) + 1
            observations, _ = observe_batch(fast, Group.METRICS | Group.PREFIX)
            hits = observations.replicas[0, 20].astype(int).tolist()
            kept = [retained(fast, r) for r in range(episode.num_replicas)]
            seen.append((request, hits, kept))
            mask = observations.mask[0].tolist()
            fast.apply(np.array([choose(request, visits[request], mask)]))
        assert seen == told, f"seed {seed}"
        assert_same_log(slow.events(), fast.events())
        turns += sum(len(kept) for *_, all_kept in seen for kept in all_kept)
    assert turns > 1000


@many
@given(st.integers(0, 2**32 - 1))
def test_no_block_is_lost_or_kept_by_nobody(seed):
    spec, episode = with_conversations(*random_case(seed, ENGINES), seed)

    def look(sim: Simulator) -> None:
        requests = sim.state.request[0]
        for r, type_idx in enumerate(episode.type_idx):
            num_blocks = spec.types[type_idx].num_blocks
            blocks, replica = sim.state.block[0, r], sim.state.replica[0, r]
            holders, keepers = blocks["holders"][:num_blocks], blocks["keepers"][:num_blocks]
            assert holders.sum() == blocks_held(sim, r)
            turns = retained(sim, r)
            assert keepers.min() >= 0
            assert keepers.sum() == requests["table_len"][turns].sum()
            assert (blocks["identity"][:num_blocks][keepers > 0] != 0).all()
            end = len(blocks) - 1
            free_list = chain(blocks[:end], int(blocks[end]["after"]), "after")
            assert sorted(free_list) == np.flatnonzero((holders == 0) & (keepers == 0)).tolist()
            assert replica["free_blocks"] == (holders == 0).sum()
            assert replica["kept_blocks"] == ((holders == 0) & (keepers > 0)).sum()
            # the list goes from those whose time runs, by time, to those whose next turn waits
            running = [requests[i]["timer_pos"] >= 0 for i in turns]
            assert running == sorted(running, reverse=True)
            ends = requests["finish_s"][turns][running]
            assert (np.diff(ends) >= 0).all()
            last = [i for i in turns if requests[i]["timer_pos"] >= 0][-1:] or [-1]
            assert replica["last_expiring"] == last[0]
        env = sim.state.env[0]
        timers = sim.state.timer[0, : env["num_timers"]]
        for i, timer in enumerate(timers):
            if timer["kind"] >= EXPIRY:
                assert requests[timer["subject"]]["timer_pos"] == i
        assert (requests["timer_pos"] >= 0).sum() == (timers["kind"] >= EXPIRY).sum()

    sim = play_to_the_end(spec, episode, look)
    for r in range(episode.num_replicas):
        assert retained(sim, r) == []
        assert not sim.state.block[0, r]["keepers"].any()
    assert expiries(sim) == []


def test_nobody_waits_longer_for_room_than_without_retention():
    # whatever turns keep, admission goes by what requests hold: nothing changes if nothing is hit
    for seed in range(30):
        spec, episode = with_conversations(*random_case(seed, ENGINES), seed)
        table = episode.table
        texts = np.arange(1, len(table.prefix_keys) + 1)  # no two requests have text in common
        episode = replace(episode, table=replace(table, prefix_keys=texts.astype(np.int64)))
        ends = []
        for kept_s in (0.0, 1e9):
            sim = Simulator(replace(spec, retain_kv_s=kept_s), [episode], asks=Asks(dispatch=NEVER))
            assert sim.advance()[0] == DONE
            preempted = sim.outcomes()["num_preemptions"].sum()
            ends.append((preempted, sim.outcomes()["finish_s"].tolist()))
        if ends[0][0] == 0:  # one that was preempted finds its own blocks, or not
            assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"retain_kv_s": -1.0, "prefix_caching": True}, "retain_kv_s must be at least 0, got -1.0"),
        ({"retain_kv_s": math.nan, "prefix_caching": True}, "retain_kv_s must be at least 0"),
        ({"retain_kv_s": 5.0}, "retain_kv_s is 5.0, but .* is off: set prefix_caching"),
    ],
)
def test_an_impossible_retention_is_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        toy_cluster(**rules)


def test_turns_of_open_loops_are_not_retained():
    spec = toy_cluster(prefix_caching=True, retain_kv_s=100.0)
    episode = toy_episode([(0, 8, 1), (5, 8, 1)])
    assert (episode.table.after == BY_ITSELF).all()
    assert [retained(sim, 0) for sim in state_after(spec, episode, [0, 0])] == [[], [], []]
