"""Engines that go by priorities: compiled and plain, asked where and only where it matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType, SloClass
from servegym.cluster.state import (
    ALWAYS,
    DECISION,
    DISPATCH,
    DONE,
    NEVER,
    ORDER,
    QUEUED,
    RUNNING,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.workloads.table import RequestTable

from ..random_blocks import blocks  # noqa: TID252 - tests are no package
from ..toys import constant_grid  # noqa: TID252 - tests are no package
from .strategies import choose, random_case


def keys_of(num_requests: int, replica: int, asked: int) -> np.ndarray:
    """Keys that depend on who, where and when, with many ties."""
    x = np.arange(num_requests, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(replica * 7919 + asked * 104729 + 1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((x >> np.uint64(33)) % np.uint64(6)).astype(np.float64)


def with_classes(episode, seed):
    """Requests of two classes: keys before anybody is asked."""
    classes = np.random.default_rng((seed, 2)).integers(0, 2, len(episode.table)).astype(np.int16)
    return replace(episode, table=replace(episode.table, slo_class=classes))


def case_of(seed):
    spec, episode = random_case(seed, ["vllm-priority"])
    spec = replace(spec, slo_classes=spec.slo_classes * 2)
    return spec, with_classes(episode, seed)


def play_reference(spec, episode, asks):
    visits: dict[int, int] = {}
    asked = [0] * episode.num_replicas
    told = []

    def dispatch(s, request):
        visits[request] = visits.get(request, -1) + 1
        return choose(request, visits[request], s.allowed(request))

    def order(engine):
        keys = keys_of(len(episode.table), engine.r, asked[engine.r])
        asked[engine.r] += 1
        for q in engine.waiting + engine.running:
            q.key = float(keys[q.idx])
        told.append((engine.sim.now_s, engine.r, engine.step_s, len(engine.pool.free)))

    sim = ReferenceSimulator(
        spec,
        episode,
        order=None if asks == NEVER else order,
        each_step=asks == ALWAYS,
    )
    sim.run(dispatch)
    return sim, told


def play_compiled(spec, episode, asks):
    sim = Simulator(spec, [episode], record=True, asks=Asks(order=asks))
    visits: dict[int, int] = {}
    asked = [0] * episode.num_replicas
    told = []
    while True:
        if sim.advance()[0] == DONE:
            return sim, told
        env = sim.state.env[0]
        if env["decision"] == DISPATCH:
            request = int(env["deciding"])
            visits[request] = visits.get(request, -1) + 1
            mask = sim.state.allowed[0].tolist()
            sim.apply(np.array([choose(request, visits[request], mask)]))
            continue
        assert env["decision"] == ORDER
        r = int(env["asking"])
        forming, replica = sim.state.forming[0, r], sim.state.replica[0, r]
        now_s = float(env["now_s"])
        told.append((now_s, r, float(forming["step_s"]), int(replica["free_blocks"])))
        keys = keys_of(len(episode.table), r, asked[r])
        queued = np.isin(sim.state.request["status"][0], (QUEUED, RUNNING))
        mine = queued & (sim.state.request["replica"][0] == r)
        sim.state.order["key"][0, mine] = keys[mine]
        asked[r] += 1
        sim.apply(np.zeros(1, np.int64))


def assert_equal(seed: int, asks: int) -> int:
    spec, episode = case_of(seed)
    slow, slow_told = play_reference(spec, episode, asks)
    fast, fast_told = play_compiled(spec, episode, asks)
    want, got = slow.events(), fast.events()
    for kind in range(9):
        a, b = want[want["kind"] == kind], got[got["kind"] == kind]
        a, b = (np.sort(x, order=["request", "time_s"]) for x in (a, b))
        assert a["request"].tolist() == b["request"].tolist(), f"kind {kind}"
        assert a["replica"].tolist() == b["replica"].tolist(), f"kind {kind}"
        assert a["value"].tolist() == b["value"].tolist(), f"kind {kind}"
        np.testing.assert_allclose(b["time_s"], a["time_s"], rtol=1e-9, atol=1e-12)
    assert int(fast.state.env[0]["engine_steps"]) == slow.engine_steps
    np.testing.assert_allclose(float(fast.state.env[0]["area"]), slow.area, rtol=1e-9, atol=1e-12)
    assert len(fast_told) == len(slow_told)
    np.testing.assert_allclose(np.array(fast_told), np.array(slow_told), rtol=1e-9, atol=1e-12)
    return len(fast_told)


@pytest.mark.parametrize("asks", [NEVER, WHERE_IT_MATTERS, ALWAYS])
@pytest.mark.parametrize("block", blocks(3))
def test_compiled_and_plain_engine_agree_on_random_scenarios(block, asks):
    asked = sum(assert_equal(seed, asks) for seed in range(40 * block, 40 * block + 40))
    assert (asked > 100) == (asks != NEVER)


def test_a_request_that_preempts_itself_leaves_those_behind_it_out_of_the_step():
    # blocks of 4 tokens, 4 of them; each request has 3 prompt and 6 output tokens, and one is
    # admitted at 0, 1 and 2 s. At 3 s all blocks are held when the second, the least urgent, wants
    # one for its fifth token: it preempts itself, and the third gets nothing in that step
    kind = ReplicaType("t", constant_grid(1.0), 4, 64, 3, engine="vllm-priority")
    table = RequestTable.build(
        np.array([0.0, 0.5, 1.5]),
        np.full(3, 3),
        np.full(3, 6),
        slo_class=np.array([0, 2, 1], np.int16),
    )
    spec = ClusterSpec((kind,), (SloClass(),) * 3, block_size=4)
    episode = Episode(table, np.zeros(1, np.int16), np.ones(1))
    sim = Simulator(spec, [episode], record=True)
    while sim.advance()[0] == DECISION:
        sim.apply(np.zeros(1, np.int64))
    slow = ReferenceSimulator(spec, episode)
    slow.run(lambda *_: 0)
    fate = sim.outcomes()
    assert fate["num_preemptions"].tolist() == [0, 1, 0]
    # the third loses that one step; the second comes back, with 2 blocks, when the first has left
    assert fate["finish_s"].round(6).tolist() == [6.0, 10.0, 9.0]
    batches = sim.steps()
    assert batches["num_decodes"][batches["end_s"].round(6) == 4.0].tolist() == [1]
    want, got = (np.sort(x, order=["time_s", "request"]) for x in (slow.events(), sim.events()))
    np.testing.assert_allclose(got["time_s"], want["time_s"], rtol=1e-12)
