"""The plain engines with explicit batches: stages of a pipeline, or drafts to verify."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servegym.cluster.drafts import count_accepted
from servegym.cluster.reference_engine import Engine, Request
from servegym.cluster.reference_vllm import TrtLlm, Vllm
from servegym.cluster.rng import step_noise_z
from servegym.engines import EngineName

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator


@dataclass
class Flight:
    """A batch in flight.

    Attributes:
        landing_s: When it leaves the last stage.
        tokens: In it.
        prefills: Whether some of these are of prompts.
        brings: Whose next token it computes, and how many drafts behind that it verifies.
    """

    landing_s: float
    tokens: int
    prefills: bool
    brings: list[tuple[Request, int]]


class Batched(Vllm):
    """vLLM V1: up to as many batches in flight as stages, a request in one at a time."""

    #: With a drafter: whether the last block of a hit is computed again.
    computes_last_hit = True

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        super().__init__(sim, r)
        self.flights: list[Flight] = []
        self.free_s = [0.0] * self.type.num_stages

    def begin_step(self) -> None:
        """Form batches while there is room for them and somebody to schedule."""
        while len(self.flights) < self.type.num_stages:
            chunks, decodes = self.form()
            if not chunks and not decodes:
                break
            scheduled = [q for q in self.running if q.scheduled]
            landing_s = self.send_off(chunks, decodes)
            tokens = sum(q.scheduled for q in scheduled)
            brings = []
            for q in scheduled:
                q.computed += q.scheduled
                if q.computed >= q.total:
                    brings.append((q, 0 if q.prefilling else q.scheduled - 1))
                q.scheduled = 0
            self.flights.append(Flight(landing_s, tokens, bool(chunks), brings))
            self.steps += 1
        self.stepping = bool(self.flights)
        self.due_s = self.flights[0].landing_s if self.flights else math.inf

    def form_knowing(self, hidden: int) -> tuple[list[tuple[int, int]], list[Request], bool]:
        """See `Vllm.form_knowing`; whoever is in flight has nothing left to schedule."""
        budget, room = self.type.max_num_batched_tokens, self.type.max_num_seqs
        preempted = False
        chunks: list[tuple[int, int]] = []
        decodes: list[Request] = []
        for q in list(self.running):
            drafts = 0 if q.prefilling else self.type.num_drafts
            tokens = min(q.total - q.computed + drafts, budget)
            if q not in self.running or tokens <= 0 or room == 0:
                continue
            ahead = q.computed + tokens + self.type.lookahead
            while self.blocks(ahead) - len(q.blocks) > self.pool.num_free:
                victim = self.running[-1]
                self.preempt(victim)
                preempted = True
                if victim is q:
                    break
            if q not in self.running:
                break
            chunk = self.give(q, tokens)
            if q.prefilling:
                chunks.append(chunk)
            else:
                decodes.append(q)
            budget -= tokens
            room -= 1
        chunked = bool(chunks)
        while not preempted and len(self.waiting) > hidden and budget > 0 and room > 0:
            if len(self.running) >= self.type.max_num_running:
                break
            q = self.waiting[0]
            hit, unheld = self.cached(q)
            computed = len(hit) * self.sim.spec.block_size
            tokens = min(q.total - computed, budget)
            if computed + tokens < q.total and not self.may_chunk():
                break
            if self.must_pad(q.total - computed, computed, chunked, decodes):
                tokens = 1 + self.type.num_drafts
                if tokens > budget:
                    break
            ahead = self.blocks(computed + tokens + self.type.lookahead) - len(hit)
            if not self.has_room(q, hit, unheld) or ahead + unheld > self.pool.num_free:
                break
            chunks.append(self.admit(hit, tokens))
            budget -= tokens
            room -= 1
        # while batches are in flight, nothing is formed at once in place of an empty one
        return chunks, decodes, preempted and not self.flights

    def cached(self, q: Request) -> tuple[list[int], int]:
        """See `Engine.cached`; a head that reads hidden states needs those of the last block."""
        found, unheld = super().cached(q)
        if found and self.type.num_drafts and self.computes_last_hit:
            unheld -= self.pool.holders[found.pop()] == 0
        return found, unheld

    def must_pad(self, rest: int, computed: int, chunked: bool, decodes: list[Request]) -> bool:
        """Whether a request with one token left must look like those that decode beside it."""
        alike = self.type.num_drafts > 0 and not chunked and rest == 1
        return alike and bool(decodes or computed)

    def step_tokens(self) -> int:
        """See `Engine.step_tokens`."""
        return sum(flight.tokens for flight in self.flights)

    def prefills(self) -> bool:
        """See `Engine.prefills`."""
        return any(flight.prefills for flight in self.flights)

    def send_off(self, chunks: list[tuple[int, int]], decodes: list[Request]) -> float:
        """Let the stages take a batch one after the other; return when it leaves the last."""
        spec = self.sim.spec
        factor = 1.0 / self.speed
        if spec.noise_sigma > 0:
            window = self.steps // spec.noise_period_steps
            z = step_noise_z(np.uint64(self.sim.episode.noise_seed), self.r, window)
            factor *= math.exp(spec.noise_sigma * z - 0.5 * spec.noise_sigma**2)
        ready_s = self.sim.now_s
        works_s, handover_s = self.work_s(chunks, decodes)
        for stage, work_s in enumerate(works_s):
            self.free_s[stage] = max(ready_s, self.free_s[stage]) + factor * work_s
            ready_s = self.free_s[stage] + factor * handover_s
        return self.free_s[-1]

    def work_s(
        self, chunks: list[tuple[int, int]], decodes: list[Request]
    ) -> tuple[tuple[float, ...], float]:
        """Return what each stage takes for a batch, and the way from one to the next."""
        if self.type.speculation is not None:
            given = [(q.scheduled, q.computed) for q in decodes]
            return (self.type.speculation.step_s(chunks, given),), 0.0
        pipeline = self.type.pipeline
        assert pipeline is not None
        kv = sum(q.computed + 1 for q in decodes)
        tokens = len(decodes) + sum(chunk for chunk, _ in chunks)
        return pipeline.stage_s(chunks, len(decodes), kv), pipeline.handover(tokens)

    def end_step(self) -> None:
        """Let the oldest batch leave the last stage."""
        self.sim.engine_steps += 1
        for q, drafts in self.flights.pop(0).brings:
            accepted = 0
            if self.type.speculation is not None:
                rates = np.array(self.type.speculation.acceptance)
                seed = np.uint64(self.sim.episode.noise_seed)
                accepted = count_accepted(seed, q.idx, q.generated, drafts, rates)
            # what is rejected is not there; what comes with the last tokens has no identity
            q.computed = min(q.computed, q.total + accepted)
            if q.generated + 1 + accepted >= q.output:
                q.computed = min(q.computed, q.named * self.sim.spec.block_size)
            for _ in range(1 + accepted):
                if self.emit(q):
                    break

    def give(self, q: Request, tokens: int) -> tuple[int, int]:
        """See `Engine.give`; blocks have their names as soon as its text fills them."""
        need = self.blocks(q.computed + tokens + self.type.lookahead) - len(q.blocks)
        q.blocks += [self.pool.take() for _ in range(need)]
        q.scheduled = tokens
        text = min(q.computed + tokens, q.total)
        for j in range(q.named, text // self.sim.spec.block_size):
            self.pool.name(q.blocks[j], self.identity(q, j))
            q.named = j + 1
        return tokens, q.computed

    def release(self, q: Request) -> None:
        """See `Engine.release`; what came with the last batch has no names and gets none."""
        self.pool.release(q.blocks)
        q.blocks, q.named = [], 0

    def leave_flight(self, q: Request) -> None:
        """What a batch in flight computes for a request is lost."""
        for flight in self.flights:
            flight.brings = [one for one in flight.brings if one[0] is not q]

    def preempt(self, q: Request, *, to_front: bool = True) -> None:
        """See `Engine.preempt`."""
        super().preempt(q, to_front=to_front)
        self.leave_flight(q)

    def abort(self, q: Request) -> None:
        """See `Engine.abort`."""
        super().abort(q)
        self.leave_flight(q)

    def stop(self) -> list[Request]:
        """See `Engine.stop`."""
        self.stepping = False
        self.flights = []
        self.free_s = [0.0] * self.type.num_stages
        return super().stop()


class BatchedTrtLlm(Batched, TrtLlm):
    """TensorRT-LLM; its limit on sequences is of each batch."""

    computes_last_hit = False

    def must_pad(self, rest: int, computed: int, chunked: bool, decodes: list[Request]) -> bool:
        """See `Batched.must_pad`; never."""
        return False


BATCHED: dict[EngineName, type[Engine]] = {"vllm": Batched, "trtllm": BatchedTrtLlm}
