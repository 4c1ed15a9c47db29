"""The plain engines: how a replica of each kind forms its steps, one at a time."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from servegym.cluster import state as st
from servegym.cluster.phased import (
    CLIP_MAX_NEW_TOKENS,
    INITIAL_RATIO,
    LEAST_RATIO,
    RATIO_DECAY,
    RETRACT_DECODE_STEPS,
)
from servegym.cluster.reference_blocks import BlockPool, Identity
from servegym.cluster.rng import step_noise_z
from servegym.cluster.spec import WATERMARK_BLOCKS
from servegym.cluster.stretches import STEP_WEIGHT
from servegym.engines import EngineName
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
        return (self.type.grid.cpu_s + self.type.grid.dense(1)) / self.speed

    def step_tokens(self) -> int:
        """Tokens of the step in progress."""
        return sum(q.scheduled for q in self.running)

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
            q.prefilling = False
            q.generated += 1
            if not q.first_token:
                q.first_token = True
                self.sim.log(st.EV_FIRST_TOKEN, q.idx, self.r)
            if q.generated == q.output:
                ended += 1
                self.let_end(q)
                self.sim.end(q, st.EV_FINISH, self.r)
        self.stepped(bool(decoding), ended)

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


class Vllm(Engine):
    """vLLM V1: running requests first, decodes and chunks in one step, then the queue."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        super().__init__(sim, r)
        self.forget_forming()

    def forget_forming(self) -> None:
        """An engine at rest sees all its queue, and nobody lingers."""
        self.seen = sys.maxsize  # of its queue, so many were there when it last formed a step
        self.ended: list[Request] = []  # with asynchronous scheduling: still among the running

    def form(self) -> tuple[list[tuple[int, int]], list[Request]]:
        """See `Engine.form`; what came or ended since the last step began may not be known yet."""
        hidden = 0
        if self.type.async_scheduling:
            hidden = max(0, len(self.waiting) - self.seen)
        while True:
            chunks, decodes, preempted = self.form_knowing(hidden)
            if chunks or decodes:
                break
            if hidden or self.ended:  # with nothing to run, the last step's results come first
                hidden = 0
                self.let_ended_go()
                continue
            if not (preempted and self.waiting):
                break
        self.let_ended_go()
        self.seen = len(self.waiting) if chunks or decodes else sys.maxsize
        return chunks, decodes

    def displace(self, victim: Request) -> None:
        """Preempt a request, or let it go at once if it has ended."""
        if victim in self.ended:
            self.ended.remove(victim)
            super().let_end(victim)
        else:
            self.preempt(victim)

    def let_ended_go(self) -> None:
        """Who ended with the last step leaves, with its blocks."""
        for q in self.ended:
            super().let_end(q)
        self.ended = []

    def form_knowing(self, hidden: int) -> tuple[list[tuple[int, int]], list[Request], bool]:
        """Form a step without the last `hidden` of the queue, and say whether it preempted."""
        self.consult()
        budget = self.type.max_num_batched_tokens
        preempted = False
        chunks: list[tuple[int, int]] = []
        decodes: list[Request] = []
        for q in list(self.running):
            if q not in self.running or q in self.ended:
                continue
            tokens = min(q.target - q.computed, budget) if q.prefilling else 1
            need = self.blocks(q.computed + tokens) - len(q.blocks)
            while need > self.pool.num_free and q in self.running:
                victim = self.victim()
                preempted = True
                self.displace(victim)
                if victim in decodes:
                    decodes.remove(victim)
                    budget += 1
            if q not in self.running:
                break
            chunk = self.give(q, tokens)
            budget -= tokens
            if q.prefilling:
                chunks.append(chunk)
            else:
                decodes.append(q)
        waits = False
        for q in [] if preempted else [q for q in self.remote if q in self.landed]:
            if budget > 0 and len(self.running) < self.type.max_num_seqs:
                rest = q.total - self.arrived(q)[1]
                tokens = min(rest, budget)
                if tokens < rest and not self.may_chunk():
                    waits = True
                    break
                chunks.append(self.admit_landed(q, tokens))
                budget -= tokens
        while not preempted and not waits and len(self.waiting) > hidden and budget > 0:
            q = self.first_waiting()
            if len(self.running) >= self.type.max_num_seqs:
                break
            if self.sim.transfers.are_enough(self) or self.sim.tiers.are_enough(self):
                break
            if self.sim.transfers.awaits(q):
                if not self.sim.transfers.set_aside(self, q):
                    break
                continue
            hit, unheld = self.cached(q)
            rest = q.total - len(hit) * self.sim.spec.block_size
            tokens = min(rest, budget)
            if tokens < rest and not self.may_chunk():
                break
            if not self.has_room(q, hit, unheld):
                break
            if self.sim.tiers.load(self, q):
                continue
            self.waiting.remove(q)
            self.waiting.insert(0, q)
            chunks.append(self.admit(hit, tokens))
            budget -= tokens
        return chunks, decodes, preempted

    def consult(self) -> None:
        """Ask whoever orders the requests, before a step is formed."""

    def victim(self) -> Request:
        """Say who is preempted."""
        return self.running[-1]

    def first_waiting(self) -> Request:
        """Say who is admitted next."""
        return self.waiting[0]

    def may_chunk(self) -> bool:
        """Whether a prompt may be split over steps."""
        return self.sim.spec.chunked_prefill

    def has_room(self, q: Request, hit: list[int], unheld: int) -> bool:
        """Whether a waiting request's blocks may be had."""
        return self.blocks(q.total) - len(hit) + unheld <= self.pool.num_free

    def let_end(self, q: Request) -> None:
        """See `Engine.let_end`; with asynchronous scheduling that waits for the next step."""
        if self.type.async_scheduling:
            self.ended.append(q)
        else:
            super().let_end(q)

    def stop(self) -> list[Request]:
        """See `Engine.stop`."""
        self.forget_forming()
        return super().stop()


class VllmPriority(Vllm):
    """vLLM V1 in priority mode: lowest (key, arrival) admitted first, highest preempted first."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        super().__init__(sim, r)
        self.step_s = 0.0
        self.begin_s = 0.0

    def urgency(self, q: Request) -> tuple[float, float, int]:
        """Whoever has the lowest goes first."""
        return q.key, q.arrival_s, q.idx

    def victim(self) -> Request:
        """See `Vllm.victim`."""
        return max(self.running, key=self.urgency)

    def first_waiting(self) -> Request:
        """See `Vllm.first_waiting`."""
        return min(self.waiting, key=self.urgency)

    def preempt(self, q: Request, *, to_front: bool = True) -> None:
        """See `Engine.preempt`."""
        super().preempt(q, to_front=to_front)
        q.idle_since_s = self.sim.now_s

    def consult(self) -> None:
        """See `Vllm.consult`."""
        if self.sim.order is not None and (self.sim.each_step or self.may_choose()):
            if self.running or self.waiting:
                self.sim.order(self)

    def may_choose(self) -> bool:
        """Whether it matters in the step to come who goes first."""
        decoding = [q for q in self.running if not q.prefilling]
        free = self.pool.num_free
        free -= sum(self.blocks(q.computed + 1) - len(q.blocks) for q in decoding)
        budget = self.type.max_num_batched_tokens - len(decoding)
        prefilling = [q for q in self.running if q.prefilling]
        for q in prefilling:
            tokens = min(q.target - q.computed, budget)
            free -= self.blocks(q.computed + tokens) - len(q.blocks)
            budget -= tokens
        if free < 0:
            return len(self.running) > 1
        if len(self.waiting) < 2 or len(self.running) >= self.type.max_num_seqs or budget <= 0:
            return False
        if self.sim.spec.prefix_caching and prefilling:
            return True
        return any(self.could_admit(q, free, budget) for q in self.waiting)

    def could_admit(self, q: Request, free: int, budget: int) -> bool:
        """Whether a waiting request fits into so many blocks and tokens."""
        hit, unheld = self.cached(q)
        rest = q.total - len(hit) * self.sim.spec.block_size
        fits = self.blocks(q.total) - len(hit) + unheld <= free
        return fits and (self.may_chunk() or rest <= budget)

    def begin_step(self) -> None:
        """See `Engine.begin_step`."""
        self.begin_s = self.sim.now_s
        super().begin_step()

    def stepped(self, decoded: bool, ended: int) -> None:
        """See `Engine.stepped`."""
        duration_s = self.sim.now_s - self.begin_s
        old = self.step_s or duration_s
        self.step_s = old + STEP_WEIGHT * (duration_s - old)

    def stop(self) -> list[Request]:
        """See `Engine.stop`."""
        self.step_s = 0.0
        return super().stop()


class TrtLlm(Vllm):
    """TensorRT-LLM: whole prompts beside decodes, admitted with room for their last token."""

    def may_chunk(self) -> bool:
        """See `Vllm.may_chunk`."""
        return False

    def has_room(self, q: Request, hit: list[int], unheld: int) -> bool:
        """See `Vllm.has_room`."""
        promised = sum(self.to_end(r) - len(r.blocks) for r in self.running)
        return self.to_end(q) <= self.pool.num_free - promised

    def to_end(self, q: Request) -> int:
        """Blocks a request holds when its last token comes out."""
        return self.blocks(q.prompt + q.output - 1)


class VllmV0(Engine):
    """vLLM V0: steps of whole prompts as long as some can be admitted, else a decode step."""

    def form(self) -> tuple[list[tuple[int, int]], list[Request]]:
        """See `Engine.form`."""
        while True:
            chunks: list[tuple[int, int]] = []
            budget = self.type.max_num_batched_tokens
            watermark = self.type.num_blocks // WATERMARK_BLOCKS
            while self.waiting and len(self.running) < self.type.max_num_seqs:
                q = self.waiting[0]
                hit, _ = self.cached(q)
                tokens = q.total - len(hit) * self.sim.spec.block_size
                if tokens > budget or self.pool.num_free - self.blocks(q.total) < watermark:
                    break
                chunks.append(self.admit(hit, tokens))
                budget -= tokens
            if chunks:
                return chunks, []
            decodes: list[Request] = []
            preempted = False
            for q in list(self.running):
                while not self.pool.num_free and q in self.running:
                    self.preempt(self.running[-1])
                    preempted = True
                if q in self.running:
                    self.give(q, 1)
                    decodes.append(q)
            if decodes or not (preempted and self.waiting):
                return [], decodes


class Sglang(Engine):
    """SGLang: steps of prefills, one of them a chunk at most, before steps of decodes."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        super().__init__(sim, r)
        self.decode_steps = 0  # formed
        self.full = False  # batch_is_full
        self.lagging = 0  # ended requests that the running batch still counts
        self.alone = False  # what is prefilled will be the whole running batch
        self.ratio, self.ratio_since = INITIAL_RATIO, 0

    def form(self) -> tuple[list[tuple[int, int]], list[Request]]:
        """See `Engine.form`."""
        while True:
            chunks = self.prefill()
            if chunks:
                return chunks, []
            lagging, self.lagging = self.lagging, 0
            if not self.running:
                again = self.full or lagging > 0
                self.rest()
                if again and self.waiting:
                    continue
                return [], []
            if self.need() > self.pool.num_free:
                self.retract()
                self.full = False
            if lagging:
                self.full = False
            self.decode_steps += 1
            for q in self.running:
                self.give(q, 1)
            return [], list(self.running)

    def prefill(self) -> list[tuple[int, int]]:
        """Go on with the chunked request and admit others."""
        size = self.sim.spec.block_size
        in_chunks = [q for q in self.running if q.prefilling]
        self.alone = len(in_chunks) == len(self.running) and not self.lagging
        if not in_chunks and (self.full or not self.waiting):
            return []
        room = self.type.max_num_batched_tokens
        if self.sim.spec.chunked_prefill:
            room = room // size * size
        decoding = [q for q in self.running if not q.prefilling]
        to_come = sum(min(q.output - q.generated, CLIP_MAX_NEW_TOKENS) for q in decoding)
        ahead = self.new_token_ratio() * to_come
        reserved = 0
        chunks = []
        for q in in_chunks:
            tokens = min(q.target - q.computed, room)
            if tokens == q.target - q.computed:
                reserved += min(q.output, CLIP_MAX_NEW_TOKENS)
            reserved += size
            room -= self.blocks(tokens) * size
            chunks.append(self.give(q, tokens))
        while self.waiting:
            if len(decoding) + self.lagging + len(chunks) >= self.type.max_num_seqs:
                self.full = True
                break
            q = self.waiting[0]
            hit, unheld = self.cached(q)
            rest = q.total - len(hit) * size
            new = min(q.output - q.generated, CLIP_MAX_NEW_TOKENS)
            left = (self.pool.num_free - unheld) * size - reserved - ahead
            if rest + new + size >= left:
                self.full = True
                break
            tokens = rest
            if self.sim.spec.chunked_prefill:
                if self.blocks(rest) * size > room:
                    tokens = room
                if room <= 0:
                    break
            elif chunks and self.blocks(rest) * size >= room:
                break
            chunks.append(self.admit(hit, tokens))
            room -= self.blocks(tokens) * size
            if tokens == rest:
                reserved += min(q.output, CLIP_MAX_NEW_TOKENS)
            reserved += size
            if self.pool.num_free * size - reserved - ahead <= 0:
                self.full = True
                break
            if room <= 0:
                break
        return chunks

    def need(self) -> int:
        """Blocks that a decode step takes."""
        return sum(self.blocks(q.computed + 1) - len(q.blocks) for q in self.running)

    def new_token_ratio(self) -> float:
        """Share of the tokens to come that prefills leave room for."""
        decays = self.decode_steps - self.ratio_since
        return self.ratio if decays <= 0 else max(self.ratio - decays * RATIO_DECAY, LEAST_RATIO)

    def retract(self) -> None:
        """Retract those with the fewest output tokens, the longest prompt, the last place."""
        while self.need() > self.pool.num_free and len(self.running) > 1:
            order = sorted(self.running, key=lambda q: (q.generated, -q.prompt), reverse=True)
            self.preempt(order[-1], to_front=False)
        generated = sum(q.generated for q in self.running)
        foreseen = generated + RETRACT_DECODE_STEPS * len(self.running)
        self.ratio = min(1.0, foreseen / (sum(q.output for q in self.running) + 1))
        self.ratio_since = self.decode_steps + 1

    def stepped(self, decoded: bool, ended: int) -> None:
        """See `Engine.stepped`."""
        if decoded:
            self.lagging = ended
            return
        decoding = [q for q in self.running if not q.prefilling]
        if ended or len(decoding) < len(self.running) or self.alone:
            self.full = False

    def abort(self, q: Request) -> None:
        """See `Engine.abort`; prefills are tried again, as after an end."""
        if q in self.running:
            self.full = False
        super().abort(q)

    def rest(self) -> None:
        """Forget what was estimated: the engine is idle."""
        self.full = False
        self.ratio, self.ratio_since = INITIAL_RATIO, self.decode_steps

    def stop(self) -> list[Request]:
        """See `Engine.stop`."""
        returned = super().stop()
        self.lagging = 0
        self.rest()
        return returned


RULES: dict[EngineName, type[Engine]] = {
    "vllm": Vllm,
    "vllm-v0": VllmV0,
    "sglang": Sglang,
    "trtllm": TrtLlm,
    "vllm-priority": VllmPriority,
}
