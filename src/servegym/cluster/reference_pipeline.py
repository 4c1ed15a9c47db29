"""The plain engines with batches in flight: layers split over the stages of a pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
        brings: Whose next token it computes.
    """

    landing_s: float
    brings: list[Request]


class Pipelined(Vllm):
    """vLLM V1 with stages: up to as many batches in flight, a request in one at a time."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        super().__init__(sim, r)
        assert self.type.pipeline is not None
        self.pipeline = self.type.pipeline
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
            for q in scheduled:
                q.computed += q.scheduled
                q.scheduled = 0
            brings = [q for q in scheduled if q.computed == q.total]
            self.flights.append(Flight(landing_s, brings))
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
            tokens = min(q.total - q.computed, budget)
            if q not in self.running or tokens == 0 or room == 0:
                continue
            while self.blocks(q.computed + tokens) - len(q.blocks) > self.pool.num_free:
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
        while not preempted and self.waiting and budget > 0 and room > 0:
            if len(self.running) >= self.type.max_num_running:
                break
            q = self.waiting[0]
            hit, unheld = self.cached(q)
            rest = q.total - len(hit) * self.sim.spec.block_size
            tokens = min(rest, budget)
            if tokens < rest and not self.may_chunk():
                break
            if not self.has_room(q, hit, unheld):
                break
            chunks.append(self.admit(hit, tokens))
            budget -= tokens
            room -= 1
        # while batches are in flight, nothing is formed at once in place of an empty one
        return chunks, decodes, preempted and not self.flights

    def send_off(self, chunks: list[tuple[int, int]], decodes: list[Request]) -> float:
        """Let the stages take a batch one after the other; return when it leaves the last."""
        spec = self.sim.spec
        factor = 1.0 / self.speed
        if spec.noise_sigma > 0:
            window = self.steps // spec.noise_period_steps
            z = step_noise_z(np.uint64(self.sim.episode.noise_seed), self.r, window)
            factor *= math.exp(spec.noise_sigma * z - 0.5 * spec.noise_sigma**2)
        kv = sum(q.computed + 1 for q in decodes)
        tokens = len(decodes) + sum(chunk for chunk, _ in chunks)
        ready_s = self.sim.now_s
        for stage, work_s in enumerate(self.pipeline.stage_s(chunks, len(decodes), kv)):
            self.free_s[stage] = max(ready_s, self.free_s[stage]) + factor * work_s
            ready_s = self.free_s[stage] + factor * self.pipeline.handover(tokens)
        return self.free_s[-1]

    def end_step(self) -> None:
        """Let the oldest batch leave the last stage."""
        self.sim.engine_steps += 1
        for q in self.flights.pop(0).brings:
            self.emit(q)

    def give(self, q: Request, tokens: int) -> tuple[int, int]:
        """See `Engine.give`; blocks have their names as soon as they are filled."""
        given = super().give(q, tokens)
        for j in range(q.named, (q.computed + tokens) // self.sim.spec.block_size):
            self.pool.name(q.blocks[j], self.identity(q, j))
            q.named = j + 1
        return given

    def leave_flight(self, q: Request) -> None:
        """What a batch in flight computes for a request is lost."""
        for flight in self.flights:
            flight.brings = [other for other in flight.brings if other is not q]

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


class PipelinedTrtLlm(Pipelined, TrtLlm):
    """TensorRT-LLM with stages; its limit on sequences is of each batch."""


PIPELINED: dict[EngineName, type[Engine]] = {"vllm": Pipelined, "trtllm": PipelinedTrtLlm}
