"""From a request, as a gateway shows it, to the endpoints that it may go to."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import numpy as np

from servegym.policy.contract import OUTSTANDING_REQUESTS
from servegym.serve.dispatcher import Dispatcher, Job
from servegym.serve.picker.config import PickerConfig, endpoint_of
from servegym.serve.requests.prompt import Prompt
from servegym.serve.router.books import Books
from servegym.serve.router.errors import RequestError
from servegym.serve.router.health import Health
from servegym.serve.router.request import read_request
from servegym.serve.router.telemetry import Telemetry
from servegym.typing import BoolArray

#: Paths whose requests are read, booked and decided about, and whether they are chats.
_INFERENCE = {"/v1/completions": False, "/v1/chat/completions": True}
_EVERYONE = "default"
#: Larger bodies are read in a thread.
_LARGE_BYTES = 64 * 1024


class Asking(NamedTuple):
    """What is known of a request before it is decided about.

    Attributes:
        path: Without the query string.
        fields: Its headers, by name in lower case.
        body: All of it; `None` if the gateway does not send it, or there is none.
        subset: Endpoints among which to choose; `None`: all.
    """

    path: str
    fields: Mapping[str, str]
    body: bytes | None
    subset: Sequence[str] | None


class Read(NamedTuple):
    """What has been read of an inference request."""

    prompt: Prompt
    max_tokens: int | None
    model: str
    stream: bool
    slo_class: str | None
    session: str | None


class Placed(NamedTuple):
    """Where a request goes.

    Attributes:
        endpoints: The chosen one, then those for retries.
        job: Its books; `None` for what is no inference.
        stream: Whether it asks for a stream.
    """

    endpoints: Sequence[str]
    job: Job | None
    stream: bool


class Placer:
    """Decides for gateways' requests.

    Args:
        config: Of the picker.
        dispatcher: Decides.
        health: Knows which replicas take which models.
        telemetry: Counts.
        books: Of what becomes of requests.

    Attributes:
        replica_at: Index of each endpoint.
    """

    def __init__(
        self,
        config: PickerConfig,
        dispatcher: Dispatcher,
        health: Health,
        telemetry: Telemetry,
        books: Books,
    ) -> None:
        self.replica_at = {endpoint_of(replica): r for r, replica in enumerate(config.replicas)}
        self._endpoints = list(self.replica_at)
        self._config = config
        self._dispatcher = dispatcher
        self._health = health
        self._telemetry = telemetry
        self._books = books
        self._reading = ThreadPoolExecutor(1, "large-bodies")
        self._turn = 0

    @property
    def max_body_bytes(self) -> int:
        """Larger bodies are refused."""
        return self._config.request.max_body_bytes

    def close(self) -> None:
        """End the thread for large bodies."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def place(self, asking: Asking) -> Placed:
        """Decide where a request goes; hold it as long as the policy wants.

        Raises:
            RequestError: If it cannot be read, is rejected, or no replica takes it.
        """
        begin_s = self._dispatcher.clock()
        chat = _INFERENCE.get(asking.path)
        among = self._among(asking.subset)
        if chat is None:
            return self._in_turn(among)
        read = await self._read(asking, chat=chat)
        job = self._arrive(asking, read)
        try:
            await self._decide(job, among)
        except asyncio.CancelledError:
            self._books.end(job, "cancelled")
            raise
        finally:
            if job.replica < 0:
                self._books.end(job, "failed")  # does nothing if it was rejected
        self._telemetry.overhead.observe(self._dispatcher.clock() - begin_s - job.held_s)
        return Placed(self._with_fallbacks(job.replica, among, job.model), job, read.stream)

    def _among(self, subset: Sequence[str] | None) -> BoolArray:
        """Replicas that the gateway leaves to choose from, `bool[R]`."""
        if subset is None:
            return np.ones(len(self._endpoints), np.bool_)
        among = np.zeros(len(self._endpoints), np.bool_)
        for endpoint in subset:
            if endpoint in self.replica_at:
                among[self.replica_at[endpoint]] = True
        return among

    def _allowed(self, among: BoolArray, model: str) -> BoolArray:
        """Of those, replicas that are up, have the model and are not full; or the next best."""
        allowed = among & self._dispatcher.state.up
        having = allowed & self._health.serving(model)
        if having.any():  # else an engine says in its own words that there is no such model
            allowed = having
        left = allowed.copy()
        left[self._health.ejection.passed_over(stream=True)] = False
        return left if left.any() else allowed

    def _in_turn(self, among: BoolArray) -> Placed:
        """Send what is no inference to the replicas in turn."""
        allowed = np.flatnonzero(among & self._dispatcher.state.up)
        if not len(allowed):
            raise self._nowhere()
        self._turn += 1
        replica = int(allowed[self._turn % len(allowed)])
        return Placed(self._with_fallbacks(replica, among, ""), None, False)

    async def _read(self, asking: Asking, *, chat: bool) -> Read:
        """Read a body as far as it is there; without one the headers tell its length."""
        body, packed = asking.body, asking.fields.get("content-encoding", "identity")
        if body is None or packed != "identity":
            length = asking.fields.get("content-length", "")
            num_bytes = len(body) if body else int(length) if length.isdecimal() else 0
            tokens = max(1.0, num_bytes / self._dispatcher.config.prefix.bytes_per_token)
            nothing = Prompt(tokens, np.empty(0, np.uint64), 1.0)
            return Read(nothing, None, "", True, None, None)
        if len(body) < _LARGE_BYTES:
            return self._read_body(body, chat)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, self._read_body, body, chat)

    def _read_body(self, body: bytes, chat: bool) -> Read:
        config = self._config.request
        asked = read_request(
            body, chat=chat, slo_field=config.slo_field, session_field=config.session_field
        )
        prompt = asked.prompt
        if not isinstance(prompt, Prompt):
            prompt = self._dispatcher.reader.read(cast("str | Sequence[int]", prompt))
        return Read(
            prompt, asked.max_tokens, asked.model, asked.stream, asked.slo_class, asked.session
        )

    def _arrive(self, asking: Asking, read: Read) -> Job:
        config, fields = self._config.request, asking.fields
        try:
            slo_class = self._dispatcher.slo_class(fields.get(config.slo_header) or read.slo_class)
        except ValueError as error:
            raise RequestError(400, str(error), "unknown_slo_class") from error
        session = fields.get(config.session_header) if config.session_header else None
        return self._dispatcher.arrive(
            read.prompt,
            key=fields.get("x-request-id") or str(uuid.uuid4()),
            tenant=fields.get(config.tenant_header) or _EVERYONE,
            slo_class=slo_class,
            max_tokens=read.max_tokens,
            model=read.model,
            session=session or read.session,
        )

    async def _decide(self, job: Job, among: BoolArray) -> None:
        """Decide, and again as long as the request is held.

        Raises:
            RequestError: If it is rejected, or no replica takes requests.
        """
        config, dispatcher = self._config.request, self._dispatcher
        until_s = job.request.arrival_s + config.max_hold_s
        while True:
            allowed = self._allowed(among, job.model)
            if not allowed.any():
                raise self._nowhere()
            may_hold = (
                dispatcher.state.num_held - job.request.held < config.max_held
                and dispatcher.clock() + config.hold_s <= until_s
            )
            dispatcher.decide(job, allowed=allowed, may_hold=may_hold)
            if job.replica >= 0:
                return
            if not job.request.held:
                self._telemetry.outcomes["rejected"] += 1
                raise RequestError(
                    429,
                    "the fleet is too busy for this request: come again later",
                    "overloaded",
                    retry_after_s=config.retry_after_s,
                )
            await asyncio.sleep(config.hold_s)
            job.held_s += config.hold_s

    def _with_fallbacks(self, replica: int, among: BoolArray, model: str) -> list[str]:
        """Name the chosen endpoint, and those with the fewest requests of the others."""
        chosen = [replica]
        if self._config.fallbacks:
            allowed = self._allowed(among, model)
            allowed[replica] = False
            load = self._dispatcher.state.replicas[OUTSTANDING_REQUESTS]
            others = sorted(np.flatnonzero(allowed).tolist(), key=load.__getitem__)
            chosen += others[: self._config.fallbacks]
        return [self._endpoints[r] for r in chosen]

    def _nowhere(self) -> RequestError:
        return RequestError(
            503,
            "no replica takes requests now: come again later",
            "no_replica",
            retry_after_s=self._config.request.retry_after_s,
        )
