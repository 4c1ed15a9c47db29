"""The plain SGLang engine: prefills before decodes, and what it estimates of their KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servegym.cluster.phased import (
    CLIP_MAX_NEW_TOKENS,
    INITIAL_RATIO,
    LEAST_RATIO,
    RATIO_DECAY,
    RETRACT_DECODE_STEPS,
)
from servegym.cluster.reference_engine import Engine, Request

if TYPE_CHECKING:
    from servegym.cluster.reference import ReferenceSimulator


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
