"""What clients ask of the router: OpenAI's endpoints, and what load balancers look at."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import unquote

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.requests.prompt import Prompt
from servegym.serve.router.auth import Keys
from servegym.serve.router.client import Request, Server
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.errors import RequestError
from servegym.serve.router.health import Health
from servegym.serve.router.limits import Limits
from servegym.serve.router.logs import REQUEST_ID, log_request
from servegym.serve.router.proxy import Proxy
from servegym.serve.router.reply import Reply, json_reply
from servegym.serve.router.request import Asked, read_request, with_hints
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.vllm.hints import hints

if TYPE_CHECKING:
    from servegym.serve.router.tracing import Tracing

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
#: Returns what to tell the client, or the status of the answer that it has got.
_Handler = Callable[[Request], Awaitable[Reply | int]]

#: Larger bodies are read and hashed in a thread: all streams would wait for it.
_LARGE_BYTES = 64 * 1024
#: Tenant of everyone where there are no keys.
EVERYONE = "default"
_READ = ("GET", "HEAD")
#: Asked every few seconds by machines: no line of the log for each.
_PROBED = ("/health", "/metrics")
_CHAT = "/v1/chat/completions"
_MODEL = "/v1/models/"


class Api:
    """The endpoints that clients use.

    Args:
        config: Of the router.
        dispatcher: Decides.
        telemetry: Counts.
        health: Knows who is up and has which model.
        proxy: Sends requests on.
        keys: Who may ask; `None`: everyone.
        metrics_page: Returns the Prometheus page.
        tracing: Makes spans of what is asked of replicas.

    Attributes:
        keys: May be replaced at any time.
        draining: Whether new requests are refused.
    """

    def __init__(
        self,
        config: RouterConfig,
        dispatcher: Dispatcher,
        telemetry: Telemetry,
        health: Health,
        proxy: Proxy,
        keys: Keys | None,
        metrics_page: Callable[[], Reply],
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self.dispatcher = dispatcher
        self.telemetry = telemetry
        self.keys = keys
        self.draining = False
        self._health = health
        self._proxy = proxy
        self._metrics_page = metrics_page
        self._tracing = tracing
        self._limits = Limits(config.limits, config.tenants)
        self._reading = ThreadPoolExecutor(1, "large-bodies")
        self._routes: dict[str, tuple[tuple[str, ...], _Handler]] = {
            "/v1/completions": (("POST",), self._completions),
            _CHAT: (("POST",), self._completions),
            "/v1/models": (_READ, self._models),
            "/health": (_READ, self._health_page),
            "/metrics": (_READ, self._metrics),
        }

    def close(self) -> None:
        """End the thread for large bodies."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    def server(self) -> Server:
        """Make the server that takes clients' requests."""
        return Server(self.answer, self.config.request.max_body_bytes)

    async def answer(self, request: Request) -> None:
        """Answer a request, turn what goes wrong into OpenAI's error objects, and count.

        Args:
            request: Its answer is sent when this returns.
        """
        endpoint = "other"
        begin_s = self.dispatcher.clock()
        REQUEST_ID.set(request.key)  # in the context of this request's task alone
        try:
            endpoint, method, handler = self._route(request)
            if request.head.method not in method:
                raise RequestError(405, _place(request, "Method Not Allowed"), "method_not_allowed")
            if self._tracing is not None and method is not _READ:
                request.trace = self._tracing.begin(request, endpoint)
            answer = await handler(request)
        except RequestError as error:
            answer = error.reply()
        except asyncio.CancelledError:
            self._count(request, endpoint, 499, begin_s)  # the client has gone
            raise
        except Exception:
            _log.exception("a request failed in the router")
            message = "the router failed: its log says why"
            answer = RequestError(500, message, "internal_error").reply()
        status = answer.status if isinstance(answer, Reply) else answer
        self._count(request, endpoint, status, begin_s)
        if isinstance(answer, Reply):
            if request.begun:  # too late to say anything
                request.break_off(b"")
            else:
                request.reply(answer)

    def _count(self, request: Request, endpoint: str, status: int, begin_s: float) -> None:
        """A request has been answered."""
        self.telemetry.requests[endpoint, status] += 1
        probe = status == 200 and endpoint in _PROBED
        if self.config.log.requests and not probe:
            duration_s = self.dispatcher.clock() - begin_s
            log_request(request, endpoint, status, duration_s)
        if request.trace is not None:
            request.trace.end(status)

    def _route(self, request: Request) -> tuple[str, tuple[str, ...], _Handler]:
        """Return an endpoint's name, its methods, and who answers it.

        Raises:
            RequestError: If there is none.
        """
        path = request.head.path
        path = unquote(path) if "%" in path else path
        found = self._routes.get(path)
        if found is not None:
            return path, *found
        if path.startswith(_MODEL) and path != _MODEL:
            return f"{_MODEL}{{name}}", _READ, self._model_page
        raise RequestError(404, _place(request, "Not Found"), "unknown_url")

    async def _completions(self, request: Request) -> Reply | int:
        tenant = request.tenant = self._tenant(request)
        if self.draining:
            raise RequestError(
                503,
                "the router is stopping: come again, or ask another",
                "stopping",
                retry_after_s=self.config.request.retry_after_s,
            )
        self._limits.enter(tenant, self.dispatcher.clock())
        self.telemetry.in_flight += 1
        try:
            return await self._forward(request, tenant)
        finally:
            self.telemetry.in_flight -= 1
            self._limits.leave(tenant)

    async def _forward(self, request: Request, tenant: str) -> Reply | int:
        config, dispatcher = self.config.request, self.dispatcher
        path = unquote(request.head.path)
        packed = await request.body(config.body_timeout_s)
        read_s = dispatcher.clock()
        coding = request.fields.get("content-encoding") or "identity"
        body, asked, prompt = await self._off_loop(
            len(packed), self._read, packed, coding.lower(), path == _CHAT
        )
        model = self._model(asked.model)
        named = request.fields.get(config.slo_header.lower()) or asked.slo_class
        try:
            slo_class = dispatcher.slo_class(named or self._limits.of(tenant).slo_class)
        except ValueError as error:
            raise RequestError(400, str(error), "unknown_slo_class") from error
        header = config.session_header
        session = request.fields.get(header.lower()) if header else None
        job = dispatcher.arrive(
            prompt,
            key=request.key,
            tenant=tenant,
            slo_class=slo_class,
            max_tokens=asked.max_tokens,
            model=model,
            session=session or asked.session or None,
        )
        if request.trace is not None:
            level = dispatcher.config.slo_classes[slo_class].name
            request.trace.asked(job, level, asked.max_tokens, stream=asked.stream)
        if config.engine_hints:
            level = dispatcher.config.slo_classes[slo_class]
            told = hints(job.request.predicted_output_tokens, level.ttft_s, level.tpot_s)
            body = await self._off_loop(len(body), with_hints, asked.fields, told)
        return await self._proxy.forward(
            request, job, path, body, stream=asked.stream, read_s=read_s
        )

    def _read(self, packed: bytes, coding: str, chat: bool) -> tuple[bytes, Asked, Prompt]:
        """Unpack and read a body and measure its prompt."""
        config = self.config.request
        body = packed if coding == "identity" else _unpack(packed, coding, config.max_body_bytes)
        asked = read_request(
            body, chat=chat, slo_field=config.slo_field, session_field=config.session_field
        )
        prompt = asked.prompt
        if not isinstance(prompt, Prompt):
            prompt = self.dispatcher.reader.read(cast("str | Sequence[int]", prompt))
        return body, asked, prompt

    async def _off_loop(
        self, num_bytes: int, function: Callable[..., _Result], *args: object
    ) -> _Result:
        """Do something with a body; with a large one in a thread."""
        if num_bytes < _LARGE_BYTES:
            return function(*args)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, function, *args)

    def _model(self, asked: str) -> str:
        """Return the model a request is for; engines that serve one need not be told which."""
        models = self._health.models()
        if not models or asked in models:
            return asked
        if not asked and len(models) == 1:
            return next(iter(models))
        raise _no_model(asked, models)

    def _tenant(self, request: Request) -> str:
        if self.keys is None:
            return EVERYONE
        tenant = self.keys.tenant(request.fields.get("authorization"))
        if tenant is None:
            raise RequestError(
                401, "a known API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        return tenant

    async def _models(self, request: Request) -> Reply:
        self._tenant(request)
        models = self._health.models()
        return json_reply({"object": "list", "data": [models[name] for name in sorted(models)]})

    async def _model_page(self, request: Request) -> Reply:
        self._tenant(request)
        name = unquote(request.head.path).removeprefix(_MODEL)
        models = self._health.models()
        if name not in models:
            raise _no_model(name, models)
        return json_reply(models[name])

    async def _health_page(self, request: Request) -> Reply:
        """Say whether requests may be sent here; load balancers ask without a key."""
        state = self.dispatcher.state
        num_up = sum(state.is_up(r) for r in range(state.num_replicas))
        status = "stopping" if self.draining else "ok" if num_up else "no replica"
        return json_reply(
            {"status": status, "replicas_up": num_up, "replicas": state.num_replicas},
            status=200 if status == "ok" else 503,
        )

    async def _metrics(self, request: Request) -> Reply:
        self._tenant(request)
        return self._metrics_page()


def _unpack(packed: bytes, coding: str, max_bytes: int) -> bytes:
    """Unpack a body.

    Raises:
        RequestError: If it cannot be unpacked, or is too large then.
    """
    windows = {"gzip": 31, "x-gzip": 31, "deflate": 15}
    if coding not in windows:
        message = f"the body's Content-Encoding must be gzip or deflate, got {coding!r}"
        raise RequestError(415, message, "unsupported_encoding")
    window = windows[coding]
    if coding == "deflate" and packed[:1] and packed[0] & 15 != 8:
        window = -15  # without the header that belongs to it, as some send it
    unpacker = zlib.decompressobj(window)
    try:
        body = unpacker.decompress(packed, max_bytes + 1)
    except zlib.error:
        raise RequestError(400, "the body cannot be unpacked", "invalid_body") from None
    if len(body) > max_bytes:
        raise RequestError(413, f"the body may have {max_bytes} bytes at most", "body_too_large")
    if not unpacker.eof:
        raise RequestError(400, "the body cannot be unpacked", "invalid_body")
    return body


def _place(request: Request, reason: str) -> str:
    return f"{request.head.method} {request.head.path}: {reason}"


def _no_model(name: str, models: Iterable[str]) -> RequestError:
    known = ", ".join(sorted(models)) or "none yet"
    return RequestError(404, f"there is no model {name!r}, only {known}", "model_not_found")
