"""The plain way of requests that move to another replica while they wait or decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servegym.cluster import state as st
from servegym.cluster.reference_engine import Engine, Request

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator

#: Names a request and the replica it goes to, or nobody: no more at this tick.
Choose = Callable[["ReferenceSimulator"], tuple[int, int] | None]


@dataclass
class Move:
    """A decoding request that is on its way from one replica to another."""

    q: Request
    target: int
    alive: bool = True
    leaving: bool = False  # when the step in progress ends
    paused_s: float = math.nan
    stage: int = 0
    moved: int = 0  # blocks there: found or copied
    copying: int = -1  # blocks on their way, -1: nothing is


class Migrations:
    """All migrations of a cluster."""

    def __init__(self, sim: ReferenceSimulator) -> None:
        self.sim, self.rules = sim, sim.spec.migration
        self.moves: list[Move | None] = [None] * len(sim.replicas)  # by where they go from
        self.preempted = [False] * len(sim.replicas)  # since the last tick
        self.lately = [False] * len(sim.replicas)  # between the two last ticks
        self.paired = [False] * len(sim.replicas)  # at this tick

    def begin(self) -> None:
        """Set the first tick."""
        if self.sim.spec.migrates:
            self.sim.set_timer(self.rules.interval_s, st.TICK, 0)

    def tick(self, choose: Choose | None) -> None:
        """Let requests move, one pair of replicas after the other."""
        sim = self.sim
        sim.set_timer(sim.now_s + self.rules.interval_s, st.TICK, 0)
        self.lately, self.preempted = self.preempted, [False] * len(sim.replicas)
        self.paired = [False] * len(sim.replicas)
        while True:
            if choose is not None:
                if not self.is_due():
                    return
                chosen = choose(sim)
            else:
                chosen = self.choose()
            if chosen is None:
                return
            self.move(sim.requests[chosen[0]], sim.replicas[chosen[1]])

    # who moves

    def here(self, q: Request) -> Engine | None:
        """Where a request waits or decodes, from where it could move."""
        for engine in self.sim.replicas:
            if q in engine.waiting:
                return engine
            if q in engine.running and not q.prefilling:
                return engine
        return None

    def may_leave(self, engine: Engine, q: Request) -> bool:
        """Whether a request may move away from a replica."""
        if self.moves[engine.r] is not None or self.paired[engine.r]:
            return False
        return q in engine.waiting or (q in engine.running and not q.prefilling)

    def may_come(self, engine: Engine, q: Request) -> bool:
        """Whether a request may come to a replica."""
        size = self.sim.spec.block_size
        return engine.up and q.prompt + q.output - 1 <= engine.type.capacity_tokens(size)

    def allowed(self) -> list[tuple[int, int]]:
        """All pairs of a request and a replica that may be answered."""
        return list(self._pairs())

    def is_due(self) -> bool:
        """Whether anybody may move."""
        return next(self._pairs(), None) is not None

    def _pairs(self) -> Iterator[tuple[int, int]]:
        here = {
            q.idx: a
            for a in self.sim.replicas
            for q in (*a.waiting, *a.running)
            if self.may_leave(a, q)
        }
        for idx in sorted(here):
            for b in self.sim.replicas:
                if b is not here[idx] and self.may_come(b, self.sim.requests[idx]):
                    yield idx, b.r

    def freeness(self, engine: Engine) -> float:
        """Blocks that are free, less those that the head of the queue needs, per request."""
        free = engine.pool.num_free
        count = len(engine.running) + len(engine.remote)
        if engine.waiting:
            free -= engine.blocks(engine.waiting[0].total)
            count += 1
        return free / count if count else math.inf

    def choose(self) -> tuple[int, int] | None:
        """Say who moves next, by the rule of the cluster."""
        if self.rules.rule == "freeness":
            return self.by_freeness()
        return self.by_queues() if self.rules.rule == "queues" else None

    def by_freeness(self) -> tuple[int, int] | None:
        """Llumnix: the least free replica with the freest, then the second ones, and so on."""
        while True:
            up = [e for e in self.sim.replicas if e.up and not self.paired[e.r]]
            value = {e.r: self.freeness(e) for e in up}
            sources = [
                e
                for e in up
                if self.moves[e.r] is None
                and (value[e.r] < self.rules.source_below or self.lately[e.r])
            ]
            if not sources:
                return None
            source = min(sources, key=lambda e: value[e.r])
            targets = [
                e
                for e in up
                if e is not source and value[e.r] > self.rules.target_above and not self.lately[e.r]
            ]
            if not targets:
                return None
            target = max(targets, key=lambda e: value[e.r])
            self.paired[source.r] = True
            victim = self.victim(source, target)
            if victim is not None:
                self.paired[target.r] = True
                return victim.idx, target.r

    def victim(self, source: Engine, target: Engine) -> Request | None:
        """Who moves from one replica to another."""
        name = self.rules.victim
        if name.startswith("first-waiting"):
            if source.waiting and self.may_come(target, source.waiting[0]):
                return source.waiting[0]
            if name == "first-waiting":
                return None
        decoding = [q for q in source.running if not q.prefilling and self.may_come(target, q)]
        if not decoding:
            return None
        if name == "last":
            return decoding[-1]
        if name == "longest":
            return max(decoding, key=lambda q: q.total)
        return min(decoding, key=lambda q: q.total)

    def by_queues(self) -> tuple[int, int] | None:
        """The longest queue gives its last request to the shortest, if that is shorter by so many.

        Of equally long ones the first.
        """
        up = [e for e in self.sim.replicas if e.up and not self.paired[e.r]]
        sources = [e for e in up if self.moves[e.r] is None]
        while sources:
            source = max(sources, key=lambda e: len(e.waiting))
            target = min((e for e in up if e is not source), key=Engine.busy, default=None)
            if target is None:
                return None
            if len(source.waiting) - len(target.waiting) < self.rules.queue_gap:
                return None
            self.paired[source.r] = True
            up.remove(source)
            sources.remove(source)
            if self.may_come(target, source.waiting[-1]):
                self.paired[target.r] = True
                return source.waiting[-1].idx, target.r
        return None

    # how they move

    def move(self, q: Request, target: Engine) -> None:
        """Let a request go to another replica."""
        source = self.here(q)
        assert source is not None
        self.paired[source.r] = True
        if q in source.waiting:
            source.waiting.remove(q)
            source.pool.let_go_of(q.after)
            self.sim.log(st.EV_MIGRATE, q.idx, target.r)
            source.wake()
            target.enqueue(q)
            return
        self.moves[source.r] = Move(q, target.r)
        self.next_stage(source)

    def next_stage(self, source: Engine) -> None:
        """Set memory aside for what there is now, and copy it; of the last stage, see `leave`."""
        sim = self.sim
        move = self.moves[source.r]
        assert move is not None
        q, target, way = move.q, sim.replicas[move.target], sim.transfers.ways[move.q.idx]
        last = source.blocks(q.computed) - move.moved <= self.rules.last_stage_blocks
        if not last and move.stage == self.rules.max_stages:
            self.give_up(source)
            return
        full = q.computed // sim.spec.block_size
        upto = source.blocks(q.computed + 2) if last else full
        first = move.stage == 0
        if first:
            if sim.transfers.are_enough(target):
                self.give_up(source)
                return
            hit = target.hits(q, (q.computed + 1) // sim.spec.block_size if last else full)
            unheld = sum(target.pool.holders[b] == 0 for b in hit)
            if upto - len(hit) + unheld > target.pool.num_free:
                self.give_up(source)
                return
            for block in hit:
                target.pool.hold(block)
            target.pool.let_go_of(q.after)
            way.target, way.target_blocks, way.hits = target.r, list(hit), len(hit)
            move.moved = len(hit)
        new = upto - len(way.target_blocks)
        if new > target.pool.num_free:
            self.give_up(source)
            return
        way.target_blocks += [target.pool.take() for _ in range(new)]
        move.stage += 1
        if last:
            move.leaving = True
            return
        self.copy(source, full - move.moved)

    def copy(self, source: Engine, blocks: int) -> None:
        """Copy some blocks."""
        move = self.moves[source.r]
        assert move is not None
        move.copying = blocks
        landing_s, num_bytes = self.sim.transfers.book(
            source, self.sim.replicas[move.target], blocks
        )
        self.sim.log(st.EV_TRANSFER, move.q.idx, move.target, num_bytes)
        self.sim.set_timer(landing_s, st.COPIED, source.r)

    def leave(self, engine: Engine) -> None:
        """Before an engine forms a step: whoever is to leave it leaves."""
        move = self.moves[engine.r]
        if move is None or not move.leaving:
            return
        move.leaving = False
        q, way = move.q, self.sim.transfers.ways[move.q.idx]
        if q not in engine.running:
            self.sim.set_timer(self.sim.now_s, st.COPIED, engine.r)
            return
        engine.running.remove(q)
        for j in range(q.named, q.computed // self.sim.spec.block_size):
            engine.pool.name(q.blocks[j], engine.identity(q, j))
        way.source, way.source_blocks = engine.r, q.blocks
        q.blocks, way.target_blocks, way.target = way.target_blocks, [], -1
        self.sim.replicas[move.target].remote.append(q)
        move.paused_s = self.sim.now_s
        self.sim.log(st.EV_PAUSE, q.idx, engine.r)
        self.copy(engine, engine.blocks(q.computed) - move.moved)

    def copied(self, source: Engine) -> None:
        """What was on its way has come."""
        sim = self.sim
        move = self.moves[source.r]
        assert move is not None
        q, target = move.q, sim.replicas[move.target]
        if move.copying >= 0:
            num_bytes = sim.transfers.block_bytes * move.copying
            sim.transfers.out_bytes[source.r] += num_bytes
            sim.transfers.in_bytes[target.r] += num_bytes
            sim.log(st.EV_LAND, q.idx, target.r, num_bytes)
            move.moved += move.copying
            move.copying = -1
        if not math.isnan(move.paused_s):
            self.moves[source.r] = None
            sim.log(st.EV_MIGRATE, q.idx, target.r, sim.now_s - move.paused_s)
            need = target.blocks(q.total)
            target.pool.release(q.blocks[need:])
            q.blocks = q.blocks[:need]
            sim.transfers.release_source(q)
            target.landed.append(q)
            target.wake()
        elif not move.alive or q not in source.running:
            self.give_up(source)
        else:
            self.next_stage(source)

    def give_up(self, source: Engine) -> None:
        """A request stays where it is; what was set aside for it elsewhere is free."""
        move = self.moves[source.r]
        assert move is not None
        self.moves[source.r] = None
        way = self.sim.transfers.ways[move.q.idx]
        self.sim.log(st.EV_STAY, move.q.idx, move.target)
        if way.target >= 0:
            target = self.sim.replicas[way.target]
            target.pool.release(way.target_blocks)
            way.target, way.target_blocks = -1, []
            target.wake()

    def note_preempted(self, engine: Engine, q: Request) -> None:
        """A replica has preempted a request."""
        self.preempted[engine.r] = True
        move = self.moves[engine.r]
        if move is not None and move.q is q:
            move.alive = False

    def fail(self, engine: Engine) -> None:
        """A replica fails: what moves from it or to it does so no more."""
        sim, r = self.sim, engine.r
        for source in sim.replicas:
            move = self.moves[source.r]
            if move is None or r not in (source.r, move.target):
                continue
            sim.timers = [x for x in sim.timers if (x[1], x[3]) != (st.COPIED, source.r)]
            sim.timers.sort()
            if math.isnan(move.paused_s):
                if move.target == r:
                    way = sim.transfers.ways[move.q.idx]
                    way.target, way.target_blocks = -1, []
                self.give_up(source)
                continue
            self.moves[source.r] = None
            q, target, way = move.q, sim.replicas[move.target], sim.transfers.ways[move.q.idx]
            sim.log(st.EV_STAY, q.idx, move.target, sim.now_s - move.paused_s)
            target.remote.remove(q)
            if source.r == r:
                target.pool.release(q.blocks)
                target.wake()
                way.source, way.source_blocks = -1, []
            elif self.stays(source, q):
                continue
            q.blocks, q.named, q.computed = [], 0, 0
            sim.log(st.EV_RETURN, q.idx, r)
            sim.set_timer(sim.now_s, st.RETURN, q.idx)
        for q in list(engine.remote):
            assert q in engine.landed
            sim.log(st.EV_RETURN, q.idx, r)
            sim.set_timer(sim.now_s, st.RETURN, q.idx)
            q.blocks, q.named, q.computed = [], 0, 0
        engine.remote, engine.landed = [], []
        sim.transfers.out_free_s[r] = sim.transfers.in_free_s[r] = 0.0

    def stays(self, source: Engine, q: Request) -> bool:
        """Let a paused request go on where its KV still is, if its next token has a block there."""
        way = self.sim.transfers.ways[q.idx]
        new = source.blocks(q.total) - len(way.source_blocks)
        if new > source.pool.num_free:
            self.sim.transfers.release_source(q)
            return False
        q.blocks = way.source_blocks + [source.pool.take() for _ in range(new)]
        way.source, way.source_blocks = -1, []
        way.hits = q.computed // self.sim.spec.block_size
        source.remote.append(q)
        source.landed.append(q)
        source.wake()
        return True
