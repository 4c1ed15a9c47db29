"""The way of one request: decide, send, pass the answer through piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import aiohttp
import numpy as np
from aiohttp import web

from servegym.cluster.state import HOLD
from servegym.serve.dispatcher import Dispatcher, Job
from servegym.serve.router.config import RequestConfig
from servegym.serve.router.errors import RequestError, error_body
from servegym.serve.router.health import Health
from servegym.serve.router.stream import Reader
from servegym.serve.router.telemetry import Telemetry
from servegym.typing import BoolArray

_log = logging.getLogger(__name__)

#: Answers that say something about the replica, not the request: another one may do better.
_RETRY_STATUS = frozenset({429, 500, 502, 503, 504})
#: Headers of a client that a replica should see.
_FORWARDED = ("Content-Type", "Accept", "traceparent", "tracestate")
#: Headers of an answer that are about one connection, or that the router sets itself.
_OWN_HEADERS = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "date",
        "server",
        "x-request-id",
    }
)


class UpstreamError(Exception):
    """Raised when a replica fails a request before the first byte of its answer.

    Args:
        cause: For the counters.
        refused: It did not take the connection.
    """

    def __init__(self, cause: str, *, refused: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.refused = refused


class Answer:
    """A replica's answer whose first piece is there."""

    def __init__(self, response: aiohttp.ClientResponse, first: bytes) -> None:
        self.response = response
        self.first = first


class Proxy:
    """Sends requests to replicas and their answers to clients.

    Args:
        config: Limits and times.
        dispatcher: Decides.
        health: Told what failed.
        telemetry: Counts.
        session: To the replicas.
        urls: Of the replicas.
        upstream_key: API key that the replicas want.
    """

    def __init__(
        self,
        config: RequestConfig,
        dispatcher: Dispatcher,
        health: Health,
        telemetry: Telemetry,
        session: aiohttp.ClientSession,
        urls: list[str],
        upstream_key: str | None,
    ) -> None:
        self.config = config
        self._dispatcher = dispatcher
        self._health = health
        self._telemetry = telemetry
        self._session = session
        self._urls = urls
        self._upstream_key = upstream_key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s)

    async def forward(
        self,
        request: web.Request,
        job: Job,
        body: bytes,
        *,
        key: str,
        stream: bool,
        read_s: float,
    ) -> web.StreamResponse:
        """Bring a request to its end, whatever happens to replicas and the client.

        Args:
            request: The client's.
            job: Its place in the books.
            body: Its body, which replicas get as it is.
            key: Its id.
            stream: Whether it asks for a stream.
            read_s: When the body was there, on the dispatcher's clock.

        Raises:
            RequestError: If there is no answer to pass on.
        """
        tried: set[int] = set()
        num_tries = 0
        try:
            while True:
                replica = await self._place(job, tried)
                if num_tries == 0:
                    passed_s = self._dispatcher.clock() - read_s - job.held_s
                    self._telemetry.overhead.observe(passed_s)
                num_tries += 1
                prefill = None if stream else self._assume_prefill(job)
                try:
                    answer = await self._ask(request, replica, body, key)
                except UpstreamError as error:
                    self._failed(replica, error.cause, refused=error.refused)
                    tried.add(replica)
                    if num_tries > self.config.max_retries:
                        raise self._gave_up(error) from None
                    self._telemetry.retries[error.cause] += 1
                    continue
                finally:
                    if prefill is not None:
                        prefill.cancel()
                return await self._relay(request, job, replica, answer, key)
        except asyncio.CancelledError:
            self._end(job, "cancelled")
            raise
        finally:
            self._end(job, "failed")

    def _assume_prefill(self, job: Job) -> asyncio.TimerHandle:
        """Without a stream no one says when the prompt is computed: take the known rate for it."""
        left_s = self._dispatcher.state.prefill_left_s(job.replica)
        loop = asyncio.get_running_loop()
        return loop.call_later(left_s, self._dispatcher.end_prefill, job)

    async def _place(self, job: Job, tried: set[int]) -> int:
        """Decide where a request goes; hold it as long as the policy wants or none is up.

        Raises:
            RequestError: If it is rejected, or no replica takes it in time.
        """
        config, dispatcher = self.config, self._dispatcher
        until_s = job.request.arrival_s + config.max_hold_s
        while True:
            allowed = self._allowed(job, tried)
            may_hold = (
                dispatcher.state.num_held - job.request.held < config.max_held
                and dispatcher.clock() + config.hold_s <= until_s
            )
            if allowed.any():
                decision = dispatcher.decide(job, allowed=allowed, may_hold=may_hold)
                if decision.action >= 0:
                    return decision.action
                if decision.action != HOLD:
                    self._telemetry.outcomes["rejected"] += 1
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

    def _allowed(self, job: Job, tried: set[int]) -> BoolArray:
        """Replicas that are up and have the model; those that failed it only if no other is."""
        state, health = self._dispatcher.state, self._health
        allowed = np.array(
            [state.is_up(r) and health.serves(r, job.model) for r in range(len(self._urls))]
        )
        fresh = allowed.copy()
        fresh[list(tried)] = False
        return fresh if fresh.any() else allowed

    async def _ask(self, request: web.Request, replica: int, body: bytes, key: str) -> Answer:
        """Send a request to a replica and wait for the first byte of the answer's body.

        Raises:
            UpstreamError: If there is none in time, or it is one that another may better.
        """
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(self.config.first_byte_timeout_s):
                response = await self._session.post(
                    self._urls[replica] + request.path,
                    data=body,
                    headers=self._headers(request.headers, key),
                    timeout=self._timeout,
                    allow_redirects=False,
                )
                if response.status in _RETRY_STATUS:
                    raise UpstreamError(f"status_{response.status}")
                first = await response.content.readany()
        except UpstreamError:
            assert response is not None
            response.close()
            raise
        except aiohttp.ClientConnectorError:
            raise UpstreamError("refused", refused=True) from None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if response is not None:
                response.close()
            late = isinstance(error, TimeoutError)
            raise UpstreamError("timeout" if late else "disconnected") from None
        except asyncio.CancelledError:
            if response is not None:
                response.close()
            raise
        if not first and response.status == 200:
            response.close()
            raise UpstreamError("empty")
        return Answer(response, first)

    async def _relay(
        self, request: web.Request, job: Job, replica: int, answer: Answer, key: str
    ) -> web.StreamResponse:
        """Pass an answer through, no piece kept longer than the client needs to take it."""
        upstream, clock = answer.response, self._dispatcher.clock
        is_stream = upstream.content_type == "text/event-stream"
        reader = Reader(is_stream=is_stream, is_chat="chat" in request.path)
        response = web.StreamResponse(
            status=upstream.status, headers=self._answer(upstream, replica, key)
        )
        if upstream.content_length is not None:
            response.content_length = upstream.content_length
        loop = asyncio.get_running_loop()
        writing = False
        self._health.request_succeeded(replica)
        try:
            async with asyncio.timeout(self.config.client_timeout_s) as deadline:
                if is_stream:
                    self._dispatcher.first_token(job)
                    self._telemetry.ttft.observe(clock() - job.request.arrival_s)
                writing = True
                await response.prepare(request)
                piece = answer.first
                while piece:
                    count = reader.feed(piece)
                    if count:
                        self._dispatcher.tokens(job, count)
                    await response.write(piece)
                    writing = False
                    deadline.reschedule(loop.time() + self.config.idle_timeout_s)
                    piece = await upstream.content.readany()
                    writing = True
                    deadline.reschedule(loop.time() + self.config.client_timeout_s)
                broken = reader.failed or (is_stream and not reader.done)
                if not broken:
                    await response.write_eof()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if writing:  # the client's side: it has gone, or takes nothing
                self._end(job, "cancelled")
                _abort(request)
                return response
            broken = True
            cause = "idle" if isinstance(error, TimeoutError) else "broken"
            self._failed(replica, cause, refused=False)
        finally:
            # an answer read to its end gives its connection back; another is cut off, and the
            # engine stops computing it
            if upstream.content.at_eof():
                upstream.release()
            else:
                upstream.close()
        self._close_books(job, upstream.status, reader, broken=broken)
        if broken:
            await self._tell_broken(request, response, is_stream)
        return response

    def _close_books(self, job: Job, status: int, reader: Reader, *, broken: bool) -> None:
        prompt_tokens, _, cached_tokens = reader.usage()
        if prompt_tokens is not None:
            self._dispatcher.usage(job, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
        if broken or status != 200:
            self._end(job, "failed" if broken else "refused")
            return
        self._telemetry.e2e.observe(self._dispatcher.clock() - job.request.arrival_s)
        self._telemetry.outcomes["finished"] += 1
        self._dispatcher.finish(job, reader.output_tokens())

    async def _tell_broken(
        self, request: web.Request, response: web.StreamResponse, is_stream: bool
    ) -> None:
        """Tell a client that its answer is not whole: an error event, and no proper end."""
        if is_stream:
            body = error_body(502, "the replica failed in the middle of the answer", "broken")
            try:
                async with asyncio.timeout(1.0):
                    await response.write(b"\n\ndata: " + body + b"\n\n")
            except (TimeoutError, OSError, aiohttp.ClientError):
                pass
        _abort(request)

    def _end(self, job: Job, status: str) -> None:
        if not job.ended:
            self._telemetry.outcomes[status] += 1
            self._dispatcher.end(job, "cancelled" if status == "cancelled" else "failed")

    def _failed(self, replica: int, cause: str, *, refused: bool) -> None:
        name = self._dispatcher.names[replica]
        self._telemetry.upstream_failures[name, cause] += 1
        # a replica that is full says so with 429; it is well
        if cause != "status_429":
            self._health.request_failed(replica, refused=refused)

    def _gave_up(self, error: UpstreamError) -> RequestError:
        if error.cause == "timeout":
            return RequestError(504, "no replica has answered in time", "upstream_timeout")
        retry_after_s = self.config.retry_after_s
        if error.cause in ("status_429", "status_503"):
            return RequestError(
                503, "the replicas are overloaded", "overloaded", retry_after_s=retry_after_s
            )
        return RequestError(
            502, "no replica could answer", "upstream_failed", retry_after_s=retry_after_s
        )

    def _headers(self, given: Mapping[str, str], key: str) -> dict[str, str]:
        headers = {name: given[name] for name in _FORWARDED if name in given}
        headers.setdefault("Content-Type", "application/json")
        headers["X-Request-Id"] = key
        if self._upstream_key is not None:
            headers["Authorization"] = f"Bearer {self._upstream_key}"
        return headers

    def _answer(
        self, upstream: aiohttp.ClientResponse, replica: int, key: str
    ) -> list[tuple[str, str]]:
        headers = [
            (name, value)
            for name, value in upstream.headers.items()
            if name.lower() not in _OWN_HEADERS and name.lower() != "content-length"
        ]
        headers.append(("X-Request-Id", key))
        if self.config.expose_replica:
            headers.append(("X-Servegym-Replica", self._dispatcher.names[replica]))
        return headers


def _abort(request: web.Request) -> None:
    """Cut a client's connection: an answer that ends properly would pass for a whole one."""
    if request.transport is not None:
        request.transport.abort()
