"""One replica on its own clock: vLLM's V1 scheduler, step by step, with live arrivals.

docs/simulator.md describes the rules; tests hold this equal to the simulator, to the last bit of
every timestamp. Two things are added: priorities, as vLLM's priority scheduling has them, and
aborts. With equal priorities the order is first come, first served.

A decoding request costs nothing at a step that does not end it, needs no block and sends nothing:
its token counts are those of the step it joined at plus the steps since, and it stands in tables
by the steps at which something happens to it.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from servegym.cluster.rng import step_noise_z
from servegym.cluster.spec import ReplicaType
from servegym.errors import ConfigError
from servegym.serve.engine.blocks import BlockPool
from servegym.serve.engine.request import EngineRequest, Observer, Status


class Replica:
    """An engine that is told the time.

    The caller asks `due_s`, and calls `step` when that time has come; it submits and aborts
    requests at times that are not before the last step and not after `due_s`.

    Args:
        kind: Its replica type.
        block_size: Tokens in a KV block.
        prefix_caching: Whether KV blocks of equal prefixes are used again.
        chunked_prefill: Whether a prompt may be split over steps.
        speed: Speed factor, 1 is nominal.
        noise: Standard deviation of the logarithm of step times, steps that share a draw, seed
            and index of the replica in the scenario.
        stream_interval: Tokens between two entries of a request in `outbox`; the first and the
            last token always make one.
        observer: Told what happens.

    Attributes:
        due_s: When the step in progress ends, or the idle engine begins one; infinite without
            work.
        multiplier: On the speed, for steps that begin from now on.
        outbox: Requests with tokens to send, in order; the caller empties it.
    """

    def __init__(
        self,
        kind: ReplicaType,
        observer: Observer,
        *,
        block_size: int = 16,
        prefix_caching: bool = True,
        chunked_prefill: bool = True,
        speed: float = 1.0,
        noise: tuple[float, int, int, int] = (0.0, 1, 0, 0),
        stream_interval: int = 1,
    ) -> None:
        if stream_interval < 1:
            raise ConfigError(f"stream_interval must be at least 1, got {stream_interval}")
        self.kind = kind
        self.block_size = block_size
        self.speed = speed
        self.multiplier = 1.0
        self.due_s = math.inf
        self.outbox: dict[EngineRequest, None] = {}
        self._observer = observer
        self._caching = prefix_caching
        self._chunked = chunked_prefill
        self._noise = noise
        self._interval = stream_interval
        self._steps = 0
        self._num_submitted = 0
        self._clear()

    def _clear(self) -> None:
        self.pool = BlockPool(self.kind.num_blocks, self._caching)
        self._waiting: list[tuple[tuple[int, float, int], EngineRequest]] = []
        self.num_waiting = 0
        self._running: dict[EngineRequest, None] = {}  # in order of admission
        self._partial: EngineRequest | None = None  # the one whose prompt is not yet computed
        self._num_decodes = 0
        self._kv_tokens = 0  # sum of computed tokens over decoding requests
        self._needy: list[dict[EngineRequest, None]] = [{} for _ in range(self.block_size)]
        self._senders: list[dict[EngineRequest, None]] = [{} for _ in range(self._interval)]
        self._ends: dict[int, dict[EngineRequest, None]] = {}
        self._chunks: list[EngineRequest] = []  # prefilling in the step in progress
        self._paused: list[EngineRequest] = []  # decoding, but left out of the step in progress
        self._begin_s = math.nan  # of the step in progress, NaN: none

    @property
    def num_running(self) -> int:
        """Requests in the running list."""
        return len(self._running)

    @property
    def capacity_tokens(self) -> int:
        """KV tokens the replica holds."""
        return self.kind.num_blocks * self.block_size

    def generated(self, request: EngineRequest) -> int:
        """Output tokens of a request so far."""
        if request._joined < 0:
            return request._generated
        return request._generated + self._steps - request._joined

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Put a request into the waiting queue.

        Raises:
            ConfigError: If it can never fit.
        """
        need = request.prompt_tokens + request.output_tokens - 1
        if need > self.capacity_tokens or not (self._chunked or need <= self._budget):
            most = self.capacity_tokens if self._chunked else self._budget
            raise ConfigError(
                f"the replica holds {most} tokens, but prompt and output make {need}: "
                "shorten the prompt or lower max_tokens"
            )
        self._num_submitted += 1
        request.arrival_s, request._order = now_s, self._num_submitted
        self._enqueue(request)
        if math.isinf(self.due_s):
            self.due_s = math.nextafter(now_s, math.inf)

    def abort(self, request: EngineRequest) -> None:
        """Forget a request, wherever it is; its blocks are free at once."""
        if request.status == Status.WAITING:
            self.num_waiting -= 1
            if len(self._waiting) > 2 * self.num_waiting + 16:  # else dropped at the front
                self._waiting = [
                    x
                    for x in self._waiting
                    if x[1] is not request and x[1].status == Status.WAITING
                ]
                heapq.heapify(self._waiting)
        elif request.status == Status.RUNNING:
            self._leave_running(request)
        else:
            return
        request.status = Status.ABORTED
        self.outbox.pop(request, None)

    def fail(self) -> list[EngineRequest]:
        """Lose all requests, the cache and the step in progress; return the requests."""
        lost = [*self._running, *(q for _, q in self._waiting if q.status == Status.WAITING)]
        for request in lost:
            request.status = Status.ABORTED
        if not math.isnan(self._begin_s):
            self._steps += 1
        self._clear()
        self.outbox.clear()
        self.due_s = math.inf
        return lost

    def step(self) -> None:
        """Do what is due at `due_s`: end the step in progress, and begin the next one."""
        now_s = self.due_s
        if not math.isnan(self._begin_s):
            self._end_step(now_s)
        self._begin_step(now_s)

    @property
    def _budget(self) -> int:
        return self.kind.max_num_batched_tokens

    def _begin_step(self, now_s: float) -> None:
        costs: list[tuple[int, int]] = []
        while True:
            whole, victims = self._feed_decodes(now_s)
            budget = self._budget - self._num_decodes
            partial = self._partial
            if partial is not None and whole:
                tokens = min(partial._target - partial._computed, budget)
                need = self._blocks_for(partial._computed + tokens) - len(partial._blocks)
                victims += self._make_room(partial, need, now_s)
                budget = self._budget - self._num_decodes
                if partial.status == Status.RUNNING:
                    costs.append(self._give_chunk(partial, tokens, need))
                    budget -= tokens
            if not victims:
                costs += self._admit(budget, now_s)
            if costs or self._num_decodes:
                break
            self._resume_paused()
            if not (victims and (self.num_waiting or self._running)):
                self._begin_s, self.due_s = math.nan, math.inf
                return
        kv_tokens = self._kv_tokens + self._num_decodes
        duration_s = self.kind.grid.step_s(costs, self._num_decodes, kv_tokens)
        self._begin_s = now_s
        self.due_s = now_s + duration_s * self._factor()

    def _factor(self) -> float:
        factor = 1.0 / (self.speed * self.multiplier)
        sigma, period, seed, index = self._noise
        if sigma > 0:
            z = step_noise_z(np.uint64(seed), index, self._steps // period)
            factor *= math.exp(sigma * z - 0.5 * sigma * sigma)
        return factor

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _feed_decodes(self, now_s: float) -> tuple[bool, int]:
        """Give every decoding request that needs one a block for its token.

        Returns:
            Whether the whole running list got its turn, and how many were preempted.
        """
        needy = self._needy[self._steps % self.block_size]
        if len(needy) <= self.pool.free:
            for request, block in zip(needy, self.pool.take(len(needy)), strict=True):
                request._blocks.append(block)
            return True, 0
        victims = 0
        order = list(self._running)
        for i, request in enumerate(order):
            if request not in needy:
                continue
            victims += self._make_room(request, 1, now_s)
            if request.status != Status.RUNNING:
                # those behind it get no turn in this step
                for later in order[i + 1 :]:
                    if later._joined >= 0:
                        self._stop_decoding(later)
                        self._paused.append(later)
                return False, victims
            request._blocks += self.pool.take(1)
        return True, victims

    def _make_room(self, request: EngineRequest, need: int, now_s: float) -> int:
        """Preempt until `need` blocks are free, or the request itself was preempted."""
        victims = 0
        while need > self.pool.free and request.status == Status.RUNNING:
            self._preempt(max(self._running, key=lambda q: q.rank), now_s)
            victims += 1
        return victims

    def _preempt(self, request: EngineRequest, now_s: float) -> None:
        if request._joined >= 0:
            request.last_token_s = now_s
        self._leave_running(request)
        request._computed = 0
        request.num_preemptions += 1
        self._enqueue(request)
        self._observer.preempted(request, now_s)

    def _enqueue(self, request: EngineRequest) -> None:
        request.status = Status.WAITING
        heapq.heappush(self._waiting, (request.rank, request))
        self.num_waiting += 1

    def _admit(self, budget: int, now_s: float) -> list[tuple[int, int]]:
        """Move waiting requests to the running list while slots, budget and blocks last."""
        costs: list[tuple[int, int]] = []
        while budget > 0 and self.num_waiting and len(self._running) < self.kind.max_num_seqs:
            request = self._waiting[0][1]
            if request.status != Status.WAITING:
                heapq.heappop(self._waiting)
                continue
            total = request.prompt_tokens + request._generated
            hit = self.pool.prefix(request.identity, (total - 1) // self.block_size)
            computed = len(hit) * self.block_size
            tokens = min(total - computed, budget)
            if not self._chunked and tokens < total - computed:
                break
            if self._blocks_for(total) - len(hit) + self.pool.unheld(hit) > self.pool.free:
                break
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            self._running[request] = None
            request.status = Status.RUNNING
            self.pool.hold(hit)
            request._blocks, request._named = hit, len(hit)
            request._computed, request._target = computed, total
            if request.cached_tokens < 0:
                request.cached_tokens, request.first_scheduled_s = computed, now_s
                self._observer.admitted(request, now_s)
            need = self._blocks_for(computed + tokens) - len(hit)
            costs.append(self._give_chunk(request, tokens, need))
            budget -= tokens
        return costs

    def _give_chunk(self, request: EngineRequest, tokens: int, need: int) -> tuple[int, int]:
        """Schedule prompt tokens; return them and their context."""
        request._blocks += self.pool.take(need)
        request._chunk = tokens
        filled = (request._computed + tokens) // self.block_size
        self.pool.name(request._blocks, request.identity, request._named, filled)
        request._named = max(request._named, filled)
        self._chunks.append(request)
        self._partial = request if request._computed + tokens < request._target else None
        return tokens, request._computed

    def _leave_running(self, request: EngineRequest) -> None:
        """Take a request off the running list: name what it filled, then let go."""
        if request._joined >= 0:
            self._stop_decoding(request)
        if self._partial is request:
            self._partial = None
        request._chunk = 0
        del self._running[request]
        filled = request._computed // self.block_size
        self.pool.name(request._blocks, request.identity, request._named, filled)
        self.pool.release(request._blocks)
        request._blocks, request._named = [], 0

    def _start_decoding(self, request: EngineRequest) -> None:
        """Enter a request that decodes from the next step on into the tables."""
        request._joined = self._steps
        self._num_decodes += 1
        self._kv_tokens += request._computed
        self._needy[(self._steps - request._computed) % self.block_size][request] = None
        self._senders[(self._steps - request._generated + 1) % self._interval][request] = None
        end = self._steps + request.output_tokens - request._generated
        self._ends.setdefault(end, {})[request] = None

    def _stop_decoding(self, request: EngineRequest) -> None:
        """Bring a request's token counts up to date and take it out of the tables."""
        steps = self._steps - request._joined
        end = request._joined + request.output_tokens - request._generated
        self._ends[end].pop(request)
        if not self._ends[end]:
            del self._ends[end]
        needy = (request._joined - request._computed) % self.block_size
        del self._needy[needy][request]
        del self._senders[(request._joined - request._generated + 1) % self._interval][request]
        request._computed += steps
        request._generated += steps
        request._joined = -1
        self._num_decodes -= 1
        self._kv_tokens -= request._computed

    def _resume_paused(self) -> None:
        for request in self._paused:
            if request.status == Status.RUNNING:
                self._start_decoding(request)
        self._paused.clear()

    def _end_step(self, now_s: float) -> None:
        """Tokens come out; requests end."""
        self._steps += 1
        self._kv_tokens += self._num_decodes
        chunks, self._chunks = self._chunks, []
        prefill_tokens = sum(q._chunk for q in chunks)
        self._observer.stepped(self._begin_s, now_s, self._num_decodes, prefill_tokens)
        self.outbox |= self._senders[self._steps % self._interval]
        ended = self._ends.get(self._steps)
        if ended:
            # in order of admission, as the running list has them
            for request in [q for q in self._running if q in ended]:
                self._finish(request, now_s)
        self._resume_paused()
        for request in chunks:
            if not request._chunk:  # aborted or preempted since
                continue
            request._computed += request._chunk
            request._chunk = 0
            if request._computed == request._target:
                self._emit_after_prefill(request, now_s)

    def _emit_after_prefill(self, request: EngineRequest, now_s: float) -> None:
        request._generated += 1
        self._observer.emitted(request, now_s)
        if math.isnan(request.first_token_s):
            request.first_token_s = now_s
        request.last_token_s = now_s
        if (request._generated - 1) % self._interval == 0:
            self.outbox[request] = None
        if request._generated == request.output_tokens:
            self._finish(request, now_s)
        else:
            self._start_decoding(request)

    def _finish(self, request: EngineRequest, now_s: float) -> None:
        self._leave_running(request)
        request.status = Status.FINISHED
        self.outbox[request] = None
        self._observer.finished(request, now_s)
