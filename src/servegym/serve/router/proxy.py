"""The way of one request: decide, send, and pass the answer on or try another replica."""

from __future__ import annotations

import asyncio
import math

from servegym.serve.dispatcher import Dispatcher, Job
from servegym.serve.router.books import Books, Failures
from servegym.serve.router.client import ID_HEADER, Request
from servegym.serve.router.config import RequestConfig
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.errors import RequestError
from servegym.serve.router.headers import HeaderFilter, returned
from servegym.serve.router.health import Health
from servegym.serve.router.line import Line, Waiting
from servegym.serve.router.relay import Relay, answer_pairs
from servegym.serve.router.reply import Reply
from servegym.serve.router.retry_budget import RetryBudget
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import Exchange, Pool, UpstreamError, ask
from servegym.typing import BoolArray


class Proxy:
    """Sends requests to replicas and their answers to clients.

    Args:
        config: Limits and times.
        dispatcher: Decides.
        health: Told what becomes of requests.
        telemetry: Counts.
        upstream_key: API key that the replicas want.
    """

    def __init__(
        self,
        config: RequestConfig,
        dispatcher: Dispatcher,
        health: Health,
        telemetry: Telemetry,
        upstream_key: str | None,
    ) -> None:
        self.config = config
        self._dispatcher = dispatcher
        self._health = health
        self._ejection = health.ejection
        self._telemetry = telemetry
        self._pools: dict[int, Pool] = {}
        self._upstream_key = upstream_key
        self._filter = HeaderFilter(config.forward_headers)
        self._line = Line()
        self._budget = RetryBudget(config.retry_share, config.retry_reserve, dispatcher.clock)
        self._books = Books(dispatcher, health, telemetry)
        # between two pieces of an answer no deadline is nearer than this
        self._patience_s = min(config.stall_timeout_s, config.client_timeout_s)

    def close(self) -> None:
        """End idle connections to replicas."""
        for pool in self._pools.values():
            pool.close()

    def add(self, replica: int, url: str) -> None:
        """A replica has joined.

        Args:
            replica: Its slot.
            url: Of its server.
        """
        self._pools[replica] = Pool(url, self.config.connect_timeout_s, self._dispatcher.clock)

    def remove(self, replica: int) -> None:
        """A replica has gone, after its last request."""
        self._pools.pop(replica).close()

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
        self._budget.request()
        try:
            while True:
                replica = await self._place(job, tried, stream=stream)
                if not failures:
                    passed_s = self._dispatcher.clock() - read_s - job.held_s
                    self._telemetry.overhead.observe(passed_s)
                attempt = self._ejection.begin(replica, stream=stream)
                prefill = None if stream else self._assume_prefill(job)
                try:
                    pool = self._pools[replica]
                    head = self._first_line(pool, request, path) + headers
                    first_token_s, patience_s = self._first_token_s(attempt), self._patience_s
                    exchange = await ask(
                        pool, head, body, first_token_s=first_token_s, patience_s=patience_s
                    )
                    try:
                        return await self._pass_on(request, job, attempt, exchange, failures)
                    finally:
                        exchange.close()
                except UpstreamError as error:
                    failures.append((attempt, error))
                    self._note(attempt, error)
                finally:
                    self._ejection.end(attempt)
                    self._line.call()
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
    ) -> int:
        """Pass an answer through; return its status."""
        head = exchange.head
        assert head is not None
        name = self._dispatcher.names[attempt.replica] if self.config.expose_replica else ""
        relay = Relay(self.config, self._books, request, job, attempt, exchange, failures)
        relay.start(answer_pairs(head.fields.pairs, request.key, name))
        if not relay.done.done():
            await relay.done
        return head.status

    def _assume_prefill(self, job: Job) -> asyncio.TimerHandle:
        """Without a stream no one says when the prompt is computed: take the known rate for it."""
        left_s = self._dispatcher.state.prefill_left_s(job.replica)
        loop = asyncio.get_running_loop()
        return loop.call_later(left_s, self._dispatcher.end_prefill, job)

    async def _place(self, job: Job, tried: set[int], *, stream: bool) -> int:
        """Decide where a request goes; hold it as long as the policy wants or none is up.

        Raises:
            RequestError: If it is rejected, or no replica takes it in time.
        """
        config, dispatcher, clock = self.config, self._dispatcher, self._dispatcher.clock
        until_s = job.request.arrival_s + config.max_hold_s
        level = dispatcher.config.slo_classes[job.request.slo_class]
        waiting = Waiting(level.priority, job.request.arrival_s, job.model)
        try:
            while True:
                allowed = self._allowed(job, tried, stream=stream)
                may_hold = (
                    dispatcher.state.num_held - job.request.held < config.max_held
                    and clock() + config.hold_s <= until_s
                )
                # what has been at a replica before need not stand in line again
                is_decided = allowed.any() and (bool(tried) or self._line.may_go(waiting))
                if is_decided:
                    dispatcher.decide(job, allowed=allowed, may_hold=may_hold)
                    if job.replica >= 0:
                        return job.replica
                    if not job.request.held:
                        self._telemetry.outcomes["rejected"] += 1
                        message = "the fleet is too busy for this request: come again later"
                        raise self._come_again(429, message, "overloaded")
                elif may_hold:
                    dispatcher.wait(job)
                elif self._serving(job).any():
                    message = "all replicas are full, and others wait: come again later"
                    raise self._come_again(429, message, "overloaded")
                else:
                    message = "no replica takes requests now: come again later"
                    raise self._come_again(503, message, "no_replica")
                begin_s = clock()
                if is_decided:  # the policy's will
                    self._line.leave(waiting)
                    await asyncio.sleep(config.hold_s)
                else:
                    # many that wait for a replica to come up need not all look so often
                    pause_s = config.hold_s * (1.0 + dispatcher.state.num_held / 20.0)
                    await self._line.wait(waiting, min(1.0, pause_s))
                job.held_s += clock() - begin_s
        finally:
            self._line.leave(waiting)

    def _come_again(self, status: int, message: str, code: str) -> RequestError:
        return RequestError(status, message, code, retry_after_s=self.config.retry_after_s)

    def _serving(self, job: Job) -> BoolArray:
        """Replicas that are up and have the model, `bool[W]`."""
        return self._dispatcher.state.up & self._health.serving(job.model)

    def _allowed(self, job: Job, tried: set[int], *, stream: bool) -> BoolArray:
        """Replicas that are up, have the model, and room; the others if there is no better one.

        Worse are those that say they are full, newcomers that have their share, and to an answer
        that is not streamed, those that have stopped talking: no one would notice that they still
        do not. Those that have failed the request are the last.
        """
        allowed = self._serving(job)
        if self.config.max_load is not None:
            allowed &= self._dispatcher.state.has_room(self.config.max_load)
        worse = self._ejection.passed_over(stream=stream)
        worse += self._health.slow_start.held_back(allowed)
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
        self._books.end(job, "refused" if error.is_full else "failed")
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
        if request.fields.get("content-type") is None:
            headers.append(("Content-Type", "application/json"))
        headers.append((ID_HEADER, request.key))
        if self._upstream_key is not None:
            headers.append(("Authorization", f"Bearer {self._upstream_key}"))
        headers.append(("Content-Length", str(length)))
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        return f"{lines}\r\n".encode("utf-8", "surrogateescape")
