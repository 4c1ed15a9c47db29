"""One plain replica: what engines of every kind do alike, and one of their requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from servegym.cluster import state as st
from servegym.cluster.reference_blocks import BlockPool, Identity
from servegym.cluster.rng import step_noise_z
from servegym.workloads.table import BY_ITSELF

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator


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
    arrival_s: float = 0.0
    after: int = BY_ITSELF
    delay_s: float = 0.0
    key: float = 0.0
    idle_since_s: float = 0.0

    @property
    def total(self) -> int:
        """Prompt and output tokens so far."""
        return self.prompt + self.generated


class Engine:
    """One replica."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        self.sim, self.r = sim, r
        self.type = sim.spec.types[int(sim.episode.type_idx[r])]
        self.base_speed = self.speed = float(sim.episode.speed[r])
        self.up = True
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.remote: list[Request] = []  # whose KV comes from elsewhere, as transfers began
        self.landed: list[Request] = []  # those of them whose KV is here
        self.waits = False  # a rank that leaves prefills out of its next step
        self.waited_steps = self.gathered_steps = 0  # of its group, if it is the first
        self.steps = 0
        self.due_s = math.inf
        self.stepping = False
        self.pool = self.empty_pool()

    def empty_pool(self) -> BlockPool:
        """Make the blocks of a replica of which nobody holds any."""
        return BlockPool(self.type.num_blocks, self.sim.spec.prefix_caching, self.give_way)

    def give_way(self, turn: int) -> None:
        """A turn lets go before it was decided what becomes of its KV."""
        self.sim.tiers.keep(self, self.sim.requests[turn])

    def identity(self, q: Request, j: int) -> Identity:
        """Name the content of block `j` of a request, by the text of its last token."""
        last = (j + 1) * self.sim.spec.block_size - 1
        shared = next((key for key, end in q.segments if end > last), None)
        return ("own", q.idx, j) if shared is None else ("shared", shared, j)

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

    def end_turn(self, q: Request) -> None:
        """Decide what becomes of the KV of a request that has ended, or let it be decided."""
        goes_on = bool(self.sim.followers(q))
        blocks = self.hits(q, q.computed // self.sim.spec.block_size)
        if self.sim.retain is not None and (goes_on or self.sim.retain_all):
            if blocks:
                self.sim.set_timer(self.sim.now_s, st.RETAINING, q.idx)
                self.pool.retain(q.idx, blocks, self.sim.now_s, decided=False)
            return
        self.sim.tiers.keep(self, q)
        if self.sim.spec.retain_kv_s > 0 and goes_on and blocks:
            self.pool.retain(q.idx, blocks, self.sim.expiry_s(q, self.sim.spec.retain_kv_s))

    def settle_turn(self, q: Request, answer: int, keep_s: float) -> None:
        """Do with the KV of a turn what was decided."""
        one = self.pool.undecided(q.idx)
        assert one is not None
        if answer in (st.OFFLOAD, st.KEEP):
            self.sim.tiers.keep(self, q)
        if answer == st.KEEP:
            self.pool.keep_until(one, self.sim.expiry_s(q, keep_s))
        elif answer == st.DROP:
            self.pool.drop(one)
        else:
            self.pool.let_go(one)

    def preempt(self, q: Request, *, to_front: bool = True) -> None:
        """Preempt by recompute; the request waits at the front or the end of the queue."""
        self.running.remove(q)
        self.release(q)
        self.sim.tiers.keep(self, q)
        q.computed, q.scheduled = 0, 0
        self.waiting.insert(0 if to_front else len(self.waiting), q)
        self.sim.log(st.EV_PREEMPT, q.idx, self.r)
        self.sim.migrations.note_preempted(self, q)

    def form(self) -> tuple[list[tuple[int, int]], list[Request]]:
        """Give requests their tokens of the next step.

        Returns:
            Chunks as (tokens, context), and the requests that decode; both empty: nothing to do.
        """
        raise NotImplementedError

    def can_prefill(self) -> bool:
        """Say whether the next step could hold a prefill."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Form a step at the current time and set when it ends."""
        sim = self.sim
        sim.migrations.leave(self)
        chunks, decodes = self.form()
        if not chunks and not decodes:
            self.due_s, self.stepping = math.inf, False
            return
        kv = sum(q.computed + 1 for q in decodes)
        factor = 1.0 / self.speed
        sigma = sim.spec.noise_sigma
        if sigma > 0:
            window = self.steps // sim.spec.noise_period_steps
            z = step_noise_z(np.uint64(sim.episode.noise_seed), self.r, window)
            factor *= math.exp(sigma * z - 0.5 * sigma * sigma)
        factor *= sim.tiers.factor(self)
        self.stepping = True
        self.due_s = sim.now_s + self.type.grid.step_s(chunks, len(decodes), kv) * factor

    def own_step_s(self) -> float:
        """Seconds that the step just begun takes by itself; of an idle rank, with a dummy token."""
        if self.stepping:
            return self.due_s - self.sim.now_s
        grid = self.type.parts[0] if self.type.parts else self.type.grid
        return (grid.cpu_s + grid.dense(1)) / self.speed

    def step_tokens(self) -> int:
        """Tokens of the step in progress."""
        return sum(q.scheduled for q in self.running)

    def prefills(self) -> bool:
        """Whether there is a chunk in the step in progress."""
        return any(q.prefilling for q in self.running if q.scheduled)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.sim.spec.block_size)

    def cached(self, q: Request) -> tuple[list[int], int]:
        """Blocks of a waiting request in the cache, and how many of them nobody holds."""
        found = self.hits(q, (q.total - 1) // self.sim.spec.block_size)
        return found, sum(self.pool.holders[b] == 0 for b in found)

    def arrived(self, q: Request) -> tuple[int, int]:
        """Blocks a request had here before its KV landed, and the tokens that it has now."""
        if q.idx in self.sim.tiers.loads:
            hits, blocks = self.sim.tiers.there(q)
            return hits, blocks * self.sim.spec.block_size
        return self.sim.transfers.ways[q.idx].hits, q.total - 1

    def admit_landed(self, q: Request, tokens: int) -> tuple[int, int]:
        """Move a request whose KV has landed to the running list, with its first chunk."""
        hits, computed = self.arrived(q)
        self.sim.tiers.loads.pop(q.idx, None)
        self.landed.remove(q)
        self.remote.remove(q)
        self.running.append(q)
        q.prefilling, q.target, q.computed = True, q.total, computed
        q.named = computed // self.sim.spec.block_size
        for j in range(hits, q.named):
            self.pool.name(q.blocks[j], self.identity(q, j))
        if not q.admitted_once:
            q.admitted_once = True
            self.sim.log(st.EV_ADMIT, q.idx, self.r, computed)
        return self.give(q, tokens)

    def admit(self, hit: list[int], tokens: int) -> tuple[int, int]:
        """Move the head of the queue to the running list, with its first chunk; return that."""
        q = self.waiting.pop(0)
        self.running.append(q)
        for block in hit:
            self.pool.hold(block)
        self.pool.let_go_of(q.after)
        computed = len(hit) * self.sim.spec.block_size
        q.blocks, q.named, q.computed = list(hit), len(hit), computed
        q.prefilling, q.target = True, q.total
        if not q.admitted_once:
            q.admitted_once = True
            self.sim.log(st.EV_ADMIT, q.idx, self.r, computed)
        return self.give(q, tokens)

    def give(self, q: Request, tokens: int) -> tuple[int, int]:
        """Schedule tokens of a running request, with their blocks; return (tokens, context)."""
        need = self.blocks(q.computed + tokens) - len(q.blocks)  # fewer than 0 after a load
        q.blocks += [self.pool.take() for _ in range(need)]
        q.scheduled = tokens
        if q.prefilling:
            filled = (q.computed + tokens) // self.sim.spec.block_size
            for j in range(q.named, filled):
                self.pool.name(q.blocks[j], self.identity(q, j))
            q.named = max(q.named, filled)
        return tokens, q.computed

    def end_step(self) -> None:
        """Tokens come out; requests end."""
        self.steps += 1
        self.sim.engine_steps += 1
        scheduled = [q for q in self.running if q.scheduled]
        decoding = [q for q in scheduled if not q.prefilling]
        ended = 0
        for q in decoding + [q for q in scheduled if q.prefilling]:
            q.computed += q.scheduled
            q.scheduled = 0
            if q.prefilling and q.computed < q.target:
                continue
            if self.type.role == "prefill":
                self.sim.transfers.hand_over(self, q)
                continue
            ended += self.emit(q)
        self.stepped(bool(decoding), ended)

    def emit(self, q: Request) -> bool:
        """Let one token of a request come out; return whether it was the last."""
        q.prefilling = False
        q.generated += 1
        if not q.first_token:
            q.first_token = True
            self.sim.log(st.EV_FIRST_TOKEN, q.idx, self.r)
        if q.generated < q.output:
            return False
        self.let_end(q)
        self.sim.end(q, st.EV_FINISH, self.r)
        return True

    def let_end(self, q: Request) -> None:
        """Take a request that has ended off the running list, with its blocks."""
        self.running.remove(q)
        self.release(q)
        self.end_turn(q)

    def stepped(self, decoded: bool, ended: int) -> None:
        """Note a step: whether requests decoded in it, and how many ended with it."""

    def enqueue(self, q: Request) -> None:
        """A request comes to the end of the queue."""
        self.waiting.append(q)
        self.pool.expect(q.after)
        self.wake()

    def busy(self) -> int:
        """Running requests, and four times those that wait or whose KV comes."""
        return len(self.running) + 4 * (len(self.waiting) + len(self.remote))

    def wake(self) -> None:
        """Something may be admitted: an idle engine starts, just after now."""
        if self.up and math.isinf(self.due_s):
            self.due_s = math.nextafter(self.sim.now_s, math.inf)

    def abort(self, q: Request) -> None:
        """Forget a request; the step in progress lasts as long as it would have."""
        if q in self.waiting:
            self.waiting.remove(q)
        elif q in self.running:
            self.running.remove(q)
            self.release(q)
            q.scheduled = 0

    def stop(self) -> list[Request]:
        """Fail: hand all requests back and forget everything."""
        if self.stepping:
            self.steps += 1
        returned = self.running + self.waiting
        for q in returned:
            q.computed, q.scheduled, q.blocks, q.named = 0, 0, [], 0
            self.sim.log(st.EV_RETURN, q.idx, self.r)
        self.running, self.waiting = [], []
        self.pool = self.empty_pool()
        self.up, self.due_s, self.stepping = False, math.inf, False
        return returned

    def metrics(self) -> tuple[int, int, float, int]:
        """Running, waiting, share of blocks held, tokens emitted by its requests."""
        if not self.up:
            return 0, 0, 0.0, 0
        mine = self.running + self.waiting + self.remote
        held = 1.0 - self.pool.num_free / self.type.num_blocks
        num_waiting = len(self.waiting) + len(self.remote)
        return len(self.running), num_waiting, held, sum(q.generated for q in mine)
