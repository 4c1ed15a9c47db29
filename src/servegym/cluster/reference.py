"""The plain simulator: docs/simulator.md step by step, slow and obvious.

It shares nothing with the compiled core but the random numbers and the cost grids; tests hold
the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from servegym.cluster import state as st
from servegym.cluster.outcome import EVENT_DTYPE
from servegym.cluster.rng import block_identity, private_key, step_noise_z
from servegym.cluster.spec import ClusterSpec, Episode


@dataclass
class Request:
    """One request and how far it is."""

    idx: int
    prompt: int
    output: int
    segments: list[tuple[int, int]]
    generated: int = 0
    computed: int = 0
    target: int = 0
    prefilling: bool = False
    scheduled: int = 0
    admitted_once: bool = False
    first_token: bool = False
    blocks: list[int] = field(default_factory=list)
    named: int = 0

    @property
    def total(self) -> int:
        """Prompt and output tokens so far."""
        return self.prompt + self.generated


class BlockPool:
    """KV blocks of a replica: holders, identities, and a free list by last use."""

    def __init__(self, num_blocks: int, caching: bool) -> None:
        self.caching = caching
        self.free = list(range(num_blocks))
        self.holders = dict.fromkeys(range(num_blocks), 0)
        self.identity: dict[int, int] = {}
        self.where: dict[int, list[int]] = {}

    def take(self) -> int:
        """Take the least recently used free block."""
        block = self.free.pop(0)
        if block in self.identity:
            self.where[self.identity.pop(block)].remove(block)
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Add a holder to a cached block."""
        if self.holders[block] == 0:
            self.free.remove(block)
        self.holders[block] += 1

    def name(self, block: int, identity: int) -> None:
        """Give a filled block its identity; others may have the same."""
        if self.caching:
            self.where.setdefault(identity, []).append(block)
            self.identity[block] = identity

    def release(self, blocks: list[int]) -> None:
        """Take one holder off each block, last block first; those without identity go first."""
        nameless: list[int] = []
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                (self.free if block in self.identity else nameless).append(block)
        self.free[:0] = nameless


class Engine:
    """One replica."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        self.sim, self.r = sim, r
        self.type = sim.spec.types[int(sim.episode.type_idx[r])]
        self.base_speed = self.speed = float(sim.episode.speed[r])
        self.up = True
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.steps = 0
        self.due_s = math.inf
        self.stepping = False
        self.pool = BlockPool(self.type.num_blocks, sim.spec.prefix_caching)

    def identity(self, q: Request, j: int) -> int:
        """Name the content of block `j` of a request."""
        last = (j + 1) * self.sim.spec.block_size - 1
        key = next((k for k, end in q.segments if end > last), None)
        return int(block_identity(private_key(q.idx) if key is None else key, j))

    def hits(self, q: Request, limit: int) -> list[int]:
        """Blocks of the longest cached prefix, at most `limit` of them."""
        found: list[int] = []
        while self.sim.spec.prefix_caching and len(found) < limit:
            same = self.pool.where.get(self.identity(q, len(found)))
            if not same:
                break
            found.append(same[0])
        return found

    def release(self, q: Request) -> None:
        """A request leaves the running list: name what it filled, then let go."""
        for j in range(q.named, q.computed // self.sim.spec.block_size):
            self.pool.name(q.blocks[j], self.identity(q, j))
        self.pool.release(q.blocks)
        q.blocks, q.named = [], 0

    def preempt(self, q: Request) -> None:
        """Preempt by recompute."""
        self.running.remove(q)
        self.release(q)
        q.computed, q.scheduled = 0, 0
        self.waiting.insert(0, q)
        self.sim.log(st.EV_PREEMPT, q.idx, self.r)

    def begin_step(self) -> None:
        """Form a step at the current time and set when it ends."""
        sim, size = self.sim, self.sim.spec.block_size
        while True:
            budget = self.type.max_num_batched_tokens
            preempted = False
            chunks: list[tuple[int, int]] = []
            decodes: list[Request] = []
            for q in list(self.running):
                if q not in self.running:
                    continue
                tokens = min(q.target - q.computed, budget) if q.prefilling else 1
                need = -(-(q.computed + tokens) // size) - len(q.blocks)
                while need > len(self.pool.free) and q in self.running:
                    self.preempt(self.running[-1])
                    preempted = True
                if q not in self.running:
                    break
                self._give(q, tokens, need)
                budget -= tokens
                if q.prefilling:
                    chunks.append((tokens, q.computed))
                else:
                    decodes.append(q)
            while not preempted and self.waiting and budget > 0:
                q = self.waiting[0]
                if len(self.running) >= self.type.max_num_seqs:
                    break
                hit = self.hits(q, (q.total - 1) // size)
                computed = len(hit) * size
                tokens = min(q.total - computed, budget)
                if not sim.spec.chunked_prefill and tokens < q.total - computed:
                    break
                need = -(-(computed + tokens) // size) - len(hit)
                whole = -(-q.total // size) - len(hit)
                if whole + sum(self.pool.holders[b] == 0 for b in hit) > len(self.pool.free):
                    break
                self.waiting.pop(0)
                self.running.append(q)
                for block in hit:
                    self.pool.hold(block)
                q.blocks, q.named, q.computed = list(hit), len(hit), computed
                q.prefilling, q.target = True, q.total
                if not q.admitted_once:
                    q.admitted_once = True
                    sim.log(st.EV_ADMIT, q.idx, self.r, computed)
                self._give(q, tokens, need)
                budget -= tokens
                chunks.append((tokens, computed))
            if chunks or decodes:
                break
            if not (preempted and self.waiting):
                self.due_s, self.stepping = math.inf, False
                return
        kv = sum(q.computed + 1 for q in decodes)
        factor = 1.0 / self.speed
        sigma = sim.spec.noise_sigma
        if sigma > 0:
            window = self.steps // sim.spec.noise_period_steps
            z = step_noise_z(np.uint64(sim.episode.noise_seed), self.r, window)
            factor *= math.exp(sigma * z - 0.5 * sigma * sigma)
        self.stepping = True
        self.due_s = sim.now_s + self.type.grid.step_s(chunks, len(decodes), kv) * factor

    def _give(self, q: Request, tokens: int, need: int) -> None:
        q.blocks += [self.pool.take() for _ in range(need)]
        q.scheduled = tokens
        if q.prefilling:
            filled = (q.computed + tokens) // self.sim.spec.block_size
            for j in range(q.named, filled):
                self.pool.name(q.blocks[j], self.identity(q, j))
            q.named = max(q.named, filled)

    def end_step(self) -> None:
        """Tokens come out; requests end."""
        self.steps += 1
        self.sim.engine_steps += 1
        decoding = [q for q in self.running if not q.prefilling]
        for q in decoding + [q for q in self.running if q.prefilling]:
            q.computed += q.scheduled
            q.scheduled = 0
            if q.prefilling and q.computed < q.target:
                continue
            q.prefilling = False
            q.generated += 1
            if not q.first_token:
                q.first_token = True
                self.sim.log(st.EV_FIRST_TOKEN, q.idx, self.r)
            if q.generated == q.output:
                self.running.remove(q)
                self.release(q)
                self.sim.end(q, st.EV_FINISH, self.r)

    def stop(self) -> list[Request]:
        """Fail: hand all requests back and forget everything."""
        if self.stepping:
            self.steps += 1
        returned = self.running + self.waiting
        for q in returned:
            q.computed, q.scheduled, q.blocks, q.named = 0, 0, [], 0
            self.sim.log(st.EV_RETURN, q.idx, self.r)
        self.running, self.waiting = [], []
        self.pool = BlockPool(self.type.num_blocks, self.sim.spec.prefix_caching)
        self.up, self.due_s, self.stepping = False, math.inf, False
        return returned

    def metrics(self) -> tuple[int, int, float, int]:
        """Running, waiting, share of blocks held, tokens emitted by its requests."""
        if not self.up:
            return 0, 0, 0.0, 0
        mine = self.running + self.waiting
        held = 1.0 - len(self.pool.free) / self.type.num_blocks
        return len(self.running), len(self.waiting), held, sum(q.generated for q in mine)


class ReferenceSimulator:
    """One episode, played event by event."""

    def __init__(self, spec: ClusterSpec, episode: Episode) -> None:
        episode.validate(spec)
        self.spec, self.episode, table = spec, episode, episode.table
        self.requests = [
            Request(
                i,
                int(table.prompt_tokens[i]),
                int(table.output_tokens[i]),
                [
                    (int(table.prefix_keys[k]), int(table.prefix_ends[k]))
                    for k in range(table.prefix_offsets[i], table.prefix_offsets[i + 1])
                ],
            )
            for i in range(len(table))
        ]
        self.replicas = [Engine(self, r) for r in range(episode.num_replicas)]
        self.now_s = 0.0
        self.in_system = 0
        self.ended = 0
        self.area = 0.0
        self.engine_steps = 0
        self.scraped = [(0, 0, 0.0, 0)] * episode.num_replicas
        self._events: list[tuple[float, float, int, int, int]] = []

    def log(self, kind: int, request: int, replica: int, value: float = 0.0) -> None:
        """Append an event at the current time."""
        self._events.append((self.now_s, value, request, replica, kind))

    def events(self) -> NDArray[np.void]:
        """Return the event log, `EVENT_DTYPE[m]`."""
        return np.array(self._events, EVENT_DTYPE)

    def end(self, q: Request, kind: int, replica: int) -> None:
        """A request leaves the system."""
        self.log(kind, q.idx, replica)
        self.in_system -= 1
        self.ended += 1

    def allowed(self, request: int) -> list[bool]:
        """Which actions may be taken: replicas, hold, reject."""
        q = self.requests[request]
        need = q.prompt + q.output - 1
        size = self.spec.block_size
        fits = [e.up and need <= e.type.num_blocks * size for e in self.replicas]
        return [*fits, self.spec.allow_hold, self.spec.allow_reject]

    def prefix_hit_tokens(self, request: int, replica: int) -> int:
        """Leading prompt tokens of a request in a replica's cache."""
        q, size = self.requests[request], self.spec.block_size
        return len(self.replicas[replica].hits(q, (q.prompt - 1) // size)) * size

    def run(self, dispatch: Callable[[ReferenceSimulator, int], int]) -> None:
        """Play to the end; `dispatch` answers with a replica, `HOLD` or `REJECT`."""
        faults, table = self.episode.faults, self.episode.table
        interval = self.spec.metrics_interval_s
        next_arrival = next_fault = 0
        scrape_s = 0.0 if interval > 0 else math.inf
        held: list[tuple[float, Request]] = []
        returned: list[Request] = []
        while self.ended < len(self.requests):
            fault_s = faults.time_s[next_fault] if next_fault < len(faults) else math.inf
            engine = min(self.replicas, key=lambda e: e.due_s)
            arrival_s = table.arrival_s[next_arrival] if next_arrival < len(table) else math.inf
            hold_s = held[0][0] if held else math.inf
            decision_s = self.now_s if returned else min(hold_s, arrival_s)
            now_s = float(min(fault_s, engine.due_s, scrape_s, decision_s))
            self.area += self.in_system * (now_s - self.now_s)
            self.now_s = now_s
            if fault_s == now_s:
                self._fault(next_fault, returned)
                next_fault += 1
            elif engine.due_s == now_s:
                if engine.stepping:
                    engine.end_step()
                engine.begin_step()
            elif scrape_s == now_s:
                self.scraped = [e.metrics() for e in self.replicas]
                scrape_s += interval
            else:
                if returned:
                    q = returned.pop(0)
                elif hold_s <= arrival_s:
                    q = held.pop(0)[1]
                else:
                    q = self.requests[next_arrival]
                    next_arrival += 1
                    self.in_system += 1
                    self.log(st.EV_ARRIVE, q.idx, -1)
                action = st.HOLD
                if any(self.allowed(q.idx)[:-2]):
                    action = dispatch(self, q.idx)
                if action == st.HOLD:
                    held.append((now_s + self.spec.hold_s, q))
                    self.log(st.EV_HOLD, q.idx, -1)
                elif action == st.REJECT:
                    self.end(q, st.EV_REJECT, -1)
                else:
                    self.log(st.EV_DISPATCH, q.idx, action)
                    chosen = self.replicas[action]
                    chosen.waiting.append(q)
                    if math.isinf(chosen.due_s):
                        chosen.due_s = math.nextafter(now_s, math.inf)

    def _fault(self, i: int, returned: list[Request]) -> None:
        engine = self.replicas[int(self.episode.faults.replica[i])]
        kind = int(self.episode.faults.kind[i])
        if kind == st.FAULT_SLOW:
            engine.speed = engine.base_speed * float(self.episode.faults.value[i])
        elif kind == st.FAULT_DOWN:
            if engine.stepping and engine.due_s == self.now_s:
                engine.end_step()
                engine.stepping = False
            returned += engine.stop()
        else:
            engine.up = True
