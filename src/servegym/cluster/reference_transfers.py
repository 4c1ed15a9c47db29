"""The plain way of requests that are prefilled on one replica and decode on another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from servegym.cluster import state as st
from servegym.cluster.reference_engine import Engine, Request

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator


@dataclass
class Way:
    """How far one request is on its way; replicas are -1 where there is none."""

    source: int = -1  # holds what it has prefilled
    prefill_on: int = -1  # will prefill it once blocks are set aside
    target: int = -1  # has set blocks aside while it is prefilled
    queued_at: int = -1  # where it waits for blocks, or its KV is on the way to
    moving: bool = False
    source_blocks: list[int] = field(default_factory=list)
    target_blocks: list[int] = field(default_factory=list)
    hits: int = 0
    lease_until_s: float = math.inf
    num_bytes: float = 0.0


class Transfers:
    """All transfers of a cluster."""

    def __init__(self, sim: ReferenceSimulator) -> None:
        self.sim, self.rules = sim, sim.spec.transfers
        self.ways = [Way() for _ in sim.requests]
        self.out_free_s = [0.0] * len(sim.replicas)
        self.in_free_s = [0.0] * len(sim.replicas)
        self.out_bytes = [0.0] * len(sim.replicas)
        self.in_bytes = [0.0] * len(sim.replicas)

    @property
    def block_bytes(self) -> float:
        """KV of one block."""
        return self.rules.kv_token_bytes * self.sim.spec.block_size

    def holders(self, engine: Engine) -> int:
        """Requests beside the running ones that hold blocks of a replica."""
        here = [w.source == engine.r or w.target == engine.r for w in self.ways]
        return sum(here) + len(engine.remote)

    def are_enough(self, engine: Engine) -> bool:
        """Whether as many requests hold blocks of a replica as can."""
        if not self.sim.spec.moves_kv:
            return False
        most = engine.type.max_num_seqs + self.rules.max_num_held
        return len(engine.running) + self.holders(engine) >= most

    def awaits(self, q: Request) -> bool:
        """Whether a waiting request is, or will be, prefilled elsewhere."""
        way = self.ways[q.idx]
        return way.source >= 0 or way.prefill_on >= 0

    def hand_over(self, engine: Engine, q: Request) -> None:
        """A replica that only prefills has done so."""
        way = self.ways[q.idx]
        engine.running.remove(q)
        way.source, way.source_blocks = engine.r, q.blocks
        way.lease_until_s = self.sim.now_s + self.rules.lease_s
        q.blocks, q.named = [], 0
        self.sim.tiers.keep(engine, q)
        self.sim.log(st.EV_PREFILLED, q.idx, engine.r)
        if way.target >= 0:
            q.blocks, way.target_blocks = way.target_blocks, []
            target, way.target = way.target, -1
            self.begin(q, self.sim.replicas[target])
        else:
            self.sim.set_timer(self.sim.now_s, st.PLACING, q.idx)

    def dispatched(self, q: Request, r: int) -> bool:
        """Whether a dispatched request must first be placed; then that is done."""
        if self.rules.reservation == "source" or self.sim.replicas[r].type.role != "prefill":
            return False
        self.ways[q.idx].prefill_on = r
        self.find_place(q)
        return True

    def find_place(self, q: Request) -> None:
        """Choose where a request decodes; try again later if no replica is up."""
        sim, way = self.sim, self.ways[q.idx]
        if way.source >= 0 and sim.now_s >= way.lease_until_s:
            self.expire(q)
            return
        options = [r for r, ok in enumerate(sim.places(q.idx)) if ok]
        if not options:
            again_s = sim.now_s + sim.spec.hold_s
            if way.source >= 0:
                again_s = min(again_s, way.lease_until_s)
            sim.set_timer(again_s, st.PLACING, q.idx)
            return
        if sim.place is not None and len(options) > 1:
            r = sim.place(sim, q.idx)
        else:
            r = min(options, key=lambda i: sim.replicas[i].busy())
        engine = sim.replicas[r]
        sim.log(st.EV_PLACE, q.idx, r)
        way.queued_at = r
        if way.source >= 0:
            sim.set_timer(way.lease_until_s, st.LEASE, q.idx)
        engine.enqueue(q)

    def set_aside(self, engine: Engine, q: Request) -> bool:
        """Set blocks aside for a whole text whose KV will come, if there are enough."""
        sim, way = self.sim, self.ways[q.idx]
        hit, unheld = engine.cached(q)
        blocks = engine.blocks(q.total) - len(hit)
        ahead = 0
        if way.source < 0:
            active = len(engine.running) + self.holders(engine)
            ahead = engine.blocks(self.rules.ahead_tokens * active)
        if blocks + unheld + ahead > engine.pool.num_free:
            return False
        engine.waiting.remove(q)
        for block in hit:
            engine.pool.hold(block)
        engine.pool.let_go_of(q.after)
        way.hits = len(hit)
        q.blocks = hit + [engine.pool.take() for _ in range(blocks)]
        if way.source >= 0:
            sim.cancel(q.idx)
            self.begin(q, engine)
            return True
        way.target, way.target_blocks, q.blocks = engine.r, q.blocks, []
        way.queued_at = -1
        sim.set_timer(sim.now_s, st.JOINING, q.idx)
        return True

    def begin(self, q: Request, engine: Engine) -> None:
        """Begin to move KV to a replica: links serve in order, one transfer at a time."""
        sim, way = self.sim, self.ways[q.idx]
        blocks = engine.blocks(q.total) - way.hits
        landing_s, way.num_bytes = self.book(sim.replicas[way.source], engine, blocks)
        way.queued_at, way.moving = engine.r, True
        engine.remote.append(q)
        sim.set_timer(landing_s, st.LANDING, q.idx)
        sim.log(st.EV_TRANSFER, q.idx, engine.r, way.num_bytes)

    def book(self, source: Engine, engine: Engine, blocks: int) -> tuple[float, float]:
        """Send blocks from one replica to another; return when they land, and their bytes."""
        poster = source if self.rules.reservation == "destination" else engine
        free_s = self.sent_s(source, engine, poster, blocks)
        self.out_free_s[source.r] = self.in_free_s[engine.r] = free_s
        return free_s + poster.type.link.latency_s, blocks * self.block_bytes

    def sent_s(self, source: Engine, engine: Engine, poster: Engine, blocks: int) -> float:
        """When blocks will have left one replica for another; one of the two posts them."""
        slower = min(source.type.link.bytes_per_s, engine.type.link.bytes_per_s)
        busy_s = blocks * self.rules.kv_block_pieces * poster.type.link.piece_s
        busy_s += blocks * self.block_bytes / slower
        return max(self.sim.now_s, self.out_free_s[source.r], self.in_free_s[engine.r]) + busy_s

    def go_off(self, kind: int, q: Request) -> None:
        """Do what a timer of a request on its way was set for."""
        way = self.ways[q.idx]
        if kind == st.PLACING:
            self.find_place(q)
        elif kind == st.LEASE:
            self.expire(q)
        elif kind == st.JOINING:
            engine, way.prefill_on = self.sim.replicas[way.prefill_on], -1
            engine.enqueue(q)
        else:
            engine = self.sim.replicas[way.queued_at]
            way.moving, way.queued_at = False, -1
            self.out_bytes[way.source] += way.num_bytes
            self.in_bytes[engine.r] += way.num_bytes
            self.sim.log(st.EV_LAND, q.idx, engine.r, way.num_bytes)
            self.release_source(q)
            engine.landed.append(q)
            engine.wake()

    def release_source(self, q: Request) -> None:
        """Give back the blocks where a request was prefilled."""
        way = self.ways[q.idx]
        engine, way.source = self.sim.replicas[way.source], -1
        engine.pool.release(way.source_blocks)
        way.source_blocks = []
        engine.wake()

    def expire(self, q: Request) -> None:
        """Nobody has fetched prefilled KV in time."""
        source = self.ways[q.idx].source
        self.release_source(q)
        self.drop(q, source)

    def drop(self, q: Request, source: int) -> None:
        """A prefill on a replica is lost: the request is dispatched anew."""
        sim, way = self.sim, self.ways[q.idx]
        sim.cancel(q.idx)
        if way.queued_at >= 0:
            engine = sim.replicas[way.queued_at]
            if way.moving:
                engine.remote.remove(q)
                engine.pool.release(q.blocks)
            else:
                engine.waiting.remove(q)
            engine.wake()
        self.give_up_target(q)
        q.blocks = []
        self.ways[q.idx] = Way()
        sim.log(st.EV_RETURN, q.idx, source)
        sim.set_timer(sim.now_s, st.RETURN, q.idx)

    def give_up_target(self, q: Request) -> None:
        """Give back what was set aside for a request that will not be prefilled."""
        way = self.ways[q.idx]
        if way.target >= 0:
            engine = self.sim.replicas[way.target]
            engine.pool.release(way.target_blocks)
            way.target, way.target_blocks = -1, []
            engine.wake()

    def fail(self, engine: Engine) -> None:
        """A replica fails: prefills there are lost, what was to decode there is placed anew."""
        sim, r = self.sim, engine.r
        for q in sim.requests:
            way = self.ways[q.idx]
            if r in (way.source, way.prefill_on):
                way.source, way.source_blocks = -1, []
                self.drop(q, r)
            elif way.target == r:
                way.target, way.target_blocks = -1, []
            elif way.queued_at == r:
                sim.cancel(q.idx)
                if way.moving:
                    engine.remote.remove(q)
                else:
                    engine.waiting.remove(q)
                way.moving, way.queued_at, q.blocks = False, -1, []
                sim.set_timer(sim.now_s, st.PLACING, q.idx)
            elif q in engine.landed:
                engine.landed.remove(q)
                engine.remote.remove(q)
                q.blocks = []
                sim.log(st.EV_RETURN, q.idx, r)
                sim.set_timer(sim.now_s, st.RETURN, q.idx)
            elif q in engine.waiting or q in engine.running:
                self.give_up_target(q)
        self.out_free_s[r] = self.in_free_s[r] = 0.0
