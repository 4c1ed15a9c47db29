"""vLLM's priority scheduling with aborts, written as plainly as it can be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from servegym.cluster.reference_blocks import BlockPool


@dataclass(eq=False)
class NaiveRequest:
    idx: int
    prompt: int
    output: int
    priority: int
    arrival_s: float
    identities: list[int]
    generated: int = 0
    computed: int = 0
    target: int = 0
    prefilling: bool = False
    blocks: list[int] = field(default_factory=list)
    named: int = 0

    @property
    def rank(self):
        return self.priority, self.arrival_s, self.idx


class NaiveReplica:
    def __init__(self, kind, size: int, caching: bool) -> None:
        self.kind, self.size = kind, size
        self.pool = BlockPool(kind.num_blocks, caching)
        self.waiting: list[NaiveRequest] = []
        self.running: list[NaiveRequest] = []
        self.scheduled: dict[NaiveRequest, int] = {}
        self.due_s = math.inf
        self.stepping = False
        self.events: list[tuple[float, str, int]] = []

    def submit(self, q: NaiveRequest) -> None:
        self.waiting.append(q)
        if math.isinf(self.due_s):
            self.due_s = math.nextafter(q.arrival_s, math.inf)

    def abort(self, q: NaiveRequest) -> None:
        if q in self.waiting:
            self.waiting.remove(q)
        elif q in self.running:
            self._leave(q)
            self.scheduled.pop(q, None)

    def _leave(self, q: NaiveRequest) -> None:
        self.running.remove(q)
        for j in range(q.named, q.computed // self.size):
            self.pool.name(q.blocks[j], q.identities[j])
        self.pool.release(q.blocks)
        q.blocks, q.named = [], 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def step(self) -> None:
        if self.stepping:
            self._end()
        self._begin()

    def _begin(self) -> None:
        while True:
            self.scheduled, budget, preempted, i = {}, self.kind.max_num_batched_tokens, False, 0
            costs: dict[NaiveRequest, tuple[int, int]] = {}
            while i < len(self.running) and budget > 0:
                q = self.running[i]
                tokens = min(q.target - q.computed, budget) if q.prefilling else 1
                need = self._blocks(q.computed + tokens) - len(q.blocks)
                alive = True
                while need > len(self.pool.free) and alive:
                    victim = max(self.running, key=lambda x: x.rank)
                    if victim in self.scheduled:
                        budget += self.scheduled.pop(victim)
                        costs.pop(victim, None)
                        i -= 1
                    self._leave(victim)
                    victim.computed = 0
                    self.waiting.append(victim)
                    self.events.append((self.due_s, "preempt", victim.idx))
                    preempted, alive = True, victim is not q
                if not alive:
                    break
                self._give(q, tokens, need, costs)
                budget -= tokens
                i += 1
            while not preempted and self.waiting and budget > 0:
                q = min(self.waiting, key=lambda x: x.rank)
                if len(self.running) >= self.kind.max_num_seqs:
                    break
                total, hit = q.prompt + q.generated, []
                while self.pool.caching and len(hit) < (total - 1) // self.size:
                    same = self.pool.where.get(q.identities[len(hit)])
                    if not same:
                        break
                    hit.append(same[0])
                unheld = sum(self.pool.holders[b] == 0 for b in hit)
                if self._blocks(total) - len(hit) + unheld > len(self.pool.free):
                    break
                self.waiting.remove(q)
                self.running.append(q)
                for block in hit:
                    self.pool.hold(block)
                q.blocks, q.named, q.computed = hit, len(hit), len(hit) * self.size
                q.prefilling, q.target = True, total
                tokens = min(total - q.computed, budget)
                self.events.append((self.due_s, "admit", q.idx))
                self._give(q, tokens, self._blocks(q.computed + tokens) - len(hit), costs)
                budget -= tokens
            if self.scheduled:
                break
            if not (preempted and self.waiting):
                self.due_s, self.stepping = math.inf, False
                return
        decodes = [q for q in self.scheduled if not q.prefilling]
        kv = sum(q.computed + 1 for q in decodes)
        self.due_s += self.kind.grid.step_s(list(costs.values()), len(decodes), kv) * 1.0
        self.stepping = True

    def _give(self, q, tokens, need, costs) -> None:
        q.blocks += [self.pool.take() for _ in range(need)]
        self.scheduled[q] = tokens
        if q.prefilling:
            costs[q] = (tokens, q.computed)
            for j in range(q.named, (q.computed + tokens) // self.size):
                self.pool.name(q.blocks[j], q.identities[j])
                q.named = j + 1

    def _end(self) -> None:
        for q in sorted(self.scheduled, key=lambda x: x.prefilling):
            q.computed += self.scheduled[q]
            if q.prefilling and q.computed < q.target:
                continue
            q.prefilling = False
            q.generated += 1
            self.events.append((self.due_s, "token", q.idx))
            if q.generated == q.output:
                self._leave(q)
                self.events.append((self.due_s, "finish", q.idx))
