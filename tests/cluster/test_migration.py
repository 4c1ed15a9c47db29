"""Requests that move to another replica while they wait or decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.cluster.jit import fixed
from servegym.cluster.kernels import may_answer
from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Link, MigrationRules, TransferRules
from servegym.cluster.state import (
    ALWAYS,
    COPIED,
    DECISION,
    DONE,
    EV_LAND,
    EV_MIGRATE,
    EV_PAUSE,
    EV_PREEMPT,
    EV_RETURN,
    EV_STAY,
    FAULT_DOWN,
    FAULT_UP,
    HOLD_OVER,
    LANDED,
    MIGRATE,
    NEVER,
    NOBODY,
    OBSERVED_OUTSTANDING,
    OBSERVED_PENDING_PREFILL,
    QUEUED,
    RETURN,
    RUNNING,
    TRANSFERRING,
    Asks,
)
from servegym.errors import ConfigError, InvalidAction

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import choose, random_case, with_conversations, with_followers, with_migration
from .test_differential import assert_same_log
from .test_invariants import blocks_held, chain, many
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

#: Whose requests can migrate.
ENGINES = ("vllm", "vllm-priority")


def play_reference(spec: ClusterSpec, episode: Episode, *, asked: bool) -> ReferenceSimulator:
    sim, visits, turns = ReferenceSimulator(spec, episode), {}, [0]

    def dispatch(_, request):
        visits[request] = visits.get(request, -1) + 1
        return choose(request, visits[request], sim.allowed(request))

    def move(_):
        turns[0] += 1
        return pick(turns[0], sim.migrations.allowed)

    sim.run(dispatch, migrate=move if asked else None)
    return sim


def pick(turn: int, allowed: Callable[[], list[tuple[int, int]]]) -> tuple[int, int] | None:
    """Pick a request and where it goes, or nobody, from the number of the decision."""
    rng = np.random.default_rng(turn)
    if rng.random() < 0.3:
        return None
    pairs = allowed()
    return pairs[rng.integers(len(pairs))]


def play_compiled(spec: ClusterSpec, episode: Episode, *, asked: bool) -> Simulator:
    asks = Asks(migrate=ALWAYS if asked else NEVER)
    sim, visits, turn = Simulator(spec, [episode], record=True, asks=asks), {}, 0
    while sim.advance()[0] == DECISION:
        env = sim.state.env[0]
        if env["decision"] == MIGRATE:
            turn += 1
            pair = pick(turn, lambda: allowed(sim))
            answer = NOBODY if pair is None else pair[0] * sim.max_replicas + pair[1]
        else:
            request = int(env["deciding"])
            visits[request] = visits.get(request, -1) + 1
            answer = choose(request, visits[request], sim.state.allowed[0].tolist())
        sim.apply(np.array([answer]))
    return sim


def allowed(sim: Simulator) -> list[tuple[int, int]]:
    """All pairs of a request and a replica that may be answered."""
    width = sim.max_replicas
    may = fixed(may_answer, sim.params, sim.state, 0, 0)
    return [
        divmod(answer, width)
        for request in np.flatnonzero(np.isin(sim.state.request[0]["status"], (QUEUED, RUNNING)))
        for answer in range(int(request) * width, int(request + 1) * width)
        if may(sim.params, sim.state, 0, answer)
    ]


def assert_same_events(spec: ClusterSpec, episode: Episode, *, asked: bool = False) -> np.ndarray:
    slow = play_reference(spec, episode, asked=asked)
    fast = play_compiled(spec, episode, asked=asked)
    events = fast.events()
    assert_same_log(without_pauses(slow.events()), without_pauses(events))
    plain = outcomes_from_events(slow.events(), episode.table)["paused_s"]
    np.testing.assert_allclose(fast.outcomes()["paused_s"], plain, rtol=1e-9, atol=1e-12)
    assert int(fast.state.env[0]["engine_steps"]) == slow.engine_steps
    link = fast.state.link[0, : episode.num_replicas]
    assert link["out_bytes"].tolist() == slow.transfers.out_bytes
    assert link["in_bytes"].tolist() == slow.transfers.in_bytes
    derived, direct = outcomes_from_events(events, episode.table), fast.outcomes()
    for column in direct.dtype.names or ():
        np.testing.assert_array_equal(direct[column], derived[column], err_msg=column)
    return events


def without_pauses(events: np.ndarray) -> np.ndarray:
    """Leave out for how long requests decoded nowhere: differences of times are rounded."""
    events = events.copy()
    events["value"][np.isin(events["kind"], (EV_MIGRATE, EV_STAY))] = 0.0
    return events


@pytest.mark.parametrize(("block", "asked"), [*((block, False) for block in blocks(5)), (0, True)])
def test_compiled_and_plain_simulator_agree_on_random_migrations(block, asked):
    seen = np.zeros(32, int)
    for seed in range(60 * block, 60 * block + 60):
        case = with_migration(*random_case(seed, ENGINES), seed)
        seen += np.bincount(assert_same_events(*case, asked=asked)["kind"], minlength=32)
    for kind in (EV_MIGRATE, EV_PAUSE, EV_STAY, EV_PREEMPT, EV_RETURN):
        assert seen[kind] > 10, kind


@pytest.mark.parametrize("block", range(2))
def test_they_agree_on_conversations_whose_turns_are_retained(block):
    for seed in range(3000 + 30 * block, 3030 + 30 * block):
        case = with_conversations(*random_case(seed, ENGINES), seed)
        assert len(assert_same_events(*with_migration(*case, seed), asked=bool(seed % 2)))


def test_they_agree_on_requests_that_wait_for_others():
    for seed in range(2000, 2040):
        case = with_followers(*random_case(seed, ENGINES), seed)
        assert len(assert_same_events(*with_migration(*case, seed), asked=bool(seed % 2)))


def test_without_ticks_no_number_is_another():
    """Whatever the rules of migration are, they do nothing if nobody ever looks."""
    spec, episode = with_migration(*random_case(7), 7)
    off = replace(spec, migration=replace(spec.migration, interval_s=0.0))
    never = replace(spec, migration=replace(spec.migration, rule="none"))
    without = play_compiled(off, episode, asked=False)
    assert_same_log(without.events(), play_compiled(never, episode, asked=False).events())


@many
@given(st.integers(0, 2**32 - 1))
def test_blocks_are_held_at_both_ends_and_every_request_is_in_one_place(seed):
    spec, episode = with_migration(*random_case(seed, ENGINES), seed)
    sim = Simulator(spec, [episode], record=True, asks=Asks(migrate=ALWAYS))
    visits, turn = {}, 0
    while sim.advance()[0] == DECISION:
        check_blocks(sim)
        check_places(sim)
        env = sim.state.env[0]
        if env["decision"] == MIGRATE:
            turn += 1
            pair = pick(turn, lambda: allowed(sim))
            answer = NOBODY if pair is None else pair[0] * sim.max_replicas + pair[1]
        else:
            request = int(env["deciding"])
            visits[request] = visits.get(request, -1) + 1
            answer = choose(request, visits[request], sim.state.allowed[0].tolist())
        sim.apply(np.array([answer]))
    check_blocks(sim)
    link, moved = sim.state.link[0], sim.outcomes()["moved_bytes"]
    assert link["out_bytes"].sum() == link["in_bytes"].sum() == moved.sum()
    events = sim.events()
    assert moved.sum() == events["value"][events["kind"] == EV_LAND].sum()
    assert not sim.state.observation[0, [OBSERVED_OUTSTANDING, OBSERVED_PENDING_PREFILL]].any()
    assert not link["num_remote"].any()
    held = np.bincount(sim.state.move[0]["target"][under_way(sim)], minlength=sim.max_replicas)
    assert link["num_holding"].tolist() == held.tolist()


def under_way(sim: Simulator) -> np.ndarray:
    """Which replicas a decoding request moves away from, with memory set aside for it elsewhere."""
    moves = sim.state.move[0]
    return np.flatnonzero(moves["request"] >= 0)


def check_blocks(sim: Simulator) -> None:
    """Blocks held are those in rows of block tables, of requests here or at their other end."""
    spec, episode = sim.spec, sim.episodes[0]
    requests, ways = sim.state.request[0], sim.state.transfer[0]
    assert episode.num_replicas > 1
    for r in range(episode.num_replicas):
        num_blocks = spec.types[episode.type_idx[r]].num_blocks
        here = (requests["replica"] == r) & np.isin(requests["status"], (TRANSFERRING, LANDED))
        held = held_by_running(sim, r) + int(requests["table_len"][here].sum())
        held += int(ways["source_blocks"][ways["source"] == r].sum())
        held += int(ways["target_blocks"][ways["target"] == r].sum())
        others = here.sum() + (ways["source"] == r).sum() + (ways["target"] == r).sum()
        assert others == sim.state.link[0, r]["num_holding"]
        if spec.prefix_caching:
            holders = sim.state.block[0, r]["holders"][:num_blocks]
            assert holders.min() >= 0
            assert holders.sum() == held
        else:
            assert sim.state.replica[0, r]["free_blocks"] + held == num_blocks


def held_by_running(sim: Simulator, r: int) -> int:
    """Blocks of the running requests; a step may leave some of them out."""
    held, size, form = blocks_held(sim, r), sim.spec.block_size, sim.state.forming[0, r]
    request = form["skipped_from"]
    for _ in range(form["num_skipped"]):
        q = sim.state.request[0, request]
        tokens = int(q["computed"] + sim.state.replica[0, r]["iteration"] - q["join_iter"])
        held -= -(-(tokens + 1) // size) - -(-tokens // size)
        request = q["next_request"]
    return held


def check_places(sim: Simulator) -> None:
    """A request is running, waiting, remote, on hold or returned, or being decided about."""
    env, requests = sim.state.env[0], sim.state.request[0]
    timers = sim.state.timer[0, : env["num_timers"]]
    turns = timers[np.isin(timers["kind"], (RETURN, HOLD_OVER))]
    places = [turns["subject"].tolist(), [int(env["deciding"])] if env["deciding"] >= 0 else []]
    for r in range(sim.episodes[0].num_replicas):
        replica, link = sim.state.replica[0, r], sim.state.link[0, r]
        remote = chain(requests, link["first_remote"], "next_request")
        assert len(remote) == link["num_remote"]
        landed = requests["status"][remote] == LANDED
        assert landed.sum() == link["num_landed"]
        assert (requests["status"][remote][~landed] == TRANSFERRING).all()
        places.append(remote)
        for first in ("run_head", "wait_head"):
            places.append(chain(requests, replica[first], "next_request"))
    everywhere = np.concatenate(places).astype(int)
    arrived = requests[: env["next_arrival"]]
    assert sorted(everywhere) == np.flatnonzero(np.isnan(arrived["finish_s"])).tolist()
    copies = timers["subject"][timers["kind"] == COPIED]
    moves = sim.state.move[0]
    assert (
        sorted(copies) == np.flatnonzero((moves["request"] >= 0) & (moves["leaving"] == 0)).tolist()
    )


def moving_cluster(*types, **rules) -> ClusterSpec:
    """Make a cluster with a tick every 3 s; the KV of a block of 4 tokens is 4 bytes, 8 a second.

    Whoever has a request is short of memory, whoever has none takes one.
    """
    kinds = types or (replica_type(),)
    migration = MigrationRules(**{"interval_s": 3.0, "source_below": 1e9, **rules})
    return toy_cluster(
        *(replace(kind, link=Link(8.0, latency_s=0.5)) for kind in kinds),
        transfers=TransferRules(1.0),
        migration=migration,
    )


def test_a_request_with_few_blocks_pauses_while_they_are_copied(play):  # noqa: F811
    played = play(moving_cluster(), toy_episode([(0, 10, 4)], type_idx=(0, 0)), {})
    # prefilled in 1 + 1; at 3 it is in a step of 1.111, after which it leaves: 3 blocks, 12 / 8 and
    # 0.5 to land; its last token over 11 others: 1 + 0.1 + 0.11; a decode of kv 13
    assert_times(
        played,
        first_token_s=[2],
        transfer_s=[3.111],
        landed_s=[5.111],
        finish_s=[3.111 + 2.0 + 1.21 + 1.113],
        paused_s=[2.0],
        moved_bytes=[12],
    )
    assert played.outcomes["replica"].tolist() == [1]
    assert played.outcomes["num_migrations"].tolist() == [1]


def test_a_request_with_many_blocks_decodes_while_most_of_them_are_copied(play):  # noqa: F811
    spec = moving_cluster(last_stage_blocks=1)
    played = play(spec, toy_episode([(0, 10, 5)], type_idx=(0, 0)), {})
    # at 3 two blocks of three are full: 8 / 8 and 0.5; at 4.5 12 tokens are computed, one block is
    # left; it leaves after the steps of 1.111, 1.112 and 1.113 with 13 tokens, two blocks to copy
    left_s = 2 + 1.111 + 1.112 + 1.113
    assert_times(
        played,
        transfer_s=[left_s],
        landed_s=[left_s + 1.5],
        finish_s=[left_s + 1.5 + 1.23],
        paused_s=[1.5],
        moved_bytes=[16],
    )


@pytest.mark.parametrize(
    ("output", "finish_s", "moved_bytes", "num_stays"),
    [
        # two blocks land at 8, when it has ended
        (6, 2 + 5 * 1.1 + 0.065, 8, 1),
        # at 8 it has 15 tokens: there is more to copy, but that was the only stage; at 9 it begins
        # again with four blocks, which land at 15, when it has ended
        (12, 2 + 11 * 1.1 + 0.176, 24, 2),
    ],
)
def test_a_request_that_ends_or_grows_too_fast_stays(
    play,  # noqa: F811
    output,
    finish_s,
    moved_bytes,
    num_stays,
):
    spec = moving_cluster(last_stage_blocks=1, max_stages=1)
    spec = replace(spec, types=(replace(spec.types[0], link=Link(8.0, latency_s=4.0)),))
    played = play(spec, toy_episode([(0, 10, output), (50, 1, 1)], type_idx=(0, 0)), {})
    assert_times(played, finish_s=[finish_s, 51.1], moved_bytes=[moved_bytes, 0], paused_s=[0, 0])
    assert played.outcomes["num_migrations"].tolist() == [0, 0]
    assert played.outcomes["num_stays"].tolist() == [num_stays, 0]


def test_a_paused_request_goes_on_at_its_source_when_the_other_end_fails(play):  # noqa: F811
    faults = [(4, 1, FAULT_DOWN, 0), (20, 1, FAULT_UP, 0)]
    episode = toy_episode([(0, 10, 6)], type_idx=(0, 0), faults=faults)
    played = play(moving_cluster(), episode, {})
    # it left at 3.111; at 4 it computes its last token over 11 others where its KV is
    assert_times(played, finish_s=[4 + 1.21 + 1.113 + 1.114 + 1.115], paused_s=[4 - 3.111])
    assert played.outcomes["replica"].tolist() == [0]
    assert played.outcomes["moved_bytes"].tolist() == [0]
    assert played.outcomes["num_stays"].tolist() == [1]
    assert played.outcomes["num_restarts"].tolist() == [0]


def test_a_paused_request_is_lost_with_its_source(play):  # noqa: F811
    faults = [(4, 0, FAULT_DOWN, 0), (20, 0, FAULT_UP, 0)]
    episode = toy_episode([(0, 10, 6)], type_idx=(0, 0), faults=faults)
    played = play(moving_cluster(), episode, {0: [0, 1]})
    # its 12 tokens are computed anew in 1 + 1.2
    assert_times(played, finish_s=[4 + 2.2 + 1.113 + 1.114 + 1.115], paused_s=[4 - 3.111])
    assert played.outcomes["replica"].tolist() == [1]
    assert played.outcomes["num_restarts"].tolist() == [1]


def test_a_waiting_request_changes_queues_at_once(play):  # noqa: F811
    spec = moving_cluster(replica_type(seqs=1), rule="queues", queue_gap=1, interval_s=1.0)
    played = play(spec, toy_episode([(0, 10, 3), (0, 10, 3)], type_idx=(0, 0)), {})
    assert_times(played, first_token_s=[2, 3], finish_s=[4.223, 5.223], moved_bytes=[0, 0])
    assert played.outcomes["replica"].tolist() == [0, 1]
    assert played.outcomes["num_migrations"].tolist() == [0, 1]


def test_replicas_are_paired_by_freeness_and_the_shortest_moves(play):  # noqa: F811
    """Llumnix's rule, its numbers by hand."""
    prompts = {0: [11, 9, 10, 11, 11, 11], 1: [11, 11, 9, 10], 2: [9]}
    rows = [(0, prompt, 40) for r in prompts for prompt in prompts[r]]
    homes = [r for r in prompts for _ in prompts[r]]
    spec = moving_cluster(
        replica_type(num_blocks=80, budget=128),
        source_below=18.0,
        target_above=20.0,
        interval_s=20.0,
    )
    sim = Simulator(spec, [toy_episode(rows, type_idx=[0] * 4)], record=True)
    for home in homes:
        assert sim.advance()[0] == DECISION
        sim.apply(np.array([home]))
    assert sim.advance()[0] == DONE
    events = sim.events()
    first = events[(events["kind"] == EV_PAUSE) & (events["time_s"] < 25.0)]
    # freeness at 20: 0 and 1 below 18 (about 60 free blocks over 6 and 4), 2 above 20, 3 infinite
    assert sorted(zip(first["request"].tolist(), first["replica"].tolist(), strict=True)) == [
        (1, 0),
        (8, 1),
    ]
    moved = events[(events["kind"] == EV_MIGRATE) & (events["time_s"] < 40.0)]
    assert dict(zip(moved["request"].tolist(), moved["replica"].tolist(), strict=True)) == {
        1: 3,
        8: 2,
    }


def test_who_may_move_is_what_may_be_answered():
    spec = moving_cluster(interval_s=2.5)
    sim = Simulator(
        spec,
        [toy_episode([(0, 10, 6), (2.4, 10, 6)], type_idx=(0, 0))],
        asks=Asks(dispatch=NEVER, migrate=ALWAYS),
    )
    assert sim.advance()[0] == DECISION
    assert int(sim.state.env[0]["decision"]) == MIGRATE
    # at 2.5 the first decodes on 0, the second is prefilled on 1
    assert allowed(sim) == [(0, 1)]
    said = r"action 2 of environment 0 is not allowed now: choose one of \[-2, 1\] \(request times"
    with pytest.raises(InvalidAction, match=said):
        sim.apply(np.array([2]))
    sim.apply(np.array([NOBODY]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MigrationRules(interval_s=-1.0), "interval_s of migration must be at least 0"),
        (lambda: MigrationRules(rule="freenes"), "did you mean freeness"),
        (lambda: MigrationRules(victim="shortes"), "did you mean shortest"),
        (lambda: MigrationRules(max_stages=0), "max_stages of migration must be at least 1, got 0"),
        (
            lambda: moving_cluster(replace(replica_type(), engine="sglang")),
            "must have the engine vllm or vllm-priority and step by itself",
        ),
        (
            lambda: moving_cluster(
                replace(replica_type(), role="prefill"), replace(replica_type(), role="decode")
            ),
            "take the role mixed for all, or leave migration out",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
