"""The plain engines that form steps as vLLM does: V1 in both its modes, TensorRT-LLM, and V0."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from servegym.cluster.reference_engine import Engine, Request
from servegym.cluster.spec import WATERMARK_BLOCKS
from servegym.cluster.stretches import STEP_WEIGHT

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator


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
        hidden = len(self.waiting) if self.waits else 0
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

    def can_prefill(self) -> bool:
        """See `Engine.can_prefill`."""
        if not self.waiting or len(self.running) >= self.type.max_num_seqs:
            return False
        q = self.waiting[0]
        hit, unheld = self.cached(q)
        decodes = sum(not other.prefilling for other in self.running) * (1 + self.type.num_drafts)
        rest = q.total - len(hit) * self.sim.spec.block_size
        fits = rest <= self.type.max_num_batched_tokens - decodes
        return fits and self.has_room(q, hit, unheld)

    def has_room(self, q: Request, hit: list[int], unheld: int) -> bool:
        """See `Vllm.has_room`."""
        promised = sum(self.to_end(r) - len(r.blocks) for r in self.running)
        return self.to_end(q) <= self.pool.num_free - promised

    def to_end(self, q: Request) -> int:
        """Blocks a request holds when its last token comes out."""
        return self.blocks(q.prompt + q.output - 1 + self.type.tokens_ahead)


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
