"""Live replicas that prefill or decode do what the simulator's do, at the same times."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster import state as st
from servegym.cluster.simulator import Simulator
from servegym.export.resolve import resolve_policy
from servegym.policy.run import run
from servegym.scenario import load_scenario
from servegym.serve.engine.request import EngineRequest, Status
from servegym.serve.engine.roles import DecodeReplica, Kept, Links, make_replica

from .test_replica import Log, block_names

COMPARED = (st.EV_FIRST_TOKEN, st.EV_PREEMPT, st.EV_FINISH)


class LiveFleet:
    """Replicas with roles that are given what the simulator's router gave its own."""

    def __init__(self, spec, episode) -> None:
        self.table, self.size, self.log = episode.table, spec.block_size, Log()
        self.kinds = [spec.types[t] for t in episode.type_idx]
        self.sources = tuple(kind for kind in spec.types if kind.role == "prefill")
        self.requests: dict[int, EngineRequest] = {}
        self.kept: dict[int, Kept] = {}
        self.replicas = []
        links = Links()
        for kind, speed in zip(self.kinds, episode.speed, strict=True):
            settings = {
                "block_size": spec.block_size,
                "prefix_caching": spec.prefix_caching,
                "chunked_prefill": spec.chunked_prefill,
                "speed": float(speed),
                "transfers": spec.transfers,
            }
            self.replicas.append(
                make_replica(kind, self.log, other_ends=self.sources, links=links, **settings)
            )

    def run_until(self, time_s: float) -> None:
        """Do all that is due, in order of time."""
        while True:
            due_s, r = min((replica.due_s, r) for r, replica in enumerate(self.replicas))
            if due_s > time_s or math.isinf(due_s):
                return
            self.log.replica = r
            self.replicas[r].step()

    def make(self, i: int, output: int) -> EngineRequest:
        prompt = int(self.table.prompt_tokens[i])
        return EngineRequest(str(i), prompt, output, block_names(self.table, i, self.size))

    def dispatch(self, now_s: float, i: int, r: int) -> None:
        replica = self.replicas[r]
        if isinstance(replica, DecodeReplica):
            self.requests[i] = self.make(i, int(self.table.output_tokens[i]))
            replica.submit(self.requests[i], now_s)
            return
        leg = self.make(i, 1)
        self.kept[i] = Kept(r, leg.prompt_tokens, lambda at_s: replica.release(leg, at_s))
        self.requests[i] = leg
        replica.submit(leg, now_s)

    def place(self, now_s: float, i: int, r: int) -> None:
        assert self.requests[i].status is Status.FINISHED
        kept = self.kept[i]
        kind = self.sources.index(self.kinds[kept.source])
        self.requests[i] = self.make(i, int(self.table.output_tokens[i]))
        self.replicas[r].fetch(self.requests[i], kept, kind, now_s)


def compare(scenario, policy: str, seed: int, num_requests: int) -> None:
    episode = scenario.episode(seed, num_requests=num_requests)
    simulator = Simulator(scenario.spec, [episode], record=True)
    run(simulator, resolve_policy(policy))
    events = simulator.events()
    live = LiveFleet(scenario.spec, episode)
    for event in events[np.isin(events["kind"], (st.EV_DISPATCH, st.EV_PLACE))]:
        now_s, i, r = float(event["time_s"]), int(event["request"]), int(event["replica"])
        live.run_until(now_s)
        (live.dispatch if event["kind"] == st.EV_DISPATCH else live.place)(now_s, i, r)
    live.run_until(math.inf)
    prefills = [r for r, kind in enumerate(live.kinds) if kind.role == "prefill"]
    expected = sorted(
        (int(e["request"]), int(e["kind"]), int(e["replica"]), float(e["time_s"]))
        for e in events[np.isin(events["kind"], COMPARED)]
    )
    found = sorted(
        (i, kind, r, time_s)
        for time_s, kind, i, r, _ in live.log.events
        if kind in COMPARED and r not in prefills
    )
    assert int((events["kind"] == st.EV_LAND).sum()) > num_requests // 2
    assert [event[:3] for event in found] == [event[:3] for event in expected]
    # where the simulator has looked at a stretch of steps its times are summed up otherwise
    late_s = [live_s - due_s for (*_, live_s), (*_, due_s) in zip(found, expected, strict=True)]
    assert np.abs(late_s).max() < 1e-9
    for replica in live.replicas:
        assert replica.num_free_blocks == replica.kind.num_blocks
        assert replica.num_running == replica.num_waiting == 0


def test_equal_replicas_prefill_move_and_decode_at_the_simulators_times():
    compare(load_scenario("pd-equal"), "token-least-load", 3, 300)


def test_prefix_caches_of_unequal_ones_too():
    compare(load_scenario("pd-unequal"), "splitwise", 4, 300)
