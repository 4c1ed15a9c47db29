"""What clients ask of the router: OpenAI's endpoints, and what load balancers look at."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar, cast

from aiohttp import web

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.requests.prompt import Prompt
from servegym.serve.router.auth import Keys
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.errors import RequestError
from servegym.serve.router.health import Health
from servegym.serve.router.limits import Limits
from servegym.serve.router.proxy import Proxy
from servegym.serve.router.request import Asked, read_request, with_hints
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.vllm.hints import hints

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_MAX_ID_CHARACTERS = 128
_ID_HEADER = "X-Request-Id"
#: Id of the request that a task answers.
_ID: ContextVar[str] = ContextVar("request id")
#: Larger bodies are read and hashed in a thread: all streams would wait for it.
_LARGE_BYTES = 64 * 1024
#: Tenant of everyone where there are no keys.
_EVERYONE = "default"


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
        metrics_page: Callable[[], web.Response],
    ) -> None:
        self.config = config
        self.dispatcher = dispatcher
        self.telemetry = telemetry
        self.keys = keys
        self.draining = False
        self._health = health
        self._proxy = proxy
        self._metrics_page = metrics_page
        self._limits = Limits(config.limits, config.tenants)
        self._reading = ThreadPoolExecutor(1, "large-bodies")

    def close(self) -> None:
        """End the thread for large bodies."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    def app(self) -> web.Application:
        """Make the application that answers clients."""
        app = web.Application(
            middlewares=[self._answer_errors],
            client_max_size=self.config.request.max_body_bytes,
        )
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model_page)
        app.router.add_get("/health", self._health_page)
        app.router.add_get("/metrics", self._metrics)
        return app

    @web.middleware
    async def _answer_errors(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Turn what goes wrong into OpenAI's error objects, and count the answers."""
        endpoint = "other"
        key = _request_id(request)
        _ID.set(key)
        try:
            resource = request.match_info.route.resource
            if resource is not None:
                endpoint = resource.canonical
            response = await handler(request)
        except RequestError as error:
            response = error.response()
        except web.HTTPRequestEntityTooLarge:
            response = self._too_large().response()
        except web.HTTPException as error:
            known = {404: "unknown_url", 405: "method_not_allowed"}
            code = known.get(error.status, "invalid_request")
            message = f"{request.method} {request.path}: {error.reason}"
            response = RequestError(error.status, message, code).response()
        except (ConnectionError, asyncio.CancelledError):
            self.telemetry.requests[endpoint, 499] += 1  # the client has gone
            raise
        except Exception:
            _log.exception("a request failed in the router")
            message = "the router failed: its log says why"
            response = RequestError(500, message, "internal_error").response()
        self.telemetry.requests[endpoint, response.status] += 1
        if not response.prepared:
            response.headers[_ID_HEADER] = key
        return response

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        tenant = self._tenant(request)
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

    async def _forward(self, request: web.Request, tenant: str) -> web.StreamResponse:
        config, dispatcher = self.config.request, self.dispatcher
        body = await self._body(request)
        read_s = dispatcher.clock()
        chat = request.path.endswith("/chat/completions")
        asked, prompt = await self._off_loop(len(body), self._read, body, chat)
        model = self._model(asked.model)
        named = request.headers.get(config.slo_header) or asked.slo_class
        try:
            slo_class = dispatcher.slo_class(named or self._limits.of(tenant).slo_class)
        except ValueError as error:
            raise RequestError(400, str(error), "unknown_slo_class") from error
        session = request.headers.get(config.session_header) if config.session_header else None
        key = _ID.get()
        job = dispatcher.arrive(
            prompt,
            key=key,
            tenant=tenant,
            slo_class=slo_class,
            max_tokens=asked.max_tokens,
            model=model,
            session=session or asked.session or None,
        )
        if config.engine_hints:
            level = dispatcher.config.slo_classes[slo_class]
            told = hints(job.request.predicted_output_tokens, level.ttft_s, level.tpot_s)
            body = await self._off_loop(len(body), with_hints, asked.fields, told)
        return await self._proxy.forward(
            request, job, body, key=key, stream=asked.stream, read_s=read_s
        )

    def _read(self, body: bytes, chat: bool) -> tuple[Asked, Prompt]:
        """Read a body and measure its prompt."""
        config = self.config.request
        asked = read_request(
            body, chat=chat, slo_field=config.slo_field, session_field=config.session_field
        )
        prompt = asked.prompt
        if not isinstance(prompt, Prompt):
            prompt = self.dispatcher.reader.read(cast("str | Sequence[int]", prompt))
        return asked, prompt

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

    async def _body(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self.config.request.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.config.request.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise RequestError(408, "the body did not come in time", "body_timeout") from None
        except web.RequestPayloadError as error:
            message = f"the body cannot be unpacked ({type(error).__name__})"
            raise RequestError(400, message, "invalid_body") from None

    def _too_large(self) -> RequestError:
        limit = self.config.request.max_body_bytes
        return RequestError(413, f"the body may have {limit} bytes at most", "body_too_large")

    def _tenant(self, request: web.Request) -> str:
        if self.keys is None:
            return _EVERYONE
        tenant = self.keys.tenant(request.headers.get("Authorization"))
        if tenant is None:
            raise RequestError(
                401, "a known API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        return tenant

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._tenant(request)
        models = self._health.models()
        return web.json_response(
            {"object": "list", "data": [models[name] for name in sorted(models)]}
        )

    async def _model_page(self, request: web.Request) -> web.StreamResponse:
        self._tenant(request)
        name = request.match_info["name"]
        models = self._health.models()
        if name not in models:
            raise _no_model(name, models)
        return web.json_response(models[name])

    async def _health_page(self, request: web.Request) -> web.StreamResponse:
        """Say whether requests may be sent here; load balancers ask without a key."""
        state = self.dispatcher.state
        num_up = sum(state.is_up(r) for r in range(state.num_replicas))
        status = "stopping" if self.draining else "ok" if num_up else "no replica"
        return web.json_response(
            {"status": status, "replicas_up": num_up, "replicas": state.num_replicas},
            status=200 if status == "ok" else 503,
        )

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self._tenant(request)
        return self._metrics_page()


def _request_id(request: web.Request) -> str:
    """Return the id that a client has given its request, else a new one."""
    key = request.headers.get(_ID_HEADER, "")
    good = 0 < len(key) <= _MAX_ID_CHARACTERS and key.isprintable()
    return key if good else secrets.token_hex(12)


def _no_model(name: str, models: Iterable[str]) -> RequestError:
    known = ", ".join(sorted(models)) or "none yet"
    return RequestError(404, f"there is no model {name!r}, only {known}", "model_not_found")
