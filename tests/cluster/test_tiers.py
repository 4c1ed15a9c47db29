"""Tiers behind KV blocks, and what becomes of the KV of ended turns."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.cluster.identities import private_names
from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Link, TransferRules
from servegym.cluster.state import (
    ALWAYS,
    DECISION,
    DISK,
    DROP,
    EV_DISK,
    EV_HOST,
    EV_LAND,
    EV_MIGRATE,
    EV_PEER,
    EV_RETURN,
    EV_STORE,
    FAULT_DOWN,
    FAULT_UP,
    HOST,
    KEEP,
    LANDED,
    LEAVE,
    NEVER,
    NUM_RETENTIONS,
    OFFLOAD,
    RETAIN,
    STORE,
    TRANSFERRING,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.cluster.tier_rules import KvTier, TierRules
from servegym.errors import ConfigError, InvalidAction
from servegym.policy.contract import Group, ReplicaFeature
from servegym.policy.observe import observe_batch

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import (
    choose,
    random_case,
    with_conversations,
    with_fetching,
    with_migration,
    with_roles,
    with_tiers,
)
from .test_differential import assert_same_log
from .test_invariants import chain, many
from .test_migration import without_pauses
from .test_toys import (
    assert_times,
    play,  # noqa: F401 - a fixture
    replica_type,
    toy_cluster,
    toy_episode,
)

SEEN = ("NUM_RUNNING", "NUM_WAITING", "KV_CACHE_USAGE", "GENERATED_TOKENS", "PREFIX_HIT_TOKENS")


def retention(turn: int, allowed: list[bool]) -> tuple[int, float]:
    """Say what becomes of the KV of a turn, and for how long it is kept."""
    rng = np.random.default_rng((turn, 11))
    answer = int(rng.choice([i for i, ok in enumerate(allowed) if ok]))
    return answer, float(rng.choice([0.0, 0.05, 0.4, 3.0]))


def play_reference(spec: ClusterSpec, episode: Episode, asks: Asks):
    sim, visits, seen = ReferenceSimulator(spec, episode), {}, []

    def look(request: int) -> None:
        metrics = sim.scraped if spec.metrics_interval_s else [e.metrics() for e in sim.replicas]
        hits = [sim.prefix_hit_tokens(request, e.r) if e.up else 0 for e in sim.replicas]
        seen.append([*map(list, zip(*metrics, strict=True)), hits])

    def send(request, allowed):
        visits[request] = visits.get(request, -1) + 1
        look(request)
        return choose(request, visits[request], allowed)

    def dispatch(_, request):
        return send(request, sim.allowed(request))

    def place(_, request):
        return send(request, sim.places(request))

    def retain(_, turn):
        engine = next(e for e in sim.replicas if e.pool.undecided(turn))
        return retention(turn, [True, True, bool(sim.tiers.of(engine)), True])

    asked = retain if asks.retain != NEVER else None
    sim.run(
        dispatch,
        place if asks.place != NEVER else None,
        retain=asked,
        retain_all=asks.retain == ALWAYS,
    )
    return sim, seen


def play_compiled(spec: ClusterSpec, episode: Episode, asks: Asks):
    sim, visits, seen = Simulator(spec, [episode], record=True, asks=asks), {}, []
    rows = [int(ReplicaFeature[name]) for name in SEEN]
    while sim.advance()[0] == DECISION:
        env = sim.state.env[0]
        request = int(env["deciding"])
        if env["decision"] == RETAIN:
            kind = spec.types[episode.type_idx[int(env["asking"])]]
            tiered = any((kind.host_kv, kind.disk_kv, spec.tiers.store))
            answer, keep_s = retention(request, [True, True, tiered, True])
            sim.state.env["keep_s"][0] = keep_s
        else:
            observations, _ = observe_batch(sim, Group.METRICS | Group.PREFIX)
            seen.append([observations.replicas[0, row].tolist() for row in rows])
            visits[request] = visits.get(request, -1) + 1
            answer = choose(request, visits[request], observations.mask[0].tolist())
        sim.apply(np.array([answer]))
    return sim, seen


def contents_by_name(sim: Simulator) -> dict[int, tuple[str, int, int]]:
    """What the plain simulator calls the blocks that the compiled one has numbered."""
    table, size, contents = sim.episodes[0].table, sim.spec.block_size, {}
    for i in range(len(table)):
        rows = range(table.prefix_offsets[i], table.prefix_offsets[i + 1])
        for j in range((table.prompt_tokens[i] + table.output_tokens[i]) // size):
            last_token = (j + 1) * size - 1
            row = next((k for k in rows if table.prefix_ends[k] > last_token), None)
            if row is None:
                contents[private_names(i) + j] = ("own", i, j)
            else:
                name = int(sim.state.segment[0, row]["first_name"]) + j
                contents[name] = ("shared", int(table.prefix_keys[row]), j)
    assert len(set(contents.values())) == len(contents)
    return contents


def assert_same_events(spec: ClusterSpec, episode: Episode, asks: Asks = Asks()) -> np.ndarray:
    slow, told = play_reference(spec, episode, asks)
    fast, seen = play_compiled(spec, episode, asks)
    events = fast.events()
    assert_same_log(without_pauses(slow.events()), without_pauses(events))
    plain = outcomes_from_events(slow.events(), episode.table)["paused_s"]
    np.testing.assert_allclose(fast.outcomes()["paused_s"], plain, rtol=1e-9, atol=1e-12)
    assert int(fast.state.env[0]["engine_steps"]) == slow.engine_steps
    np.testing.assert_allclose(float(fast.state.env[0]["area"]), slow.area, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.array(seen), np.array(told), rtol=1e-9, atol=1e-9)
    contents = contents_by_name(fast)
    for r in range(episode.num_replicas):
        for tier in (HOST, DISK, STORE):
            found = [contents[name] for name in held(fast, r, tier)]
            assert found == list(slow.tiers.copies[r][tier].ready_s)
    link = fast.state.link[0, : episode.num_replicas]
    assert link["out_bytes"].tolist() == slow.transfers.out_bytes
    assert link["in_bytes"].tolist() == slow.transfers.in_bytes
    derived, direct = outcomes_from_events(events, episode.table), fast.outcomes()
    for column in direct.dtype.names or ():
        np.testing.assert_array_equal(direct[column], derived[column], err_msg=column)
    return events


def held(sim: Simulator, r: int, tier: int) -> list[int]:
    """Return the identities of the blocks of a tier, the one used longest ago first."""
    if sim.params.tier_num_blocks[sim.episodes[0].type_idx[r], tier] == 0:
        return []
    own = sim.state.tier_block[0, r, tier] if tier != STORE else sim.state.store_block[0]
    end = len(own) - 1
    order, block = [], int(own[end]["after"])
    while block != end:
        order.append(int(own[block]["identity"]))
        block = int(own[block]["after"])
    return order


@pytest.mark.parametrize("block", blocks(8))
def test_compiled_and_plain_simulator_agree_on_random_tiers(block):
    landed = returned = 0
    for seed in range(40 * block, 40 * block + 40):
        case = random_case(seed)
        if seed % 2:
            case = with_conversations(*case, seed)
        events = assert_same_events(*with_tiers(*case, seed))
        landed += (events["kind"] == EV_LAND).sum()
        returned += (events["kind"] == EV_RETURN).sum()
    assert landed > 40
    assert returned > 10


@pytest.mark.parametrize("block", blocks(5))
def test_they_agree_where_others_prefill(block):
    landed, loaded, returned = 0, 0, 0
    for seed in range(9000 + 25 * block, 9025 + 25 * block):
        case = with_conversations(*random_case(seed), seed)
        spec, episode = with_tiers(*with_roles(*case, seed), seed)
        events = assert_same_events(spec, episode, asks_of(seed, spec))
        landed += (events["kind"] == EV_LAND).sum()
        loaded += np.isin(events["kind"], (EV_HOST, EV_DISK, EV_STORE)).sum()
        returned += (events["kind"] == EV_RETURN).sum()
    assert landed > 40
    assert loaded > 5
    assert returned > 10


@pytest.mark.parametrize("block", blocks(3))
def test_they_agree_where_requests_migrate(block):
    moved, loaded = 0, 0
    for seed in range(9500 + 25 * block, 9525 + 25 * block):
        case = with_conversations(*random_case(seed), seed)
        spec, episode = with_tiers(*with_migration(*case, seed), seed)
        events = assert_same_events(spec, episode)
        moved += (events["kind"] == EV_MIGRATE).sum()
        loaded += np.isin(events["kind"], (EV_HOST, EV_DISK, EV_STORE)).sum()
    assert moved > 40
    assert loaded > 10


@pytest.mark.parametrize("beside", ["nothing", "tiers", "roles", "migration"])
@pytest.mark.parametrize("block", range(2))
def test_they_agree_where_prefixes_are_fetched_from_peers(block, beside):
    fetched, returned = 0, 0
    for seed in range(8000 + 25 * block, 8025 + 25 * block):
        spec, episode = with_conversations(*random_case(seed), seed)
        if beside == "roles":
            spec, episode = with_roles(spec, episode, seed)
        if beside == "migration":
            spec, episode = with_migration(spec, episode, seed)
        if beside == "tiers" or (beside != "nothing" and seed % 2):
            spec, episode = with_tiers(spec, episode, seed)
        events = assert_same_events(*with_fetching(spec, episode, seed), asks_of(seed, spec))
        fetched += (events["kind"] == EV_PEER).sum()
        returned += (events["kind"] == EV_RETURN).sum()
    assert fetched > 10
    assert returned > 5


def asks_of(seed: int, spec: ClusterSpec) -> Asks:
    """Who decides: where requests decode, and what becomes of ended turns."""
    place = WHERE_IT_MATTERS if spec.disaggregated else NEVER
    return Asks(place=place, retain=[NEVER, WHERE_IT_MATTERS, ALWAYS][seed % 3])


@pytest.mark.parametrize("asked", [WHERE_IT_MATTERS, ALWAYS])
@pytest.mark.parametrize(
    ("engine", "tiers"), [("vllm", False), ("vllm", True), ("vllm-priority", False)]
)
def test_they_agree_on_what_somebody_decides_of_ended_turns(asked, engine, tiers):
    kept = 0
    for seed in range(7000, 7020):
        spec, episode = with_conversations(*random_case(seed, (engine,)), seed)
        if tiers:
            spec, episode = with_tiers(spec, episode, seed)
        kept += len(assert_same_events(spec, episode, Asks(retain=asked)))
    assert kept > 1000


def tiered(load="always", interference=1.0, store=None, num_blocks=4, seqs=8, **kinds):
    """Make engines of few KV blocks; each is 4 bytes, of 4 tokens."""
    return toy_cluster(
        replace(replica_type(num_blocks=num_blocks, seqs=seqs), **kinds),
        prefix_caching=True,
        transfers=TransferRules(kv_token_bytes=1.0),
        tiers=TierRules(load, interference, store, 16.0),
    )


#: Half a second to write a block, 2 s to read one.
SLOW = KvTier(16, read_bytes_per_s=2.0, write_bytes_per_s=8.0)
TEXT, STRANGER = (1, 1000), (2, 1000)


def assert_landed(played, expected):
    times_s = [math.nan if time_s is None else time_s for time_s in expected]
    np.testing.assert_allclose(played.outcomes["landed_s"], times_s, rtol=1e-12)


def test_kv_is_loaded_from_the_host_and_nobody_behind_it_waits(play):  # noqa: F811
    # the first text is stored by 2.8; another takes all four blocks until 5.6. At 10 its two
    # blocks are read until 14, while the last request has its step of 1.4 s, twice as long. Then
    # 4 tokens behind 8: 1 + 0.4 + 0.01 * 32, twice as long: the last one's block is written by 14.3
    requests = [(0, 8, 1), (3, 16, 1), (10, 12, 1), (11, 4, 1)]
    episode = toy_episode(requests, texts=[TEXT, STRANGER, TEXT, (3, 1000)])
    played = play(tiered(host_kv=SLOW, interference=2.0), episode, {})
    assert_times(played, finish_s=[1.8, 5.6, 14 + 2 * 1.72, 13.8])
    assert_landed(played, [None, None, 14, None])
    assert played.outcomes["cached_tokens"].tolist() == [0, 0, 8, 0]
    assert played.outcomes["host_tokens"].tolist() == [0, 0, 8, 0]
    assert played.outcomes["moved_bytes"].tolist() == [0, 0, 8, 0]
    assert played.outcomes["stored_bytes"].tolist() == [8, 16, 4, 4]


def test_kv_is_computed_anew_where_that_is_faster(play):  # noqa: F811
    requests = [(0, 8, 1), (3, 16, 1), (10, 12, 1)]
    episode = toy_episode(requests, texts=[TEXT, STRANGER, TEXT])
    played = play(tiered("faster", host_kv=SLOW), episode, {})
    # 8 tokens take 1.8 s, and reading their blocks 4
    assert_times(played, finish_s=[1.8, 5.6, 12.2])
    assert_landed(played, [None, None, None])
    fast = replace(SLOW, read_bytes_per_s=5.0)  # 1.6 s
    played = play(tiered("faster", host_kv=fast), episode, {})
    assert_times(played, finish_s=[1.8, 5.6, 11.6 + 1.72])
    assert_landed(played, [None, None, 11.6])


def test_steps_that_begin_while_kv_is_written_are_slowed(play):  # noqa: F811
    # both prompts in a step of 2.6 s; the first ends, and its blocks are written until 3.6. The
    # decodes of the second, 1.109 and 1.110 s, begin at 2.6 and, twice as long, at 4.818
    episode = toy_episode([(0, 8, 1), (0, 8, 3)], texts=[TEXT, STRANGER])
    played = play(tiered(host_kv=SLOW, interference=2.0, num_blocks=8), episode, {})
    assert_times(played, finish_s=[2.6, 2.6 + 2 * 1.109 + 1.110])


def test_other_replicas_load_from_the_store_and_then_have_it_in_their_hosts(play):  # noqa: F811
    # the store has the first text at 1.8 + 2 blocks at 4 bytes/s over the link, the slower
    link = KvTier(16, read_bytes_per_s=4.0, write_bytes_per_s=4.0, latency_s=0.5)
    episode = toy_episode(
        [(0, 8, 1), (10, 12, 1), (20, 16, 1), (30, 12, 1)],
        texts=[TEXT, TEXT, STRANGER, TEXT],
        type_idx=(0, 0),
    )
    spec = tiered(store=link, host_kv=KvTier(16, 16.0, 16.0))
    played = play(spec, episode, {0: [0], 1: [1], 2: [1], 3: [1]})
    # over the link in 2 s and 0.5, later from the own host in 0.5 s
    assert_landed(played, [None, 12.5, None, 30.5])
    assert played.outcomes["store_tokens"].tolist() == [0, 8, 0, 0]
    assert played.outcomes["host_tokens"].tolist() == [0, 0, 0, 8]


def test_a_replica_that_fails_has_what_is_on_its_disk_but_not_what_was_in_memory(play):  # noqa: F811
    faults = [(5.0, 0, FAULT_DOWN, 0.0), (6.0, 0, FAULT_UP, 0.0)]
    episode = toy_episode([(0, 8, 1), (10, 12, 1)], texts=[TEXT, TEXT], faults=faults)
    kinds = {"host_kv": SLOW, "disk_kv": KvTier(16, 1.0, 1.0)}
    played = play(tiered(**kinds), episode, {})
    assert played.outcomes["host_tokens"].tolist() == [0, 0]
    assert played.outcomes["disk_tokens"].tolist() == [0, 8]
    assert_times(played, finish_s=[1.8, 19.72])
    assert_landed(played, [None, 18])


def test_a_replica_that_fails_while_kv_comes_gives_its_requests_back(play):  # noqa: F811
    faults = [(11.0, 0, FAULT_DOWN, 0.0), (12.0, 0, FAULT_UP, 0.0)]
    requests = [(0, 8, 1), (3, 16, 1), (10, 12, 1)]
    episode = toy_episode(requests, texts=[TEXT, STRANGER, TEXT], faults=faults)
    played = play(tiered(host_kv=SLOW), episode, {})
    assert played.outcomes["num_restarts"].tolist() == [0, 0, 1]
    assert played.outcomes["moved_bytes"].tolist() == [0, 0, 0]
    assert played.outcomes["finish_s"][2] == pytest.approx(12.0 + 2.2, abs=0.06)


def test_a_preempted_request_finds_its_kv_in_the_host(play):  # noqa: F811
    # two requests of 8 tokens fill the four blocks; the second is preempted when the first decodes
    # beyond its own: it takes the second block of that, which is loaded when it has ended
    episode = toy_episode([(0, 8, 4), (0, 8, 4)], texts=[(1, 8), (2, 8)])
    played = play(tiered(host_kv=KvTier(16)), episode, {})
    assert played.outcomes["num_preemptions"].tolist() == [0, 1]
    assert played.outcomes["host_tokens"].tolist() == [0, 4]


def test_a_next_turn_that_is_prefilled_elsewhere_finds_what_was_decoded_in_the_store(play):  # noqa: F811
    # the first turn is prefilled by 1.8 and has 8 + 4 tokens where it decodes: that replica writes
    # its third block. Of the next turn the GPU that prefills has two, and the third is in the store
    # behind a link of 4 bytes/s, and 0.5 s; 4 tokens behind 12 take 1 + 0.4 + 0.01 * 48
    link = KvTier(16, read_bytes_per_s=4.0, write_bytes_per_s=4.0, latency_s=0.5)
    spec = tiered(store=link)
    types = tuple(replace(spec.types[0], role=role) for role in ("prefill", "decode"))
    episode = toy_episode([(0, 8, 5), (30, 16, 1)], texts=[TEXT, TEXT], type_idx=(0, 1))
    played = play(replace(spec, types=types), episode, {})
    assert_times(played, prefilled_s=[1.8, 31.5 + 1.88])
    assert played.outcomes["store_tokens"].tolist() == [0, 4]
    assert played.outcomes["stored_bytes"].tolist() == [12, 4]
    # over the links: the two blocks of the first turn, and all but three of the second
    assert played.outcomes["moved_bytes"].tolist() == [8, 4 + 4]


def fetching(threshold=1.0, bytes_per_s=4.0, **rules):
    """Make engines of four blocks that fetch prefixes: 0.25 s and 4 bytes a block, 0.5 s more."""
    spec = tiered(link=Link(bytes_per_s, latency_s=0.5, piece_s=0.25), **rules)
    return replace(spec, tiers=replace(spec.tiers, balancing_threshold=threshold))


def assert_fetched(played, tokens):
    assert played.outcomes["peer_tokens"].tolist() == tokens
    assert played.outcomes["moved_bytes"].tolist() == tokens  # a token has a byte


def test_a_prefix_is_fetched_from_a_peer_that_holds_it_meanwhile(play):  # noqa: F811
    # two blocks are on their way from 10 to 10 + 0.5 + 8 / 4 + 0.5; then 4 tokens behind 8. The
    # stranger needs all four blocks of the peer, and waits for those two until 13
    requests = [(0, 8, 1), (10, 12, 1), (11, 16, 1)]
    episode = toy_episode(requests, texts=[TEXT, TEXT, STRANGER], type_idx=(0, 0))
    played = play(fetching(), episode, {0: [0], 1: [1], 2: [0]})
    assert_times(played, finish_s=[1.8, 13 + 1.72, 13 + 2.6])
    assert_landed(played, [None, 13, None])
    assert_fetched(played, [0, 8, 0])
    assert played.outcomes["cached_tokens"].tolist() == [0, 8, 0]


@pytest.mark.parametrize(("threshold", "finish_s", "tokens"), [(1.5, 13.47, 4), (2.0, 12.12, 0)])
def test_a_prefix_that_is_not_enough_longer_is_computed(play, threshold, finish_s, tokens):  # noqa: F811
    # the second replica has one block, the first two: 1.25 + 0.5 s and 4 tokens behind 8, or 8
    # behind 4 in 1 + 0.8 + 0.32
    requests = [(0, 8, 1), (0, 5, 1), (10, 12, 1)]
    episode = toy_episode(requests, texts=[TEXT] * 3, type_idx=(0, 0))
    played = play(fetching(threshold), episode, {0: [0], 1: [1], 2: [1]})
    assert_times(played, finish_s=[1.8, 1.5, finish_s])
    assert_fetched(played, [0, 0, tokens])


@pytest.mark.parametrize(("bytes_per_s", "finish_s"), [(4.0, 12.2), (16.0, 11.5 + 1.72)])
def test_a_prefix_is_computed_where_that_is_faster_than_to_fetch_it(play, bytes_per_s, finish_s):  # noqa: F811
    episode = toy_episode([(0, 8, 1), (10, 12, 1)], texts=[TEXT] * 2, type_idx=(0, 0))
    played = play(fetching(bytes_per_s=bytes_per_s, load="faster"), episode, {0: [0], 1: [1]})
    assert_times(played, finish_s=[1.8, finish_s])


def test_a_prefix_that_a_peers_gpu_has_evicted_comes_from_its_host(play):  # noqa: F811
    requests = [(0, 8, 1), (3, 16, 1), (10, 12, 1), (20, 16, 1), (30, 12, 1)]
    texts = [TEXT, STRANGER, TEXT, (3, 1000), TEXT]
    episode = toy_episode(requests, texts=texts, type_idx=(0, 0))
    spec = fetching(host_kv=KvTier(16))
    played = play(spec, episode, {0: [0], 1: [0], 2: [1], 3: [1], 4: [1]})
    assert_landed(played, [None, None, 13, None, 30])
    assert played.outcomes["peer_tokens"].tolist() == [0, 0, 8, 0, 0]
    # what was fetched is in the own host from then on
    assert played.outcomes["host_tokens"].tolist() == [0, 0, 0, 0, 8]


def test_a_fetch_from_a_peer_that_fails_is_missed_when_it_should_have_come(play):  # noqa: F811
    faults = [(11.0, 0, FAULT_DOWN, 0.0), (12.0, 0, FAULT_UP, 0.0)]
    requests = [(0, 8, 1), (10, 12, 1)]
    episode = toy_episode(requests, texts=[TEXT] * 2, type_idx=(0, 0), faults=faults)
    played = play(fetching(), episode, {0: [0], 1: [1]})
    assert_times(played, finish_s=[1.8, 13 + 2.2])
    assert_fetched(played, [0, 0])
    assert played.outcomes["cached_tokens"].tolist() == [0, 0]


def test_a_replica_that_fails_while_it_fetches_leaves_the_peer_its_blocks(play):  # noqa: F811
    faults = [(11.0, 1, FAULT_DOWN, 0.0), (12.0, 1, FAULT_UP, 0.0)]
    requests = [(0, 8, 1), (10, 12, 1)]
    episode = toy_episode(requests, texts=[TEXT] * 2, type_idx=(0, 0), faults=faults)
    played = play(fetching(), episode, {0: [0], 1: [1, 0]})
    assert_times(played, finish_s=[1.8, 11 + 1.72])
    assert_fetched(played, [0, 0])
    assert played.outcomes["num_restarts"].tolist() == [0, 1]


def test_a_request_that_is_preempted_where_it_decodes_is_loaded_there(play):  # noqa: F811
    # both come to four blocks; the second gives its own way, of which the first takes one
    spec = tiered(host_kv=KvTier(16))
    types = (
        replace(replica_type(num_blocks=64), role="prefill"),
        replace(spec.types[0], role="decode"),
    )
    episode = toy_episode([(0, 8, 4), (0, 8, 4)], texts=[(1, 8), (2, 8)], type_idx=(0, 1))
    played = play(replace(spec, types=types), episode, {})
    assert played.outcomes["prefill_replica"].tolist() == [0, 0]
    assert played.outcomes["num_preemptions"].tolist() == [0, 1]
    assert played.outcomes["host_tokens"].tolist() == [0, 4]
    assert played.outcomes["moved_bytes"].tolist() == [8, 8 + 4]


def decide(spec, episode, answers, keep_s=100.0):
    """Play with these answers of turns, and whom they were about."""
    sim = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER, retain=ALWAYS))
    asked = []
    while sim.advance()[0] == DECISION:
        env = sim.state.env[0]
        assert env["decision"] == RETAIN
        turn = int(env["deciding"])
        asked.append((float(env["now_s"]), turn))
        sim.state.env["keep_s"][0] = keep_s
        sim.apply(np.array([answers.get(turn, LEAVE)]))
    return sim, asked


@pytest.mark.parametrize(
    ("answer", "cached", "host"),
    [(LEAVE, 4, 0), (DROP, 0, 0), (KEEP, 8, 0), (OFFLOAD, 8, 4)],
)
def test_what_can_become_of_the_kv_of_a_turn(answer, cached, host):
    # 6 blocks: the first turn has 2; a stranger's 2 come behind them. Another takes 3: the two that
    # nobody used, and one more. That is the last block of the first turn where it is free as any
    # other; where it was dropped its blocks go first, with one of those unused
    requests = [(0, 8, 1), (3, 8, 1), (6, 12, 1), (20, 12, 1)]
    episode = toy_episode(requests, texts=[TEXT, STRANGER, (3, 1000), TEXT])
    sim, asked = decide(tiered(host_kv=KvTier(16), num_blocks=6), episode, {0: answer})
    outcomes = sim.outcomes()
    # with the end of the last request the episode is over
    assert asked == [(float(q["finish_s"]), int(q["request"])) for q in outcomes[:-1]]
    assert outcomes["cached_tokens"].tolist() == [0, 0, 0, cached]
    assert outcomes["host_tokens"].tolist() == [0, 0, 0, host]
    assert outcomes["stored_bytes"][0] == (8 if answer in (OFFLOAD, KEEP) else 0)


def test_a_turn_that_is_needed_before_it_is_decided_is_offloaded():
    # the second request waits for the blocks of the first, and takes them the instant it ends
    episode = toy_episode([(0, 16, 1), (0, 16, 1), (9, 4, 1)], texts=[TEXT, STRANGER, TEXT])
    sim, asked = decide(tiered(host_kv=KvTier(16)), episode, {})
    assert asked == [(pytest.approx(5.2), 1)]
    assert sim.outcomes()["stored_bytes"].tolist() == [16, 0, 0]


def test_there_is_nothing_to_offload_to_without_tiers():
    spec = toy_cluster(replica_type(), prefix_caching=True)
    episode = toy_episode([(0, 8, 1), (9, 8, 1)])
    sim = Simulator(spec, [episode], asks=Asks(dispatch=NEVER, retain=ALWAYS))
    assert sim.advance()[0] == DECISION
    with pytest.raises(InvalidAction, match=r"choose one of \[0, 1, 3\] \(0 drops"):
        sim.apply(np.array([OFFLOAD]))


@many
@given(st.integers(0, 2**32 - 1))
def test_blocks_that_are_fetched_are_held_at_both_ends(seed):
    spec, episode = with_conversations(*random_case(seed), seed)
    if seed % 2:
        spec, episode = with_roles(spec, episode, seed)
    if seed % 3:
        spec, episode = with_tiers(spec, episode, seed)
    spec, episode = with_fetching(spec, episode, seed)
    sim, visits = Simulator(spec, [episode], asks=Asks(place=WHERE_IT_MATTERS)), 0
    while sim.advance()[0] == DECISION:
        check(sim)
        visits += 1
        answer = choose(int(sim.state.env[0]["deciding"]), visits, sim.state.allowed[0].tolist())
        sim.apply(np.array([answer]))
    check(sim)
    assert visits > 0
    assert (sim.state.transfer[0]["source"] < 0).all()
    link, outcomes = sim.state.link[0], sim.outcomes()
    assert not link["num_holding"].any()
    assert link["out_bytes"].sum() == link["in_bytes"].sum()
    loaded = sim.state.tier[0]["read_bytes"].sum()
    assert link["in_bytes"].sum() + loaded == outcomes["moved_bytes"].sum()


@many
@given(st.integers(0, 2**32 - 1))
def test_tiers_hold_no_more_than_they_can_and_every_request_is_in_one_place(seed):
    spec, episode = with_tiers(*with_conversations(*random_case(seed), seed), seed)
    sim = Simulator(spec, [episode], asks=Asks(retain=ALWAYS))
    looks, visits = 0, 0
    while sim.advance()[0] == DECISION:
        looks += 1
        check(sim)
        env = sim.state.env[0]
        visits += 1
        if env["decision"] == RETAIN:
            answer = [DROP, LEAVE, KEEP][visits % 3]
        else:
            answer = choose(int(env["deciding"]), visits, sim.state.allowed[0].tolist())
        sim.apply(np.array([answer]))
    check(sim)
    assert looks > 0
    link = sim.state.link[0]
    assert not link["num_remote"].any()
    assert not link["num_landed"].any()
    outcomes, tiers = sim.outcomes(), sim.state.tier[0]
    assert tiers["read_bytes"].sum() == outcomes["moved_bytes"].sum()
    assert tiers["written_bytes"].sum() == outcomes["stored_bytes"].sum()


def check(sim: Simulator) -> None:
    """Tiers are within their capacity, and blocks held are those of running and remote requests."""
    spec, episode, requests = sim.spec, sim.episodes[0], sim.state.request[0]
    assert episode.num_replicas > 0
    for r, type_idx in enumerate(episode.type_idx):
        kind = spec.types[type_idx]
        for tier, own in enumerate((kind.host_kv, kind.disk_kv, spec.tiers.store)):
            identities = held(sim, r, tier)
            assert len(identities) == len(set(identities)) <= (own.num_blocks if own else 0)
        remote = chain(requests, sim.state.link[0, r]["first_remote"], "next_request")
        link = sim.state.link[0, r]
        assert len(remote) == link["num_remote"]
        assert spec.moves_kv or len(remote) <= kind.max_num_seqs
        status = requests["status"][remote]
        assert np.isin(status, (TRANSFERRING, LANDED)).all()
        assert (status == LANDED).sum() == link["num_landed"]
        # a request that was loaded has the blocks of its whole text from the start
        replica, size = sim.state.replica[0, r], spec.block_size
        blocks = int(requests["table_len"][remote].sum())
        for i in chain(requests, replica["run_head"], "next_request"):
            q = requests[i]
            decoded = q["computed"] + replica["iteration"] - q["join_iter"] + 1
            own_blocks = -(-int(decoded) // size) if q["join_iter"] >= 0 else q["table_len"]
            blocks += int(own_blocks)
        if spec.moves_kv:  # what others hold here: those it sends to, and those that will come
            way, holding = sim.state.transfer[0], len(remote)
            for end in ("source", "target"):
                blocks += int(way[f"{end}_blocks"][way[end] == r].sum())
                holding += int((way[end] == r).sum())
            assert holding == link["num_holding"]
        assert sim.state.block[0, r]["holders"][: kind.num_blocks].sum() == blocks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KvTier(0), "must hold at least 1 block, got 0"),
        (lambda: KvTier(1, read_bytes_per_s=0.0), "read_bytes_per_s of a KV tier must be above 0"),
        (lambda: KvTier(1, latency_s=-1.0), "latency_s of a KV tier must be at least 0"),
        (lambda: TierRules("fastr"), "did you mean faster"),
        (lambda: TierRules(interference=0.5), "interference must be at least 1 and finite, got"),
        (lambda: TierRules(store_bytes_per_s=0.0), "store_bytes_per_s must be above 0, got 0"),
        (lambda: toy_cluster(tiers=TierRules(store=KvTier(1))), "prefix cache, which is off"),
        (
            lambda: toy_cluster(tiers=TierRules(store=KvTier(1)), prefix_caching=True),
            "kv_token_bytes must be above 0 where KV is loaded",
        ),
        (
            lambda: replace(tiered(host_kv=SLOW), types=(sglang(),), tiers=SHARED),
            "must have the engine vllm and step by itself",
        ),
        (lambda: fetching(0.5), "balancing_threshold must be at least 1 and finite, got 0.5"),
        (
            lambda: replace(fetching(), prefix_caching=False),
            "leave the tiers and balancing_threshold out",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


SHARED = TierRules(store=SLOW)


def sglang():
    return replace(replica_type(), engine="sglang")


assert len({DROP, LEAVE, OFFLOAD, KEEP}) == NUM_RETENTIONS
