"""The plain tiers behind KV blocks: what is in them, and loads from them."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from servegym.cluster import state as st
from servegym.cluster.reference_blocks import Identity
from servegym.cluster.reference_engine import Engine, Request
from servegym.cluster.tier_rules import KvTier

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator


class Copies:
    """What a tier holds: when each block can be used, by identity, the one used last behind."""

    def __init__(self, tier: KvTier | None) -> None:
        self.capacity = tier.num_blocks if tier else 0
        self.ready_s: OrderedDict[Identity, float] = OrderedDict()

    def put(self, identity: Identity, ready_s: float) -> None:
        """Take a block in."""
        if len(self.ready_s) == self.capacity:
            self.ready_s.popitem(last=False)
        self.ready_s[identity] = ready_s


class Way:
    """A link to a tier, or that of the store itself: when it will have sent and received all."""

    def __init__(self) -> None:
        self.read_free_s = self.write_free_s = 0.0


class Tiers:
    """All tiers of a cluster."""

    def __init__(self, sim: ReferenceSimulator) -> None:
        self.sim, self.rules = sim, sim.spec.tiers
        self.threshold = self.rules.balancing_threshold or 0.0
        self.block_bytes = float(sim.spec.transfers.kv_token_bytes * sim.spec.block_size)
        store = Copies(self.rules.store)
        self.kinds = [(e.type.host_kv, e.type.disk_kv, self.rules.store) for e in sim.replicas]
        self.copies = [[Copies(host), Copies(disk), store] for host, disk, _ in self.kinds]
        self.ways = [[Way() for _ in range(st.NUM_TIERS)] for _ in sim.replicas]
        self.store = Way()
        self.loads: dict[int, list[int]] = {}  # from where each block comes, by request
        self.hits: dict[int, int] = {}
        self.slowed_until_s = [0.0] * len(sim.replicas)

    def of(self, engine: Engine) -> list[tuple[int, KvTier, Copies, Way]]:
        """The tiers of a replica."""
        rows = zip(self.kinds[engine.r], self.copies[engine.r], self.ways[engine.r], strict=True)
        return [(i, tier, copies, way) for i, (tier, copies, way) in enumerate(rows) if tier]

    def are_enough(self, engine: Engine) -> bool:
        """Whether the KV of as many requests comes to a replica, or waits there, as may."""
        if not self.sim.spec.tiered or self.sim.spec.moves_kv:  # then it is one of the holders
            return False
        return len(engine.remote) >= engine.type.max_num_seqs

    def factor(self, engine: Engine) -> float:
        """How much longer a step lasts that begins now."""
        return self.rules.interference if self.sim.now_s < self.slowed_until_s[engine.r] else 1.0

    def keep(self, engine: Engine, q: Request) -> None:
        """Write what a request has computed to all tiers, its last block first."""
        now_s, stored, tiers = self.sim.now_s, 0.0, self.of(engine)
        if not tiers:
            return
        for j in reversed(range(q.computed // self.sim.spec.block_size)):
            identity = engine.identity(q, j)
            for i, tier, copies, way in tiers:
                if identity in copies.ready_s:
                    copies.ready_s.move_to_end(identity)
                    continue
                done_s = max(now_s, way.write_free_s) + self.block_bytes / tier.write_bytes_per_s
                way.write_free_s = done_s
                if i == st.STORE:
                    own_s = max(now_s, self.store.write_free_s)
                    self.store.write_free_s = (
                        own_s + self.block_bytes / self.rules.store_bytes_per_s
                    )
                    done_s = max(done_s, self.store.write_free_s)
                copies.put(identity, done_s + tier.latency_s)
                stored += self.block_bytes
        if stored:
            self.slow(engine, tiers[0][3].write_free_s)
            self.sim.log(st.EV_STORED, q.idx, engine.r, stored)

    def slow(self, engine: Engine, until_s: float) -> None:
        """Steps that begin before that are slowed."""
        self.slowed_until_s[engine.r] = max(self.slowed_until_s[engine.r], until_s)

    def where(self, engine: Engine, q: Request, hits: int) -> list[int]:
        """Tiers that have the blocks behind the first `hits` of a request, in their order."""
        found: list[int] = []
        while hits + len(found) < (q.total - 1) // self.sim.spec.block_size:
            identity = engine.identity(q, hits + len(found))
            have = [
                i
                for i, _, copies, _ in self.of(engine)
                if copies.ready_s.get(identity, math.inf) <= self.sim.now_s
            ]
            if not have:
                break
            found.append(have[0])
        return found

    def peer(self, engine: Engine, q: Request, here: int) -> tuple[Engine | None, int]:
        """The replica that has most of what is behind the first blocks, if it is enough more."""
        best, most, limit = None, 0, (q.total - 1) // self.sim.spec.block_size
        for other in self.sim.replicas:
            if other is engine or not other.up or self.sim.transfers.are_enough(other):
                continue
            count = 0
            while here + count < limit and self.has(other, other.identity(q, here + count)):
                count += 1
            if count > most:
                best, most = other, count
        if here + most <= self.threshold * here:
            return None, 0
        return best, most

    def has(self, engine: Engine, identity: Identity) -> bool:
        """Whether a block can be fetched from a replica: from its GPU, or its host."""
        ready_s = self.copies[engine.r][st.HOST].ready_s.get(identity, math.inf)
        return self.on_gpu(engine, identity) is not None or ready_s <= self.sim.now_s

    def on_gpu(self, engine: Engine, identity: Identity) -> int | None:
        """The block of a GPU with some content, if it is computed."""
        same, size = engine.pool.where.get(identity), self.sim.spec.block_size
        begun = [q for q in engine.running if q.prefilling and q.scheduled]
        for q in begun if engine.stepping else []:
            if (
                same
                and same[0] in q.blocks[q.computed // size : (q.computed + q.scheduled) // size]
            ):
                return None
        return same[0] if same else None

    def fetch(self, engine: Engine, q: Request, peer: Engine, first: int, count: int) -> None:
        """Begin to fetch blocks; the peer holds those of its GPU meanwhile."""
        transfers, way = self.sim.transfers, self.sim.transfers.ways[q.idx]
        free_s = transfers.sent_s(peer, engine, engine, count)
        transfers.out_free_s[peer.r] = transfers.in_free_s[engine.r] = free_s
        identities = [peer.identity(q, j) for j in range(first, first + count)]
        same = [self.on_gpu(peer, identity) for identity in identities]
        way.source, way.source_blocks = peer.r, [block for block in same if block is not None]
        for identity, block in reversed(list(zip(identities, same, strict=True))):
            if block is None:
                self.copies[peer.r][st.HOST].ready_s.move_to_end(identity)
        for block in way.source_blocks:
            peer.pool.hold(block)

    def read(
        self, engine: Engine, found: list[int], peer: Engine | None
    ) -> tuple[list[tuple[Way, float]], float]:
        """When links will be free again if blocks are loaded now, and when these land."""
        now_s, ends, landing_s = self.sim.now_s, [], self.sim.now_s
        for i, tier, _, way in self.of(engine):
            num_bytes = found.count(i) * self.block_bytes
            if not num_bytes:
                continue
            done_s = max(now_s, way.read_free_s) + num_bytes / tier.read_bytes_per_s
            ends.append((way, done_s))
            if i == st.STORE:
                own_s = max(now_s, self.store.read_free_s)
                ends.append((self.store, own_s + num_bytes / self.rules.store_bytes_per_s))
                done_s = max(done_s, ends[-1][1])
            landing_s = max(landing_s, done_s + tier.latency_s)
        if peer is not None:
            free_s = self.sim.transfers.sent_s(peer, engine, engine, found.count(st.PEER))
            landing_s = max(landing_s, free_s + engine.type.link.latency_s)
        return ends, landing_s

    def is_worth_it(
        self, engine: Engine, computed: int, found: list[int], peer: Engine | None
    ) -> bool:
        """Whether there is something to load, and that is to be done."""
        if not found or self.rules.load == "always":
            return bool(found)
        loading_s = self.read(engine, found, peer)[1] - self.sim.now_s
        again_s = self.recompute_s(engine, computed, len(found) * self.sim.spec.block_size)
        return loading_s < again_s

    def recompute_s(self, engine: Engine, computed: int, tokens: int) -> float:
        """How long computing so many tokens alone takes."""
        total_s, grid = 0.0, engine.type.grid
        while tokens > 0:
            chunk = min(tokens, engine.type.max_num_batched_tokens)
            total_s += grid.step_s([(chunk, computed)])
            computed += chunk
            tokens -= chunk
        return total_s / engine.speed

    def load(self, engine: Engine, q: Request) -> bool:
        """Begin to load KV of a waiting request that has room, if there is any worth it."""
        hit, _ = engine.cached(q)
        own, size = self.where(engine, q, len(hit)), self.sim.spec.block_size
        found, peer, fetched = own, None, 0
        if self.sim.spec.fetches:
            peer, fetched = self.peer(engine, q, len(hit) + len(own))
            found = own + [st.PEER] * fetched
            if peer is not None and not self.is_worth_it(engine, len(hit) * size, found, peer):
                found, peer = own, None
        if not self.is_worth_it(engine, len(hit) * size, found, peer):
            return False
        ends, landing_s = self.read(engine, found, peer)
        for way, free_s in ends:
            way.read_free_s = free_s
            self.slow(engine, free_s)
        for j in reversed(range(len(own))):
            copies = self.copies[engine.r][own[j]]
            copies.ready_s.move_to_end(engine.identity(q, len(hit) + j))
        engine.waiting.remove(q)
        for block in hit:
            engine.pool.hold(block)
        engine.pool.let_go_of(q.after)
        q.blocks = hit + [engine.pool.take() for _ in range(engine.blocks(q.total) - len(hit))]
        if peer is not None:
            self.fetch(engine, q, peer, len(hit) + len(own), fetched)
        self.loads[q.idx], self.hits[q.idx] = found, len(hit)
        engine.remote.append(q)
        self.sim.set_timer(landing_s, st.LANDING, q.idx)
        self.sim.log(st.EV_TRANSFER, q.idx, engine.r, len(found) * self.block_bytes)
        return True

    def land(self, q: Request) -> None:
        """KV has come; what came from further away goes to the host's memory, too."""
        engine = next(e for e in self.sim.replicas if q in e.remote)
        found, hits = self.loads[q.idx], self.hits[q.idx]
        host = self.copies[engine.r][st.HOST]
        if st.PEER in found:
            num_bytes = found.count(st.PEER) * self.block_bytes
            transfers = self.sim.transfers
            transfers.out_bytes[transfers.ways[q.idx].source] += num_bytes
            transfers.in_bytes[engine.r] += num_bytes
            transfers.release_source(q)
        for j in reversed(range(len(found))):
            identity = engine.identity(q, hits + j)
            if host.capacity and identity not in host.ready_s and max(found) > st.HOST:
                host.put(identity, self.sim.now_s)
        engine.landed.append(q)
        self.sim.log(st.EV_LAND, q.idx, engine.r, len(found) * self.block_bytes)
        for source in sorted(set(found)):
            tokens = found.count(source) * self.sim.spec.block_size
            kind = st.EV_PEER if source == st.PEER else st.EV_HOST + source
            self.sim.log(kind, q.idx, engine.r, tokens)
        engine.wake()

    def there(self, q: Request) -> tuple[int, int]:
        """Blocks that a landed request found on the GPU, and those it has now."""
        return self.hits[q.idx], self.hits[q.idx] + len(self.loads[q.idx])

    def fail(self, engine: Engine) -> None:
        """A replica fails: what was in its process is lost, what lies elsewhere is not."""
        for q in [q for q in engine.remote if q.idx in self.loads]:
            self.sim.cancel(q.idx)
            if self.sim.transfers.ways[q.idx].source >= 0:
                self.sim.transfers.release_source(q)
            del self.loads[q.idx]
            engine.remote.remove(q)
            if q in engine.landed:
                engine.landed.remove(q)
            self.sim.transfers.give_up_target(q)
            q.blocks = []
            self.sim.log(st.EV_RETURN, q.idx, engine.r)
            self.sim.set_timer(self.sim.now_s, st.RETURN, q.idx)
        for idx, found in self.loads.items():
            way = self.sim.transfers.ways[idx]
            if way.source == engine.r:
                way.source, way.source_blocks = -1, []
                self.loads[idx] = [source for source in found if source != st.PEER]
        self.copies[engine.r][st.HOST].ready_s.clear()
        self.ways[engine.r] = [Way() for _ in range(st.NUM_TIERS)]
        self.slowed_until_s[engine.r] = 0.0
