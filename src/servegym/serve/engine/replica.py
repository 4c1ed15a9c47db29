"""One replica on its own clock: the simulator's engine, step by step, with live arrivals.

The compiled core forms and ends the steps, so a replica does what the simulator's does, to the
last bit of every timestamp. What is added here is what a server sends: of a stretch of decode
steps, which the core plays at once, the tokens of each step at its time.

A decoding request costs nothing at a step that does not end it and sends nothing: its tokens are
those of the step it joined at plus the steps since, and it stands in tables by the steps at which
it sends.
"""

from __future__ import annotations

import math

from servegym.cluster import state as st
from servegym.cluster.spec import ReplicaType, TransferRules
from servegym.errors import ConfigError
from servegym.serve.engine.core import NO_NOISE, EngineCore, Event, Noise
from servegym.serve.engine.request import EngineRequest, Observer, Status

#: Modes of the steps in which decoding requests take part.
_DECODING = (st.DECODE, st.STEP)


class Replica:
    """An engine that is told the time.

    The caller asks `due_s`, and calls `step` when that time has come; it submits and aborts
    requests at times that are not before the last step and not after `due_s`; later ones count as
    just before it, as if the engine stood still then.

    Args:
        kind: Its replica type.
        observer: Told what happens.
        block_size: Tokens in a KV block.
        prefix_caching: Whether KV blocks of equal prefixes are used again.
        chunked_prefill: Whether a prompt may be split over steps.
        speed: Speed factor, 1 is nominal.
        noise: Of step times.
        stream_interval: Tokens between two entries of a request in `outbox`; the first and the
            last token always make one.
        transfers: How KV comes and goes where replicas have roles (`roles`); `None`: it stays.
        other_ends: Types of the replicas that KV comes from.

    Attributes:
        due_s: When the step in progress ends, or the idle engine begins one; infinite without
            work.
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
        noise: Noise = NO_NOISE,
        stream_interval: int = 1,
        transfers: TransferRules | None = None,
        other_ends: tuple[ReplicaType, ...] = (),
    ) -> None:
        if stream_interval < 1:
            raise ConfigError(f"stream_interval must be at least 1, got {stream_interval}")
        self.kind = kind
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.due_s = math.inf
        self.outbox: dict[EngineRequest, None] = {}
        self._core = EngineCore(
            kind,
            block_size=block_size,
            prefix_caching=prefix_caching,
            chunked_prefill=chunked_prefill,
            speed=speed,
            noise=noise,
            transfers=transfers,
            other_ends=other_ends,
        )
        self._observer = observer
        self._interval = stream_interval
        self._steps = 0  # ended, in which decoding requests took part
        self._last_s = 0.0  # end of the latest step
        self._arrival_s = -math.inf  # of the latest request, as the core has it
        self._priority = 0  # of all requests inside, unless the core goes by priorities
        self._clear()

    def _clear(self) -> None:
        self._inside: dict[int, EngineRequest] = {}  # by their places in the core
        self._num_decodes = 0
        self._senders: list[dict[EngineRequest, None]] = [{} for _ in range(self._interval)]
        self._skipped: list[EngineRequest] = []  # decoding, but left out of the step in progress
        self._mode = st.IDLE  # of the step in progress
        self._stalled_s = math.nan  # since when decoding requests wait for others' prefills
        self._ahead = 0  # steps that are ahead in the stretch in progress
        self._times_s: list[float] = []  # when the next of them end but for the first, reversed

    @property
    def num_running(self) -> int:
        """Requests in the running list."""
        return self._core.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the waiting queue."""
        return self._core.num_waiting

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that nobody holds."""
        return self.kind.num_blocks - self._core.held_blocks(self._steps)

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that are held."""
        return 1.0 - self.num_free_blocks / self.kind.num_blocks

    @property
    def capacity_tokens(self) -> int:
        """KV tokens that one request can come to have."""
        return self._core.longest_tokens

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
        if need > self.capacity_tokens:
            raise ConfigError(
                f"the replica holds {self.capacity_tokens} tokens, but prompt and output make "
                f"{need}: shorten the prompt or lower max_tokens"
            )
        self._choose_order(request)
        request.arrival_s, request.status = now_s, Status.WAITING
        # requests of one instant are in order too
        self._arrival_s = max(now_s, math.nextafter(self._arrival_s, math.inf))
        names: list[int] = []
        if self.prefix_caching:
            names = [request.identity(j) for j in range(need // self.block_size)]
        tokens = (
            request.prompt_tokens,
            request.output_tokens,
            request._generated,
            request.cached_tokens,
        )
        key = float(request.priority)
        place = self._core.come(tokens, names, key, self._arrival_s, self._while_in_step(now_s))
        request._place = place
        self._inside[place] = request
        self._foresee()

    def _choose_order(self, request: EngineRequest) -> None:
        """Let vLLM go by priorities as soon as they differ; first come, first served is the same.

        Then it plays as the simulator's `vllm` does, which cuts fewer stretches.
        """
        if self.kind.engine != "vllm":
            return
        if not self._inside:
            self._priority = request.priority
            self._core.follow("vllm")
        elif request.priority != self._priority:
            self._core.follow("vllm-priority")

    def _while_in_step(self, now_s: float) -> float:
        return max(self._last_s, min(now_s, math.nextafter(self.due_s, -math.inf)))

    def abort(self, request: EngineRequest, now_s: float) -> None:
        """Forget a request, wherever it is; its blocks are free at once."""
        if request.status not in (Status.WAITING, Status.RUNNING):
            return
        self._core.abort(request._place, self._while_in_step(now_s))
        self._leave(request, Status.ABORTED)
        self.outbox.pop(request, None)
        self._foresee()

    def fail(self, now_s: float) -> list[EngineRequest]:
        """Lose all requests, the cache and the step in progress; return the requests."""
        self._core.fail(min(now_s, self.due_s))
        lost = list(self._inside.values())
        for request in lost:
            request.status = Status.ABORTED
            self._core.leave(request._place)
        self._clear()
        self._steps = self._core.iteration
        self.outbox.clear()
        self.due_s = math.inf
        return lost

    def speed_up(self, multiplier: float, now_s: float) -> None:
        """Let steps that begin from now on be faster than nominal by a factor."""
        self._core.speed_up(multiplier, min(now_s, self.due_s))
        self._foresee()

    def postpone(self, until_s: float) -> None:
        """Let what is due next be due at another time, and what follows as much later."""
        self._core.postpone(self.due_s, until_s)
        self._foresee()

    def step(self) -> None:
        """Do what is due at `due_s`: end the step in progress, and begin the next one."""
        now_s = self.due_s
        if self._ahead == 1:
            self._turn(now_s)
            return
        self._end_decodes(now_s)
        self._ahead -= 1
        if self._times_s:
            self.due_s = self._times_s.pop()
        else:
            self._foresee()

    def _foresee(self) -> None:
        self._ahead, times_s = self._core.foresee(self._steps)
        self._times_s = times_s[::-1]
        self.due_s = self._times_s.pop() if self._ahead else math.inf

    def _turn(self, now_s: float) -> None:
        """Let the core end its step or stretch, and begin the next."""
        done = self._core.turn()
        if self._mode in _DECODING:
            self._end_decodes(now_s)
        events = [(e, self._inside[e.request]) for e in done.events]
        for event, request in events:
            if event.kind == st.EV_FINISH and request._joined >= 0:
                self._finish(request, now_s)
        for request in self._skipped:
            self._start_decoding(request)
        for place in done.computed:
            self._emit_after_prefill(self._inside[place], now_s)
        self._last_s = now_s
        for event, request in events:
            self._note(event, request)
        self._skipped = [self._inside[place] for place in done.skipped]
        for request in self._skipped:
            self._stop_decoding(request)
        self._mode = done.mode
        if done.mode == st.PREFILL and self._num_decodes and math.isnan(self._stalled_s):
            self._stalled_s = now_s
        self._foresee()

    def _note(self, event: Event, request: EngineRequest) -> None:
        """Take in what happened when the next step was formed."""
        if event.kind == st.EV_ADMIT:
            request.status = Status.RUNNING
            request.cached_tokens, request.first_scheduled_s = int(event.value), event.time_s
            self._observer.admitted(request, event.time_s)
        elif event.kind == st.EV_PREEMPT:
            if request._joined >= 0:
                request.last_token_s = self._latest_token_s(request)
                self._stop_decoding(request)
            request.status = Status.WAITING
            request.num_preemptions += 1
            self._observer.preempted(request, event.time_s)

    def _latest_token_s(self, request: EngineRequest) -> float:
        """Say when a decoding request had its newest token."""
        if math.isnan(self._stalled_s):
            return self._last_s
        return max(self._stalled_s, request.last_token_s)  # some began to decode meanwhile

    def _end_decodes(self, now_s: float) -> None:
        """Tokens of decoding requests come out."""
        if math.isnan(self._stalled_s):
            self._observer.decoded(now_s - self._last_s, self._num_decodes)
        else:
            for table in self._senders:
                for request in table:
                    self._observer.decoded(now_s - self._latest_token_s(request), 1)
            self._stalled_s = math.nan
        self._steps += 1
        self._last_s = now_s
        self.outbox |= self._senders[self._steps % self._interval]

    def _emit_after_prefill(self, request: EngineRequest, now_s: float) -> None:
        request._generated += 1
        request.status = Status.RUNNING
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
        self._core.leave(request._place)
        self._leave(request, Status.FINISHED)
        self.outbox[request] = None
        self._observer.finished(request, now_s)

    def _leave(self, request: EngineRequest, status: Status) -> None:
        if request._joined >= 0:
            self._stop_decoding(request)
        elif request in self._skipped:
            self._skipped.remove(request)
        del self._inside[request._place]
        request.status = status

    def _start_decoding(self, request: EngineRequest) -> None:
        """Enter a request that decodes from the next step on into the tables."""
        request._joined = self._steps
        self._num_decodes += 1
        self._senders[(self._steps - request._generated + 1) % self._interval][request] = None

    def _stop_decoding(self, request: EngineRequest) -> None:
        """Bring a request's token count up to date and take it out of the tables."""
        del self._senders[(request._joined - request._generated + 1) % self._interval][request]
        request._generated += self._steps - request._joined
        request._joined = -1
        self._num_decodes -= 1
