"""What clients ask of the router: OpenAI's endpoints, and what load balancers look at."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast
from urllib.parse import unquote

from servegym.serve.requests.prompt import Prompt, PromptReader, Size
from servegym.serve.router.auth import Keys
from servegym.serve.router.client import Request
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.disaggregation import is_divisible
from servegym.serve.router.errors import RequestError
from servegym.serve.router.forms import FORMS, Form
from servegym.serve.router.logs import REQUEST_ID, log_request
from servegym.serve.router.otel import tracing_of
from servegym.serve.router.pages import MODEL
from servegym.serve.router.placement import Arrival, Desk, Placement
from servegym.serve.router.proxy import Proxy, place
from servegym.serve.router.reply import Reply
from servegym.serve.router.request import Asked, read_request, with_hints
from servegym.serve.router.server import Server
from servegym.serve.vllm.hints import hints

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


class Api:
    """The endpoints that clients use.

    Args:
        config: Of the router.
        desk: Decides about requests and shows the fleet.
        reader: Measures prompts.
        proxy: Sends requests on.
        keys: Who may ask; `None`: everyone.
        clock: Seconds that never go back.

    Attributes:
        keys: May be replaced at any time.
    """

    def __init__(
        self,
        config: RouterConfig,
        desk: Desk,
        reader: PromptReader,
        proxy: Proxy,
        keys: Keys | None,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.keys = keys
        self._desk = desk
        self._reader = reader
        self._proxy = proxy
        self._clock = clock
        tracing = tracing_of(config)
        self._tracing = None if tracing is None else tracing(config)
        self._reading = ThreadPoolExecutor(1, "large-bodies")
        self._routes: dict[str, tuple[tuple[str, ...], _Handler]] = {
            **dict.fromkeys(FORMS, (("POST",), self._serve)),
            "/v1/models": (_READ, self._page),
            "/health": (_READ, self._open_page),
            "/metrics": (_READ, self._page),
        }

    async def close(self) -> None:
        """End the thread for large bodies, and send the spans that are left."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def server(self) -> Server:
        """Make the server that takes clients' requests."""
        return Server(self.answer, self.config.request.max_body_bytes)

    async def answer(self, request: Request) -> None:
        """Answer a request, turn what goes wrong into OpenAI's error objects, and count.

        Args:
            request: Its answer is sent when this returns.
        """
        endpoint, begin_s = "other", self._clock()
        REQUEST_ID.set(request.key)  # in the context of this request's task alone
        dialect = FORMS[path].dialect if (path := request.head.path) in FORMS else "openai"
        try:
            endpoint, method, handler = self._route(request)
            if request.head.method not in method:
                raise RequestError(405, _place(request, "Method Not Allowed"), "method_not_allowed")
            if self._tracing is not None and method is not _READ:
                request.trace = self._tracing.begin(request, endpoint)
            answer = await handler(request)
        except RequestError as error:
            answer = error.reply(dialect)
        except asyncio.CancelledError:
            self._count(request, endpoint, 499, begin_s)  # the client has gone
            raise
        except Exception:
            _log.exception("a request failed in the router")
            message = "the router failed: its log says why"
            answer = RequestError(500, message, "internal_error").reply(dialect)
        status = answer.status if isinstance(answer, Reply) else answer
        self._count(request, endpoint, status, begin_s)
        if isinstance(answer, Reply):
            if request.begun:  # too late to say anything
                request.break_off(b"")
            else:
                request.reply(answer)

    def _count(self, request: Request, endpoint: str, status: int, begin_s: float) -> None:
        """A request has been answered."""
        self._desk.count(endpoint, status)
        probe = status == 200 and endpoint in _PROBED
        if self.config.log.requests and not probe:
            log_request(request, endpoint, status, self._clock() - begin_s)
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
        if path.startswith(MODEL) and path != MODEL:
            return f"{MODEL}{{name}}", _READ, self._page
        raise RequestError(404, _place(request, "Not Found"), "unknown_url")

    async def _serve(self, request: Request) -> Reply | int:
        """Let a replica answer."""
        tenant = request.tenant = self._tenant(request)
        placement = self._desk.enter(tenant, request.key)
        try:
            if not request.is_whole:
                await placement.admitted()
            return await self._forward(request, placement)
        except asyncio.CancelledError:
            placement.end("cancelled")
            raise
        finally:
            placement.leave()

    async def _forward(self, request: Request, placement: Placement) -> Reply | int:
        config = self.config.request
        path = unquote(request.head.path)
        packed = await request.body(config.body_timeout_s)
        read_s = self._clock()
        coding = request.fields.get("content-encoding") or "identity"
        form, kind = FORMS[path], request.fields.get("content-type") or ""
        if len(packed) < _LARGE_BYTES:
            body, asked, prompt = self._read(packed, coding.lower(), form, kind)
        else:
            body, asked, prompt = await self._in_thread(
                self._read, packed, coding.lower(), form, kind
            )
        header = config.session_header
        session = request.fields.get(header.lower()) if header else None
        trace = request.trace
        if trace is not None:
            trace.asked(request.tenant, asked.max_tokens, stream=asked.stream)
        placement.arrive(
            Arrival(
                prompt,
                asked.model,
                asked.max_tokens,
                asked.stream,
                request.fields.get(config.slo_header.lower()) or asked.slo_class,
                session or asked.session or None,
                read_s,
                trace is not None and trace.sampled,
                is_divisible(form, asked.fields),
            )
        )
        seat = await place(placement, trace)
        if config.engine_hints and form.takes_hints:
            level = self.config.dispatch.slo_classes[seat.slo_class]
            told = hints(seat.predicted_output_tokens, level.ttft_s, level.tpot_s)
            if len(body) < _LARGE_BYTES:
                body = with_hints(asked.fields, told)
            else:
                body = await self._in_thread(with_hints, asked.fields, told)
        return await self._proxy.forward(request, placement, seat, path, body, stream=asked.stream)

    def _read(
        self, packed: bytes, coding: str, form: Form, kind: str
    ) -> tuple[bytes, Asked, Prompt | Size]:
        """Unpack and read a body and measure its prompt."""
        config = self.config.request
        body = packed if coding == "identity" else _unpack(packed, coding, config.max_body_bytes)
        asked = read_request(
            body,
            form,
            content_type=kind,
            slo_field=config.slo_field,
            session_field=config.session_field,
        )
        prompt = asked.prompt
        if not isinstance(prompt, Prompt | Size):  # a size is read where lengths are learnt
            prompt = self._reader.read(cast("str | Sequence[int]", prompt))
        return body, asked, prompt

    async def _in_thread(self, function: Callable[..., _Result], *args: object) -> _Result:
        """Do something with a large body."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, function, *args)

    def _tenant(self, request: Request) -> str:
        if self.keys is None:
            return EVERYONE
        given = request.fields.get("authorization")
        if given is None and (key := request.fields.get("x-api-key")):
            given = f"Bearer {key}"  # as clients of Anthropic's API give it
        tenant = self.keys.tenant(given)
        if tenant is None:
            raise RequestError(
                401, "a known API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        return tenant

    async def _page(self, request: Request) -> Reply:
        self._tenant(request)
        return await self._open_page(request)

    async def _open_page(self, request: Request) -> Reply:
        """Show a page to whoever asks: load balancers have no key."""
        return await self._desk.page(unquote(request.head.path))


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
