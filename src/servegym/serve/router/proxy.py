"""The way of a request once it is placed: send it, pass the answer on or try another replica."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from servegym.serve.router.client import ID_HEADER, Request
from servegym.serve.router.config import DisaggregationConfig, RequestConfig
from servegym.serve.router.disaggregation import Params
from servegym.serve.router.errors import RequestError
from servegym.serve.router.handover import Handover, only_prefilled
from servegym.serve.router.headers import CONTEXT_HEADERS, HeaderFilter, returned
from servegym.serve.router.placement import DividedPlacement, MovingPlacement, Placement, Seat
from servegym.serve.router.relay import Relay, answer_pairs
from servegym.serve.router.reply import Reply
from servegym.serve.router.requeue import RequeuedError, ask_or_move
from servegym.serve.router.upstream import Exchange, Pool, UpstreamError, ask

if TYPE_CHECKING:
    from servegym.serve.router.tracing import AttemptTrace, Trace


class Proxy:
    """Sends requests to replicas and their answers to clients.

    Args:
        config: Limits and times.
        clock: Seconds that never go back.
        upstream_key: API key that the replicas want.
        split: How two replicas do a request.
    """

    def __init__(
        self,
        config: RequestConfig,
        clock: Callable[[], float],
        upstream_key: str | None,
        split: DisaggregationConfig | None = None,
    ) -> None:
        self.config = config
        self._clock = clock
        self._pools: dict[str, Pool] = {}  # by URL of the replica
        self._upstream_key = upstream_key
        self._filter = HeaderFilter(config.forward_headers)
        self._handover = Handover(split or DisaggregationConfig(), self._pool, clock)
        # between two pieces of an answer no deadline is nearer than this
        self._patience_s = min(config.stall_timeout_s, config.client_timeout_s)

    def close(self) -> None:
        """End idle connections to replicas."""
        for pool in self._pools.values():
            pool.close()

    async def forward(
        self,
        request: Request,
        placement: Placement,
        seat: Seat,
        path: str,
        body: bytes,
        *,
        stream: bool,
    ) -> Reply | int:
        """Bring a request to its end, whatever happens to replicas and the client.

        Args:
            request: The client's.
            placement: Decides where it goes if its first replica fails it.
            seat: Where it goes first.
            path: Of the endpoint.
            body: Its body, which replicas get as it is.
            stream: Whether it asks for a stream.

        Returns:
            What to tell the client, or the status of the answer that it has got.

        Raises:
            RequestError: If there is no answer to pass on.
        """
        errors: list[UpstreamError] = []
        headers = self._headers(request, len(body))
        trace = request.trace
        params: Params = None  # of a prefill that is over
        requeue = self.config.requeue
        while True:
            request.replica = seat.name
            pool = self._pool(seat.url)
            head = self._first_line(pool, request, path)
            sent: AttemptTrace | None = None
            if trace is not None:
                sent = trace.attempt(seat.name, pool.place, len(errors))
                head += sent.head
            told = body
            if seat.apart is None:
                head += headers
            else:
                told, line = await self._handover.part(seat.apart, body, params)
                head += line + self._headers(request, len(told))
            first_token_s, patience_s = seat.first_token_s, self._patience_s
            asking = ask(pool, head, told, first_token_s=first_token_s, patience_s=patience_s)
            try:
                if seat.apart is not None and self._handover.takes_two(seat.apart):
                    other = self._first_line(self._pool(seat.apart.url), request, path)
                    other += self._headers(request, len(told))
                    exchange = await self._handover.ask_both(asking, placement, seat, other, told)
                elif requeue is not None and stream and seat.apart is None:
                    moving = cast(MovingPlacement, placement)
                    exchange = await ask_or_move(asking, moving, requeue.after_s)
                else:
                    exchange = await asking
                try:
                    if only_prefilled(seat, exchange):
                        done = await self._handover.end_prefill(exchange, seat)
                        if sent is not None:
                            sent.answered(200, "", exchange.reader, math.nan)
                        params = done.params
                        seat = await cast(DividedPlacement, placement).prefilled(done.cached_tokens)
                        continue
                    return await self._pass_on(request, placement, seat, exchange, sent, stream)
                finally:
                    exchange.close()
            except RequeuedError as moved:
                if sent is not None:
                    sent.end("requeued")
                seat = moved.seat
                continue
            except UpstreamError as error:
                errors.append(error)
                if sent is not None:
                    sent.end(error.cause, error.refusal.status if error.refusal else None)
            finally:
                if sent is not None:
                    sent.end("cancelled")  # unless it has ended otherwise
            if not await placement.failed(errors[-1]):
                return self._give_up(placement, errors)
            seat, params = await place(placement, trace), None

    async def _pass_on(
        self,
        request: Request,
        placement: Placement,
        seat: Seat,
        exchange: Exchange,
        sent: AttemptTrace | None,
        stream: bool,
    ) -> int:
        """Pass an answer through; return its status."""
        head = exchange.head
        assert head is not None
        name = seat.name if self.config.expose_replica else ""
        whole_by_s = math.inf
        if not stream and self.config.answer_timeout_s is not None:
            whole_by_s = seat.dispatch_s + self.config.answer_timeout_s
        relay = Relay(self.config, self._clock, request, placement, exchange, whole_by_s)
        relay.start(answer_pairs(head.fields.pairs, request.key, name))
        try:
            if not relay.done.done():
                await relay.done
        finally:  # an answer that breaks off ends the client's connection, and so this task
            if sent is not None and relay.done.done() and not relay.done.cancelled():
                first_s = relay.first_token_s - seat.dispatch_s
                sent.answered(head.status, relay.cause, exchange.reader, first_s)
        return head.status

    def _pool(self, url: str) -> Pool:
        """Return the connections to a replica; those to replicas that have gone are let go."""
        pool = self._pools.get(url)
        if pool is None:
            for other in [place for place, known in self._pools.items() if known.is_empty]:
                del self._pools[other]
            pool = self._pools[url] = Pool(url, self.config.connect_timeout_s, self._clock)
        return pool

    def _give_up(self, placement: Placement, errors: list[UpstreamError]) -> Reply:
        """Pass on what a replica said, in its own words if it said something.

        Raises:
            RequestError: If none did.
        """
        error = next((e for e in reversed(errors) if e.refusal), errors[-1])
        retry_after_s = self.config.retry_after_s
        if error.refusal is None:
            if error.cause == "timeout":
                raise RequestError(504, "no replica has answered in time", "upstream_timeout")
            raise RequestError(
                502, "no replica could answer", "upstream_failed", retry_after_s=retry_after_s
            )
        status, given, body = error.refusal
        placement.end("refused" if error.is_full else "failed")
        if not body:
            after_s = retry_after_s if error.is_full else None
            message = "the replica gave no reason"
            return RequestError(status, message, "upstream_failed", retry_after_s=after_s).reply()
        headers = returned(given)
        if error.is_full and not any(name.lower() == "retry-after" for name, _ in headers):
            headers.append(("Retry-After", str(max(1, math.ceil(retry_after_s)))))
        return Reply(status, body, headers)

    def _first_line(self, pool: Pool, request: Request, path: str) -> bytes:
        """Write the first line of a request and what is the replica's own."""
        query = request.head.query if self.config.forward_query else ""
        target = f"{pool.prefix}{path}?{query}" if query else pool.prefix + path
        text = f"POST {target} HTTP/1.1\r\nHost: {pool.host}\r\n"
        if pool.authorization is not None and self._upstream_key is None:
            text += f"Authorization: {pool.authorization}\r\n"
        return text.encode("utf-8", "surrogateescape")

    def _headers(self, request: Request, length: int) -> bytes:
        """Write the rest of the head, which is the same for all replicas."""
        headers = self._filter.forwarded(request.fields.pairs)
        if request.trace is not None:  # each attempt has a context of its own
            headers = [pair for pair in headers if pair[0].lower() not in CONTEXT_HEADERS]
        if request.fields.get("content-type") is None:
            headers.append(("Content-Type", "application/json"))
        headers.append((ID_HEADER, request.key))
        if self._upstream_key is not None:
            headers.append(("Authorization", f"Bearer {self._upstream_key}"))
        headers.append(("Content-Length", str(length)))
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        return f"{lines}\r\n".encode("utf-8", "surrogateescape")


async def place(placement: Placement, trace: Trace | None) -> Seat:
    """Let a request be placed; its trace gets what was decided, whatever that was.

    Raises:
        RequestError: See `Placement.place`.
    """
    try:
        return await placement.place()
    finally:
        if trace is not None:
            trace.decided(placement.explained())
