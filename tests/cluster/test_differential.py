"""The compiled simulator does what the plain one does, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, DONE, EV_PREEMPT, NEVER, NUM_EVENTS, Asks
from servegym.engines import ENGINES, EngineName
from servegym.policy.contract import Group, ReplicaFeature
from servegym.policy.observe import observe_batch

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import choose, long_answers, random_case, with_followers, with_ranks


def play_reference(spec, episode):
    sim = ReferenceSimulator(spec, episode)
    visits: dict[int, int] = {}
    seen = []

    def dispatch(s, request):
        visits[request] = visits.get(request, -1) + 1
        metrics = s.scraped if spec.metrics_interval_s else [e.metrics() for e in s.replicas]
        hits = [s.prefix_hit_tokens(request, r) if e.up else 0 for r, e in enumerate(s.replicas)]
        seen.append([*map(list, zip(*metrics, strict=True)), hits])
        return choose(request, visits[request], s.allowed(request))

    sim.run(dispatch)
    return sim, seen


def play_compiled(spec, episode):
    sim = Simulator(spec, [episode], record=True)
    visits: dict[int, int] = {}
    seen = []
    rows = [
        int(ReplicaFeature[name])
        for name in (
            "NUM_RUNNING",
            "NUM_WAITING",
            "KV_CACHE_USAGE",
            "GENERATED_TOKENS",
            "PREFIX_HIT_TOKENS",
        )
    ]
    while sim.advance()[0] == DECISION:
        request = int(sim.state.env[0]["deciding"])
        visits[request] = visits.get(request, -1) + 1
        observations, _ = observe_batch(sim, Group.METRICS | Group.PREFIX)
        seen.append([observations.replicas[0, row].tolist() for row in rows])
        mask = observations.mask[0].tolist()
        sim.apply(np.array([choose(request, visits[request], mask)]))
    return sim, seen


def assert_equal(seed: int, engines: Sequence[EngineName] = ("vllm",)) -> None:
    assert_same_events(*random_case(seed, engines))


def assert_same_log(want: np.ndarray, got: np.ndarray) -> None:
    for kind in range(NUM_EVENTS):
        a, b = want[want["kind"] == kind], got[got["kind"] == kind]
        a, b = (np.sort(x, order=["request", "time_s"]) for x in (a, b))
        assert a["request"].tolist() == b["request"].tolist(), f"kind {kind}"
        assert a["replica"].tolist() == b["replica"].tolist(), f"kind {kind}"
        assert a["value"].tolist() == b["value"].tolist(), f"kind {kind}"
        np.testing.assert_allclose(b["time_s"], a["time_s"], rtol=1e-9, atol=1e-12)


def assert_same_events(spec: ClusterSpec, episode: Episode) -> ReferenceSimulator:
    slow, slow_seen = play_reference(spec, episode)
    fast, fast_seen = play_compiled(spec, episode)
    got = fast.events()
    assert_same_log(slow.events(), got)
    assert int(fast.state.env[0]["engine_steps"]) == slow.engine_steps
    np.testing.assert_allclose(float(fast.state.env[0]["area"]), slow.area, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.array(fast_seen), np.array(slow_seen), rtol=1e-9, atol=1e-9)
    derived, direct = outcomes_from_events(got, episode.table), fast.outcomes()
    for column in direct.dtype.names or ():
        np.testing.assert_array_equal(direct[column], derived[column], err_msg=column)
    return slow


@pytest.mark.parametrize("block", blocks(10))
def test_compiled_and_plain_simulator_agree_on_random_scenarios(block):
    for seed in range(40 * block, 40 * block + 40):
        assert_equal(seed)


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "vllm"])
@pytest.mark.parametrize("block", blocks(3))
def test_they_agree_on_other_engines(block, engine):
    for seed in range(40 * block, 40 * block + 40):
        assert_equal(seed, [engine])


@pytest.mark.parametrize("block", blocks(3))
def test_they_agree_on_fleets_of_several_engines(block):
    for seed in range(1000 + 40 * block, 1040 + 40 * block):
        assert_equal(seed, ENGINES)


@pytest.mark.parametrize("block", blocks(3))
def test_they_agree_on_requests_that_wait_for_others(block):
    for seed in range(2000 + 40 * block, 2040 + 40 * block):
        assert_same_events(*with_followers(*random_case(seed, ENGINES), seed))


def test_they_agree_on_dispatches_that_nobody_asks_for():
    for seed in range(3000, 3040):
        spec, episode = with_followers(*random_case(seed, ENGINES), seed)
        slow = ReferenceSimulator(spec, episode)
        slow.run()
        fast = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER))
        assert fast.advance()[0] == DONE
        assert_same_log(slow.events(), fast.events())


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "vllm-priority"])
@pytest.mark.parametrize("block", range(2))
def test_they_agree_on_ranks_in_lockstep(block, engine):
    for seed in range(4000 + 40 * block, 4040 + 40 * block):
        assert_same_events(*with_ranks(*random_case(seed, [engine]), seed))


def test_they_agree_on_ranks_beside_replicas_that_step_by_themselves():
    for seed in range(5000, 5060):
        spec, episode = with_ranks(*random_case(seed, ENGINES), seed)
        assert_same_events(*with_followers(spec, episode, seed))


def test_they_agree_on_ranks_whose_requests_outgrow_their_blocks():
    preempted = 0
    for seed in range(12):
        spec, episode = with_ranks(*long_answers(seed, "vllm"), seed)
        slow = assert_same_events(replace(spec, chunked_prefill=True), episode)
        preempted += int((slow.events()["kind"] == EV_PREEMPT).sum())
    assert preempted > 10


def test_they_agree_where_sglang_retracts():
    retracted = 0
    for seed in range(24):
        slow = assert_same_events(*long_answers(seed, "sglang"))
        retracted += int((slow.events()["kind"] == EV_PREEMPT).sum())
    assert retracted > 30
