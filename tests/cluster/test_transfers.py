"""Requests that are prefilled on one replica and decode on another."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import (
    DECISION,
    DONE,
    EV_LAND,
    EV_RETURN,
    NEVER,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.policy.contract import Group, ReplicaFeature
from servegym.policy.observe import observe_batch

from .strategies import choose, random_case, with_conversations, with_followers, with_roles
from .test_differential import assert_same_log

SEEN = (
    "NUM_RUNNING",
    "NUM_WAITING",
    "KV_CACHE_USAGE",
    "GENERATED_TOKENS",
    "PREFIX_HIT_TOKENS",
)


class Chooser:
    """Picks from the request and how often it was decided, and notes what engines reported."""

    def __init__(self) -> None:
        self.visits: dict[int, int] = {}
        self.seen: list[list[list[float]]] = []

    def __call__(self, request: int, allowed: list[bool]) -> int:
        self.visits[request] = self.visits.get(request, -1) + 1
        return choose(request, self.visits[request], allowed)


def play_reference(spec: ClusterSpec, episode: Episode) -> tuple[ReferenceSimulator, Chooser]:
    sim, chooser = ReferenceSimulator(spec, episode), Chooser()

    def answer(request: int, allowed: list[bool]) -> int:
        metrics = sim.scraped if spec.metrics_interval_s else [e.metrics() for e in sim.replicas]
        hits = [sim.prefix_hit_tokens(request, e.r) if e.up else 0 for e in sim.replicas]
        chooser.seen.append([*map(list, zip(*metrics, strict=True)), hits])
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
        observations, _ = observe_batch(sim, Group.METRICS | Group.PREFIX)
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


@pytest.mark.parametrize("block", range(10))
def test_compiled_and_plain_simulator_agree_on_random_roles(block):
    landed = returned = 0
    for seed in range(40 * block, 40 * block + 40):
        events = assert_same_events(*with_roles(*random_case(seed), seed))
        landed += (events["kind"] == EV_LAND).sum()
        returned += (events["kind"] == EV_RETURN).sum()
    assert landed > 100
    assert returned > 10


@pytest.mark.parametrize("block", range(3))
def test_they_agree_on_requests_that_wait_for_others(block):
    for seed in range(2000 + 40 * block, 2040 + 40 * block):
        case = with_followers(*random_case(seed), seed)
        assert len(assert_same_events(*with_roles(*case, seed)))


@pytest.mark.parametrize("block", range(3))
def test_they_agree_on_conversations_whose_turns_are_retained(block):
    for seed in range(3000 + 40 * block, 3040 + 40 * block):
        case = with_conversations(*random_case(seed), seed)
        assert len(assert_same_events(*with_roles(*case, seed)))


def test_they_agree_on_places_that_nobody_asks_for():
    for seed in range(4000, 4060):
        spec, episode = with_roles(*random_case(seed), seed)
        slow = ReferenceSimulator(spec, episode)
        slow.run()
        fast = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER))
        assert fast.advance()[0] == DONE
        assert_same_log(slow.events(), fast.events())
