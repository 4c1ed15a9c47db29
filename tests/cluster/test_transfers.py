"""Requests that are prefilled on one replica and decode on another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.reference_engine import Engine
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Link, TransferRules
from servegym.cluster.state import (
    ALWAYS,
    DECISION,
    DONE,
    EV_LAND,
    EV_RETURN,
    FAULT_DOWN,
    FAULT_UP,
    HOLD_OVER,
    JOINING,
    LANDED,
    LANDING,
    NEVER,
    OBSERVED_OUTSTANDING,
    OBSERVED_PENDING_PREFILL,
    PLACING,
    RETURN,
    TRANSFERRING,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.errors import ConfigError
from servegym.policy.contract import Group, ReplicaFeature
from servegym.policy.observe import observe_batch

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import (
    choose,
    random_case,
    with_conversations,
    with_followers,
    with_roles,
    with_roles_of_ranks,
)
from .test_differential import assert_same_log
from .test_invariants import blocks_held, chain, many
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

SEEN = (
    "NUM_RUNNING",
    "NUM_WAITING",
    "KV_CACHE_USAGE",
    "GENERATED_TOKENS",
    "PREFIX_HIT_TOKENS",
    "PREFILLS",
    "DECODES",
    "NUM_HOLDING",
    "ARRIVING_TOKENS",
    "LINK_BUSY_S",
    "HAS_PREFILL",
)


class Chooser:
    """Picks from the request and how often it was decided, and notes what engines reported."""

    def __init__(self) -> None:
        self.visits: dict[int, int] = {}
        self.seen: list[list[list[float]]] = []

    def __call__(self, request: int, allowed: list[bool]) -> int:
        self.visits[request] = self.visits.get(request, -1) + 1
        return choose(request, self.visits[request], allowed)


def seen_of_roles(sim: ReferenceSimulator, request: int, engine: Engine) -> list[float]:
    """What a policy sees of a replica's role and of transfers, from the plain simulator."""
    ways, r = sim.transfers, engine.r
    way = ways.ways[request]
    coming = [q for q in engine.waiting if ways.awaits(q)] + engine.remote
    return [
        engine.type.role != "decode",
        engine.type.role != "prefill",
        ways.holders(engine),
        sum(q.prompt for q in coming),
        max(0.0, ways.out_free_s[r] - sim.now_s, ways.in_free_s[r] - sim.now_s),
        r in (way.source, way.prefill_on),
    ]


def play_reference(spec: ClusterSpec, episode: Episode) -> tuple[ReferenceSimulator, Chooser]:
    sim, chooser = ReferenceSimulator(spec, episode), Chooser()

    def answer(request: int, allowed: list[bool]) -> int:
        metrics = sim.scraped if spec.metrics_interval_s else [e.metrics() for e in sim.replicas]
        hits = [sim.prefix_hit_tokens(request, e.r) if e.up else 0 for e in sim.replicas]
        roles = [seen_of_roles(sim, request, e) for e in sim.replicas]
        rows = [list(zip(*part, strict=True)) for part in (metrics, roles)]
        chooser.seen.append([*map(list, rows[0]), hits, *map(list, rows[1])])
        return chooser(request, allowed)

    sim.run(
        lambda _, request: answer(request, sim.allowed(request)),
        lambda _, request: answer(request, sim.places(request)),
    )
    return sim, chooser


def play_compiled(spec: ClusterSpec, episode: Episode) -> tuple[Simulator, Chooser]:
    sim = Simulator(spec, [episode], record=True, asks=Asks(place=WHERE_IT_MATTERS))
    chooser = Chooser()
    rows = [int(ReplicaFeature[name]) for name in SEEN]
    while sim.advance()[0] == DECISION:
        observations, _ = observe_batch(sim, Group.METRICS | Group.PREFIX | Group.ROLES)
        chooser.seen.append([observations.replicas[0, row].tolist() for row in rows])
        request = int(sim.state.env[0]["deciding"])
        sim.apply(np.array([chooser(request, observations.mask[0].tolist())]))
    return sim, chooser


def assert_same_events(spec: ClusterSpec, episode: Episode) -> np.ndarray:
    slow, plain = play_reference(spec, episode)
    fast, compiled = play_compiled(spec, episode)
    events = fast.events()
    assert_same_log(slow.events(), events)
    assert int(fast.state.env[0]["engine_steps"]) == slow.engine_steps
    np.testing.assert_allclose(float(fast.state.env[0]["area"]), slow.area, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.array(compiled.seen), np.array(plain.seen), rtol=1e-9, atol=1e-9)
    link = fast.state.link[0, : episode.num_replicas]
    assert link["out_bytes"].tolist() == slow.transfers.out_bytes
    assert link["in_bytes"].tolist() == slow.transfers.in_bytes
    derived, direct = outcomes_from_events(events, episode.table), fast.outcomes()
    for column in direct.dtype.names or ():
        np.testing.assert_array_equal(direct[column], derived[column], err_msg=column)
    return events


@pytest.mark.parametrize("block", blocks(10))
def test_compiled_and_plain_simulator_agree_on_random_roles(block):
    landed = returned = 0
    for seed in range(40 * block, 40 * block + 40):
        events = assert_same_events(*with_roles(*random_case(seed), seed))
        landed += (events["kind"] == EV_LAND).sum()
        returned += (events["kind"] == EV_RETURN).sum()
    assert landed > 100
    assert returned > 10


@pytest.mark.parametrize("block", blocks(3))
def test_they_agree_on_requests_that_wait_for_others(block):
    for seed in range(2000 + 40 * block, 2040 + 40 * block):
        case = with_followers(*random_case(seed), seed)
        assert len(assert_same_events(*with_roles(*case, seed)))


@pytest.mark.parametrize("block", blocks(3))
def test_they_agree_on_conversations_whose_turns_are_retained(block):
    for seed in range(3000 + 40 * block, 3040 + 40 * block):
        case = with_conversations(*random_case(seed), seed)
        assert len(assert_same_events(*with_roles(*case, seed)))


@pytest.mark.parametrize("block", blocks(4))
def test_they_agree_on_ranks_in_lockstep_that_prefill_or_decode(block):
    landed = together = 0
    for seed in range(5000 + 40 * block, 5040 + 40 * block):
        spec, episode = with_roles_of_ranks(*random_case(seed), seed)
        events = assert_same_events(spec, episode)
        landed += (events["kind"] == EV_LAND).sum()
        together += any(spec.types[t].num_ranks > 1 for t in episode.type_idx)
    assert landed > 100
    assert together > 20


def test_they_agree_on_places_that_nobody_asks_for():
    for seed in range(4000, 4060):
        spec, episode = with_roles(*random_case(seed), seed)
        slow = ReferenceSimulator(spec, episode)
        slow.run()
        fast = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER))
        assert fast.advance()[0] == DONE
        assert_same_log(slow.events(), fast.events())


def pd_cluster(reservation="source", *, decode_blocks=64, lease_s=480.0, **rules):
    """Make a prefill and a decode replica type; the KV of a block of 4 tokens is 4 bytes."""
    return toy_cluster(
        replace(replica_type(), role="prefill", link=Link(16.0, latency_s=1.5, piece_s=0.5)),
        replace(
            replica_type(num_blocks=decode_blocks),
            role="decode",
            link=Link(8.0, latency_s=0.5, piece_s=0.25),
        ),
        transfers=TransferRules(
            1.0, kv_block_pieces=1, reservation=reservation, lease_s=lease_s, ahead_tokens=0
        ),
        **rules,
    )


def test_a_prefilled_request_is_fetched_and_computes_its_last_token_where_it_decodes(play):  # noqa: F811
    played = play(pd_cluster(), toy_episode([(0, 10, 3)], type_idx=(0, 1)), {})
    # prefilled in 1 + 1; 3 blocks: 3 * 0.25 to post, 12 / 8 to send, 0.5 to land; the last token
    # over 9 others: 1 + 0.1 + 0.09; decodes of kv 11 and 12
    assert_times(
        played,
        scheduled_s=[0],
        prefilled_s=[2],
        transfer_s=[2],
        landed_s=[4.75],
        first_token_s=[5.94],
        finish_s=[5.94 + 1.111 + 1.112],
        moved_bytes=[12],
    )
    assert played.outcomes["prefill_replica"].tolist() == [0]
    assert played.outcomes["replica"].tolist() == [1]


def test_memory_is_set_aside_before_the_prefill_and_the_source_posts(play):  # noqa: F811
    spec = pd_cluster("destination")
    played = play(spec, toy_episode([(0, 10, 3)], type_idx=(0, 1)), {})
    # of the source now: 3 * 0.5 to post, 1.5 to land; the slower link of both: 12 / 8
    assert_times(played, prefilled_s=[2], transfer_s=[2], landed_s=[6.5], first_token_s=[7.69])


def test_before_the_prefill_memory_stays_free_for_each_active_request(play):  # noqa: F811
    spec = pd_cluster("destination", decode_blocks=8)
    spec = replace(spec, transfers=replace(spec.transfers, ahead_tokens=12))
    played = play(spec, toy_episode([(0, 10, 2), (0, 10, 2)], type_idx=(0, 1)), {})
    # 8 blocks: the first takes 3, the second would need 3 and 3 ahead. The first is prefilled in 2,
    # lands at 6.5 and ends after 1.19 and 1.111; then the second starts
    assert_times(played, prefilled_s=[2, 8.801 + 2], finish_s=[8.801, 8.801 + 8.801])


def test_links_serve_transfers_in_order(play):  # noqa: F811
    played = play(pd_cluster(), toy_episode([(0, 10, 2), (0, 10, 2)], type_idx=(0, 1)), {})
    # both prefilled after 1 + 2; each keeps the links busy for 2.25, and lands 0.5 later
    assert_times(played, prefilled_s=[3, 3], transfer_s=[3, 3], landed_s=[5.75, 8.0])


def test_transfers_over_other_links_do_not_wait(play):  # noqa: F811
    episode = toy_episode([(0, 10, 2), (0, 10, 2)], type_idx=(0, 0, 1, 1))
    played = play(pd_cluster(), episode, {1: [1]})
    # prefilled in 2 each; the second finds one request under way to the first of the two others
    assert_times(played, landed_s=[4.75, 4.75])
    assert played.outcomes["replica"].tolist() == [2, 3]


def test_prefilled_kv_that_nobody_fetches_in_time_is_given_up_and_computed_again(play):  # noqa: F811
    spec = pd_cluster(decode_blocks=3, lease_s=1.0)
    played = play(spec, toy_episode([(0, 10, 2), (0, 10, 2)], type_idx=(0, 1)), {})
    # the first fills the memory from 3 to 5.75 + 1.19 + 1.111 = 8.051. The second is given up at 4,
    # prefilled again by 6, given up at 7, and prefilled by 9, when there is memory
    assert_times(played, prefilled_s=[3, 9], finish_s=[8.051, 11.75 + 1.19 + 1.111])
    assert played.outcomes["num_restarts"].tolist() == [0, 2]


def test_kv_on_its_way_is_lost_with_its_source(play):  # noqa: F811
    episode = toy_episode(
        [(0, 10, 2)], type_idx=(0, 0, 1), faults=[(3, 0, FAULT_DOWN, 0), (9, 0, FAULT_UP, 0)]
    )
    played = play(pd_cluster(), episode, {0: [0, 1]})
    assert_times(played, prefilled_s=[5], landed_s=[7.75], moved_bytes=[12])
    assert played.outcomes["prefill_replica"].tolist() == [1]
    assert played.outcomes["num_restarts"].tolist() == [1]


def test_prefilled_kv_goes_elsewhere_when_the_replica_it_is_on_the_way_to_fails(play):  # noqa: F811
    episode = toy_episode(
        [(0, 10, 2)], type_idx=(0, 1, 1), faults=[(3, 1, FAULT_DOWN, 0), (9, 1, FAULT_UP, 0)]
    )
    played = play(pd_cluster(), episode, {})
    # the link of the source stays booked until 2 + 2.25
    assert_times(played, prefilled_s=[2], transfer_s=[3], landed_s=[7.0], moved_bytes=[12])
    assert played.outcomes["replica"].tolist() == [2]
    assert played.outcomes["num_restarts"].tolist() == [0]


def test_blocks_that_are_there_already_are_not_moved(play):  # noqa: F811
    spec = pd_cluster(prefix_caching=True)
    episode = toy_episode([(0, 10, 2), (50, 10, 2)], texts=[(1, 10), (1, 10)], type_idx=(0, 1))
    # two whole blocks are in both caches; 1 block: 0.25 + 4 / 8 + 0.5
    played = play(spec, episode, {})
    assert played.outcomes["moved_bytes"].tolist() == [12, 4]
    assert played.outcomes["cached_tokens"].tolist() == [0, 8]
    waited_s = played.outcomes["landed_s"] - played.outcomes["transfer_s"]
    assert waited_s == pytest.approx([2.75, 1.25])


def test_a_request_that_a_mixed_replica_takes_is_not_moved(play):  # noqa: F811
    spec = pd_cluster()
    spec = replace(spec, types=(*spec.types, replace(replica_type(), role="mixed")))
    played = play(spec, toy_episode([(0, 10, 3)], type_idx=(0, 1, 2)), {0: [2]})
    assert_times(played, first_token_s=[2], finish_s=[2 + 1.111 + 1.112], moved_bytes=[0])
    assert played.outcomes["prefill_replica"].tolist() == [-1]


@many
@given(st.integers(0, 2**32 - 1))
def test_blocks_are_held_at_both_ends_and_every_request_is_in_one_place(seed):
    spec, episode = with_roles(*random_case(seed), seed)
    sim = Simulator(spec, [episode], asks=Asks(place=ALWAYS))
    chooser = Chooser()
    looks = 0
    while True:
        due = sim.advance()[0] == DECISION
        looks += 1
        check_blocks(sim)
        check_places(sim)
        if not due:
            break
        env = sim.state.env[0]
        sim.apply(np.array([chooser(int(env["deciding"]), sim.state.allowed[0].tolist())]))
    assert looks > 0
    link, moved = sim.state.link[0], sim.outcomes()["moved_bytes"]
    assert link["out_bytes"].sum() == link["in_bytes"].sum() == moved.sum()
    assert not sim.state.observation[0, [OBSERVED_OUTSTANDING, OBSERVED_PENDING_PREFILL]].any()
    for name in ("num_holding", "num_remote", "num_landed"):
        assert not link[name].any(), name


def check_blocks(sim: Simulator) -> None:
    """Blocks held are those in rows of block tables, of requests here or at their other end."""
    spec, episode = sim.spec, sim.episodes[0]
    requests, ways = sim.state.request[0], sim.state.transfer[0]
    assert episode.num_replicas > 1
    for r in range(episode.num_replicas):
        num_blocks = spec.types[episode.type_idx[r]].num_blocks
        here = (requests["replica"] == r) & np.isin(requests["status"], (TRANSFERRING, LANDED))
        held = blocks_held(sim, r) + int(requests["table_len"][here].sum())
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


def check_places(sim: Simulator) -> None:
    """A request is running, waiting, remote, on hold or returned, or on its way between."""
    env, requests = sim.state.env[0], sim.state.request[0]
    timers = sim.state.timer[0, : env["num_timers"]]
    turns = timers[np.isin(timers["kind"], (RETURN, HOLD_OVER, PLACING, JOINING))]
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
    landings = timers["subject"][timers["kind"] == LANDING]
    assert sorted(landings) == np.flatnonzero(requests["status"] == TRANSFERRING).tolist()


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (("prefill", "prefill"), "requests need some of role decode or mixed"),
        (("mixed", "decode"), "role decode get requests from those of role prefill"),
    ],
)
def test_roles_that_leave_requests_nowhere_to_go_are_refused(types, said):
    spec = toy_cluster(*(replace(replica_type(), role=role) for role in types))
    with pytest.raises(ConfigError, match=said):
        toy_episode([(0, 10, 3)], type_idx=(0, 1)).validate(spec)


def test_a_request_that_fits_nowhere_it_could_decode_is_refused():
    with pytest.raises(ConfigError, match="needs 12 KV tokens, but the largest replica holds 8"):
        toy_episode([(0, 10, 3)], type_idx=(0, 1)).validate(pd_cluster(decode_blocks=2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Link(0.0), "bytes_per_s of a link must be above 0, got 0.0"),
        (lambda: Link(1.0, latency_s=-1.0), "latency_s of a link must be at least 0"),
        (lambda: TransferRules(lease_s=0.0), "lease_s must be above 0, got 0.0"),
        (lambda: TransferRules(reservation="sorce"), "did you mean source"),
        (lambda: TransferRules(ahead_tokens=-1), "ahead_tokens must be at least 0, got -1"),
        (lambda: replace(replica_type(), role="prefil"), "did you mean prefill"),
        (
            lambda: toy_cluster(
                replace(replica_type(), role="prefill"), replace(replica_type(), engine="sglang")
            ),
            "must have the engine vllm, as all replicas where some only prefill",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
