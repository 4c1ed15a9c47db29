"""Passing an answer through piece by piece, and what it says of the replica."""

from __future__ import annotations

import asyncio
import math

import aiohttp
from aiohttp import web

from servegym.serve.dispatcher import Dispatcher, Job
from servegym.serve.router.config import RequestConfig
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.errors import error_body
from servegym.serve.router.headers import returned
from servegym.serve.router.health import Health
from servegym.serve.router.patience import Patience
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import Answer, UpstreamError

#: Failures of a request before its answer had begun, in order.
Failures = list[tuple[Attempt, UpstreamError]]


class Relay:
    """Passes answers on and closes the books.

    Args:
        config: Times.
        dispatcher: Keeps the books.
        health: Told what becomes of requests.
        telemetry: Counts.
    """

    def __init__(
        self, config: RequestConfig, dispatcher: Dispatcher, health: Health, telemetry: Telemetry
    ) -> None:
        self.config = config
        self._dispatcher = dispatcher
        self._ejection = health.ejection
        self._telemetry = telemetry

    async def pass_on(
        self,
        request: web.Request,
        job: Job,
        attempt: Attempt,
        answer: Answer,
        key: str,
        failures: Failures,
    ) -> web.StreamResponse:
        """Pass an answer through, no piece kept longer than the client needs to take it.

        Args:
            request: The client's.
            job: Its place in the books.
            attempt: At the replica that answers.
            answer: What the replica sends.
            key: Id of the request.
            failures: Of the replicas asked before; judged once the answer has come.
        """
        (upstream, reader, piece), clock = answer, self._dispatcher.clock
        dispatcher, client_s = self._dispatcher, self.config.client_timeout_s
        stall_s = self.config.stall_timeout_s if reader.is_stream else math.inf
        response = web.StreamResponse(
            status=upstream.status, headers=self._answer_headers(upstream, attempt.replica, key)
        )
        if upstream.content_length is not None:
            response.content_length = upstream.content_length
        whole_by_s = math.inf
        if not attempt.stream and self.config.answer_timeout_s is not None:
            whole_by_s = attempt.dispatch_s + self.config.answer_timeout_s
        count, now_s = reader.num_tokens, clock()
        token_s = now_s
        begun = writing = False
        cause = ""
        try:
            async with Patience(clock, min(stall_s, client_s)) as patience:
                patience.due_s = now_s + client_s
                if reader.begun:
                    begun = self._begin(job, attempt, failures)
                writing = True
                await response.prepare(request)
                while piece:
                    if count:
                        if not begun:
                            begun = self._begin(job, attempt, failures)
                        dispatcher.tokens(job, count)
                        attempt.has_got(now_s)
                    await response.write(piece)
                    writing = False
                    if reader.done and not reader.failed and upstream.status == 200:
                        dispatcher.answered(job)
                    now_s = clock()
                    if count:
                        token_s = now_s  # what the client took to take it is no stall
                    if begun:
                        attempt.waits(now_s)
                    patience.due_s = min(token_s + stall_s, whole_by_s)
                    piece = await upstream.content.readany()
                    writing = True
                    now_s = clock()
                    patience.due_s = now_s + client_s
                    count = reader.feed(piece)
                count = reader.close()
                if count:
                    dispatcher.tokens(job, count)
                if not reader.whole and reader.is_stream:
                    cause = "error_event" if reader.failed else "cut"
                else:
                    await response.write_eof()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if writing:  # the client's side: it has gone, or takes nothing
                self.end(job, "cancelled")
                _abort(request)
                return response
            if not reader.done:  # else only the end of the connection is missing
                cause = "stall" if isinstance(error, TimeoutError) else "broken"
        finally:
            # an answer read to its end gives its connection back; another is cut off, and the
            # engine stops computing it
            if upstream.content.at_eof():
                upstream.release()
            else:
                upstream.close()
        if cause:
            self._broke(attempt, cause, token_s, reader.error_status)
        self._close_books(job, attempt, answer, failures, broken=bool(cause))
        if cause:
            # what the engine has said itself need not be said again
            await self._tell_broken(request, response, say=reader.is_stream and not reader.failed)
        return response

    def _begin(self, job: Job, attempt: Attempt, failures: Failures) -> bool:
        """The first token of a stream has come."""
        self._answered(attempt, failures)
        self._dispatcher.first_token(job)
        self._telemetry.ttft.observe(self._dispatcher.clock() - job.request.arrival_s)
        return True

    def _broke(self, attempt: Attempt, cause: str, token_s: float, status: int) -> None:
        """An answer broke off: whose fault is it?"""
        self._telemetry.upstream_failures[self._dispatcher.names[attempt.replica], cause] += 1
        moved = cause == "stall" and attempt.standing.last_token_s > token_s
        theirs = cause == "error_event" and status < 500
        if not moved and not theirs:
            self._ejection.failed(attempt, hung=cause == "stall")

    def _close_books(
        self, job: Job, attempt: Attempt, answer: Answer, failures: Failures, *, broken: bool
    ) -> None:
        reader, status = answer.reader, answer.response.status
        prompt_tokens, _, cached_tokens = reader.usage()
        if prompt_tokens is not None:
            self._dispatcher.usage(job, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
        if broken or (status == 200 and reader.failed):
            self.end(job, "failed")
            return
        if status != 200:
            self.end(job, "refused")  # says nothing about the replica
            return
        if not attempt.begun:
            self._answered(attempt, failures)
        self._ejection.whole(attempt)
        self._telemetry.e2e.observe(self._dispatcher.clock() - job.request.arrival_s)
        self._telemetry.outcomes["finished"] += 1
        self._dispatcher.finish(job, reader.output_tokens())

    async def _tell_broken(
        self, request: web.Request, response: web.StreamResponse, *, say: bool
    ) -> None:
        """Tell a client that its answer is not whole: an error event, and no proper end."""
        if say:
            body = error_body(502, "the replica failed in the middle of the answer", "broken")
            try:
                async with asyncio.timeout(1.0):
                    await response.write(b"\n\ndata: " + body + b"\n\n")
            except (TimeoutError, OSError, aiohttp.ClientError):
                pass
        _abort(request)

    def _answered(self, attempt: Attempt, failures: Failures) -> None:
        """A request has its answer: now it is known that those who failed it were at fault."""
        self._ejection.first_token(attempt)
        for failed, error in failures:
            late = error.cause == "timeout"
            if error.is_full or error.cause == "refused" or (late and failed.replica_has_moved):
                continue  # full, down, or only slow
            self._ejection.failed(failed, hung=late)
        failures.clear()

    def end(self, job: Job, status: str) -> None:
        """Close the books of a request that did not get its answer; does nothing the second time.

        Args:
            job: Of the request.
            status: For the counters; only the client's leaving is another matter to the log.
        """
        if not job.ended:
            self._telemetry.outcomes[status] += 1
            self._dispatcher.end(job, "cancelled" if status == "cancelled" else "failed")

    def _answer_headers(
        self, upstream: aiohttp.ClientResponse, replica: int, key: str
    ) -> list[tuple[str, str]]:
        headers = returned(upstream.headers.items())
        headers.append(("X-Request-Id", key))
        if self.config.expose_replica:
            headers.append(("X-Servegym-Replica", self._dispatcher.names[replica]))
        return headers


def _abort(request: web.Request) -> None:
    """Cut a client's connection: an answer that ends properly would pass for a whole one."""
    if request.transport is not None:
        request.transport.abort()
