"""The way of one request: decide, send, and pass the answer on or try another replica."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import numpy as np

from servegym.serve.dispatcher import Dispatcher, Job
from servegym.serve.router.books import Books, Failures
from servegym.serve.router.client import ID_HEADER, Request
from servegym.serve.router.config import RequestConfig
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.errors import RequestError
from servegym.serve.router.headers import CONTEXT_HEADERS, HeaderFilter, returned
from servegym.serve.router.health import Health
from servegym.serve.router.relay import Relay, answer_pairs
from servegym.serve.router.reply import Reply
from servegym.serve.router.retry_budget import RetryBudget
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import Exchange, Pool, UpstreamError, ask
from servegym.typing import BoolArray

if TYPE_CHECKING:
    from servegym.serve.router.tracing import AttemptTrace, Trace


class Proxy:
    """Sends requests to replicas and their answers to clients.

    Args:
        config: Limits and times.
        dispatcher: Decides.
        health: Told what becomes of requests.
        telemetry: Counts.
        urls: Of the replicas.
        upstream_key: API key that the replicas want.
    """

    def __init__(
        self,
        config: RequestConfig,
        dispatcher: Dispatcher,
        health: Health,
        telemetry: Telemetry,
        urls: list[str],
        upstream_key: str | None,
    ) -> None:
        self.config = config
        self._dispatcher = dispatcher
        self._health = health
        self._ejection = health.ejection
        self._telemetry = telemetry
        self._pools = [Pool(url, config.connect_timeout_s, dispatcher.clock) for url in urls]
        self._upstream_key = upstream_key
        self._filter = HeaderFilter(config.forward_headers)
        self._budget = RetryBudget(config.retry_share, config.retry_reserve, dispatcher.clock)
        self._books = Books(dispatcher, health, telemetry)
        # between two pieces of an answer no deadline is nearer than this
        self._patience_s = min(config.stall_timeout_s, config.client_timeout_s)

    def close(self) -> None:
        """End idle connections to replicas."""
        for pool in self._pools:
            pool.close()

    async def forward(
        self, request: Request, job: Job, path: str, body: bytes, *, stream: bool, read_s: float
    ) -> Reply | int:
        """Bring a request to its end, whatever happens to replicas and the client.

        Args:
            request: The client's.
            job: Its place in the books.
            path: Of the endpoint.
            body: Its body, which replicas get as it is.
            stream: Whether it asks for a stream.
            read_s: When the body was there, on the dispatcher's clock.

        Returns:
            What to tell the client, or the status of the answer that it has got.

        Raises:
            RequestError: If there is no answer to pass on.
        """
        failures: Failures = []
        tried: set[int] = set()
        headers = self._headers(request, len(body))
        trace = request.trace
        self._budget.request()
        try:
            while True:
                replica = await self._place(job, tried, trace, stream=stream)
                request.replica = self._dispatcher.names[replica]
                if not failures:
                    passed_s = self._dispatcher.clock() - read_s - job.held_s
                    self._telemetry.overhead.observe(passed_s)
                    self._books.dispatched(job, replica)
                attempt = self._ejection.begin(replica, stream=stream)
                prefill = None if stream else self._assume_prefill(job)
                sent: AttemptTrace | None = None
                try:
                    pool = self._pools[replica]
                    first_line = self._first_line(pool, request, path)
                    if trace is not None:
                        sent = trace.attempt(request.replica, pool.place, len(failures))
                        first_line += sent.head
                    head = first_line + headers
                    first_token_s, patience_s = self._first_token_s(attempt), self._patience_s
                    exchange = await ask(
                        pool, head, body, first_token_s=first_token_s, patience_s=patience_s
                    )
                    try:
                        return await self._pass_on(request, job, attempt, exchange, failures, sent)
                    finally:
                        exchange.close()
                except UpstreamError as error:
                    failures.append((attempt, error))
                    self._note(attempt, error)
                    if sent is not None:
                        sent.end(error.cause, error.refusal.status if error.refusal else None)
                finally:
                    if sent is not None:
                        sent.end("cancelled")  # unless it has ended otherwise
                    self._ejection.end(attempt)
                    if prefill is not None:
                        prefill.cancel()
                tried.add(replica)
                if not self._may_try_again(job, failures, tried, stream=stream):
                    return self._give_up(job, failures)
                self._telemetry.retries[failures[-1][1].cause] += 1
        except asyncio.CancelledError:
            self._books.end(job, "cancelled")
            raise
        finally:
            self._books.end(job, "failed")

    async def _pass_on(
        self,
        request: Request,
        job: Job,
        attempt: Attempt,
        exchange: Exchange,
        failures: Failures,
        sent: AttemptTrace | None,
    ) -> int:
        """Pass an answer through; return its status."""
        head = exchange.head
        assert head is not None
        name = self._dispatcher.names[attempt.replica] if self.config.expose_replica else ""
        relay = Relay(self.config, self._books, request, job, attempt, exchange, failures)
        relay.start(answer_pairs(head.fields.pairs, request.key, name))
        try:
            if not relay.done.done():
                await relay.done
        finally:  # an answer that breaks off ends the client's connection, and so this task
            if sent is not None and relay.done.done() and not relay.done.cancelled():
                first_s = job.request.first_token_s - attempt.dispatch_s
                sent.answered(head.status, relay.cause, exchange.reader, first_s)
        return head.status

    def _assume_prefill(self, job: Job) -> asyncio.TimerHandle:
        """Without a stream no one says when the prompt is computed: take the known rate for it."""
        left_s = self._dispatcher.state.prefill_left_s(job.replica)
        loop = asyncio.get_running_loop()
        return loop.call_later(left_s, self._dispatcher.end_prefill, job)

    async def _place(self, job: Job, tried: set[int], trace: Trace | None, *, stream: bool) -> int:
        """Decide where a request goes; hold it as long as the policy wants or none is up.

        Raises:
            RequestError: If it is rejected, or no replica takes it in time.
        """
        config, dispatcher = self.config, self._dispatcher
        until_s = job.request.arrival_s + config.max_hold_s
        while True:
            allowed = self._allowed(job, tried, stream=stream)
            may_hold = (
                dispatcher.state.num_held - job.request.held < config.max_held
                and dispatcher.clock() + config.hold_s <= until_s
            )
            if allowed.any():
                if trace is not None and trace.sampled:
                    self._decide_seen(job, allowed, trace, len(tried), may_hold=may_hold)
                else:
                    dispatcher.decide(job, allowed=allowed, may_hold=may_hold)
                if job.replica >= 0:
                    return job.replica
                if not job.request.held:
                    self._books.rejected(job)
                    raise RequestError(
                        429,
                        "the fleet is too busy for this request: come again later",
                        "overloaded",
                        retry_after_s=config.retry_after_s,
                    )
            elif may_hold:
                dispatcher.wait(job)
            else:
                raise RequestError(
                    503,
                    "no replica takes requests now: come again later",
                    "no_replica",
                    retry_after_s=config.retry_after_s,
                )
            # many that wait for a replica to come up need not all look so often
            pause_s = config.hold_s
            if not allowed.any():
                pause_s = min(1.0, pause_s * (1.0 + dispatcher.state.num_held / 20.0))
            await asyncio.sleep(pause_s)
            job.held_s += pause_s

    def _decide_seen(
        self, job: Job, allowed: BoolArray, trace: Trace, attempts: int, *, may_hold: bool
    ) -> None:
        """Decide, and leave a span that says among whom, and why."""
        dispatcher = self._dispatcher
        candidates = np.flatnonzero(allowed).tolist()
        outstanding = [dispatcher.state.outstanding(r) for r in candidates]
        decision = dispatcher.decide(job, allowed=allowed, may_hold=may_hold, with_scores=True)
        loaded = dispatcher.runtime.loaded
        trace.decided(
            decision,
            dispatcher.names,
            candidates,
            outstanding,
            policy=loaded.version if loaded else "none",
            attempts=attempts,
        )

    def _allowed(self, job: Job, tried: set[int], *, stream: bool) -> BoolArray:
        """Replicas that are up and have the model; the others if there is no better one.

        Worse are those that say they are full, and to an answer that is not streamed, those that
        have stopped talking: no one would notice that they still do not. Those that have failed
        the request are the last.
        """
        allowed = self._dispatcher.state.up & self._health.serving(job.model)
        worse = self._ejection.passed_over(stream=stream)
        if not worse and not tried:
            return allowed
        for avoided in ({*tried, *worse}, tried) if worse else (tried,):
            left = allowed.copy()
            left[list(avoided)] = False
            if left.any():
                return left
        return allowed

    def _first_token_s(self, attempt: Attempt) -> float | None:
        """How long an answer may take to begin."""
        if not attempt.stream:
            return self.config.answer_timeout_s
        if attempt.is_trial:
            return min(self._ejection.trial_s, self.config.first_byte_timeout_s)
        return self.config.first_byte_timeout_s

    def _note(self, attempt: Attempt, error: UpstreamError) -> None:
        """Note that a replica failed a request; what that says is seen when another answers it."""
        replica = attempt.replica
        self._telemetry.upstream_failures[self._dispatcher.names[replica], error.cause] += 1
        if error.cause == "refused":
            self._health.refused(replica)
        elif error.is_full:
            self._ejection.busy(replica, error.retry_after_s)
        elif attempt.is_trial and error.cause == "timeout" and not attempt.replica_has_moved:
            self._ejection.failed(attempt, hung=True)

    def _may_try_again(
        self, job: Job, failures: Failures, tried: set[int], *, stream: bool
    ) -> bool:
        error = failures[-1][1]
        if len(failures) > self.config.max_retries or (error.cause == "timeout" and not stream):
            return False
        if error.of_connection:
            return True
        denied: str | None = None
        if sum(e.refusal is not None and not e.is_full for _, e in failures) > 1:
            denied = "request"  # two replicas say so: it is the request
        elif self._allowed(job, tried, stream=stream)[list(tried)].any():
            denied = "replicas"  # there is no other
        elif not self._budget.take(self._telemetry.in_flight):
            denied = "budget"
        if denied is not None:
            self._telemetry.retries_denied[denied] += 1
        return denied is None

    def _give_up(self, job: Job, failures: Failures) -> Reply:
        """Pass on what a replica said, in its own words if it said something.

        Raises:
            RequestError: If none did.
        """
        error = next((e for _, e in reversed(failures) if e.refusal), failures[-1][1])
        retry_after_s = self.config.retry_after_s
        if error.refusal is None:
            if error.cause == "timeout":
                raise RequestError(504, "no replica has answered in time", "upstream_timeout")
            raise RequestError(
                502, "no replica could answer", "upstream_failed", retry_after_s=retry_after_s
            )
        status, given, body = error.refusal
        self._books.end(job, "refused" if error.is_full else "failed", full=error.is_full)
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
