"""The router: OpenAI's endpoints in front of a fleet of replicas."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import aiohttp
from aiohttp import web

from servegym.errors import ConfigError
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.exposition import add_dispatcher
from servegym.serve.facts import fleet_facts
from servegym.serve.metrics import metric_names
from servegym.serve.poller import MetricsPoller
from servegym.serve.prometheus import CONTENT_TYPE, Exposition
from servegym.serve.prompt import Prompt
from servegym.serve.router.admin import Admin
from servegym.serve.router.auth import read_keys
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.errors import RequestError
from servegym.serve.router.health import Health
from servegym.serve.router.http_log import http_logger
from servegym.serve.router.limits import Limits
from servegym.serve.router.proxy import Proxy
from servegym.serve.router.request import Asked, read_request, with_hints
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.vllm.hints import hints

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

#: Seconds that an idle connection to a replica is kept: below the 5 s after which uvicorn, which
#: vLLM runs in, closes its end, or requests would be sent into closing connections.
_UPSTREAM_KEEPALIVE_S = 4.0
#: Connections that may wait to be taken; a storm of clients needs them.
_BACKLOG = 2048
_MAX_ID_CHARACTERS = 128
_ID_HEADER = "X-Request-Id"
_ID = web.RequestKey("id", str)
#: Larger bodies are read and hashed in a thread: all streams would wait for it.
_LARGE_BYTES = 64 * 1024
#: Tenant of everyone where there are no keys.
_EVERYONE = "default"


class Router:
    """A running router; also the way to have one inside another program.

    Args:
        config: See `RouterConfig`.

    Attributes:
        config: As given.
        dispatcher: Decides and keeps the books.
        telemetry: The router's own counts.

    Raises:
        ServeGymError: If a part of the configuration cannot be used.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._keys = read_keys(config.auth) if config.auth else None
        self._upstream_key = _upstream_key(config.upstream_key_env)
        self._names = metric_names(config.metrics.engine)
        self.telemetry = Telemetry()
        self.dispatcher = Dispatcher(
            config.dispatch,
            [replica.name for replica in config.replicas],
            fleet_facts([replica.facts for replica in config.replicas]),
        )
        self._limits = Limits(config.limits, config.tenants)
        self._draining = False
        self._runners: list[web.AppRunner] = []
        self._session: aiohttp.ClientSession | None = None
        self._health: Health | None = None
        self._poller: MetricsPoller | None = None
        self._proxy: Proxy | None = None
        self._ports: list[int] = []
        self._reading = ThreadPoolExecutor(1, "large-bodies")

    @property
    def port(self) -> int:
        """Port for clients, once started."""
        return self._ports[0]

    @property
    def admin_port(self) -> int:
        """Port for operators, once started."""
        return self._ports[1]

    async def start(self) -> None:
        """Begin to serve; every replica has been looked at once before.

        Raises:
            ConfigError: If an address cannot be listened on.
        """
        config = self.config
        # no limit of connections: the fleet's capacity is the policy's business
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_UPSTREAM_KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        self._health = Health(config.health, config.replicas, self.dispatcher, self._session)
        self._poller = MetricsPoller(
            [r.metrics_url or f"{r.url}/metrics" for r in config.replicas],
            self._names,
            self.dispatcher,
            self._session,
            interval_s=config.metrics.interval_s,
            timeout_s=config.metrics.timeout_s,
        )
        self._proxy = Proxy(
            config.request,
            self.dispatcher,
            self._health,
            self.telemetry,
            self._session,
            [replica.url for replica in config.replicas],
            self._upstream_key,
        )
        admin = Admin(self.dispatcher, self._health, self._metrics_page)
        listen = config.listen
        try:
            await self._health.start()
            await self._poller.start()
            await self._listen(self._app(), listen.host, listen.port)
            await self._listen(admin.app(), listen.admin_host, listen.admin_port)
        except OSError as error:
            await self.stop()
            raise ConfigError(f"the router cannot listen: {error.strerror or error}") from error

    async def stop(self) -> None:
        """Stop serving; requests in progress are cut off. See `drain`."""
        for runner in self._runners:
            await runner.cleanup()
        self._runners = []
        for part in (self._health, self._poller):
            if part is not None:
                await part.stop()
        if self._session is not None:
            await self._session.close()
        self._reading.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.dispatcher.close)

    def reload_keys(self) -> None:
        """Read the API keys anew; keys that cannot be read leave the old ones in place."""
        if self.config.auth is None:
            _log.info("there are no API keys to read anew")
            return
        try:
            self._keys = read_keys(self.config.auth)
        except ConfigError as error:
            _log.error("the API keys stay as they are: %s", error)
        else:
            _log.info("the API keys have been read anew")

    async def drain(self) -> int:
        """Refuse new requests and wait for those in progress, at most `drain_s`.

        Returns:
            How many are still there.
        """
        self._draining = True
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self.config.drain_s
        while self.telemetry.in_flight and loop.time() < until_s:
            await asyncio.sleep(0.05)
        return self.telemetry.in_flight

    async def _listen(self, app: web.Application, host: str, port: int) -> None:
        runner = web.AppRunner(
            app,
            handler_cancellation=True,  # a client that goes away ends its request upstream too
            access_log=None,
            logger=http_logger,
            shutdown_timeout=1.0,
            # a body that is refused unread must not keep a connection
            lingering_time=1.0,
        )
        await runner.setup()
        self._runners.append(runner)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except OSError:
            listener.close()
            raise
        await web.SockSite(runner, listener, backlog=_BACKLOG).start()
        self._ports.append(listener.getsockname()[1])

    def _app(self) -> web.Application:
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
        key = request[_ID] = _request_id(request)
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
        if self._draining:
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
        assert self._proxy is not None
        assert self._health is not None
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
        key = request[_ID]
        job = dispatcher.arrive(
            prompt,
            key=key,
            tenant=tenant,
            slo_class=slo_class,
            max_tokens=asked.max_tokens,
            model=model,
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
        asked = read_request(body, chat=chat, slo_field=self.config.request.slo_field)
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
        assert self._health is not None
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
        if self._keys is None:
            return _EVERYONE
        tenant = self._keys.tenant(request.headers.get("Authorization"))
        if tenant is None:
            raise RequestError(
                401, "a known API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        return tenant

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._tenant(request)
        assert self._health is not None
        models = self._health.models()
        return web.json_response(
            {"object": "list", "data": [models[name] for name in sorted(models)]}
        )

    async def _model_page(self, request: web.Request) -> web.StreamResponse:
        self._tenant(request)
        assert self._health is not None
        name = request.match_info["name"]
        models = self._health.models()
        if name not in models:
            raise _no_model(name, models)
        return web.json_response(models[name])

    async def _health_page(self, request: web.Request) -> web.StreamResponse:
        """Say whether requests may be sent here; load balancers ask without a key."""
        state = self.dispatcher.state
        num_up = sum(state.is_up(r) for r in range(state.num_replicas))
        status = "stopping" if self._draining else "ok" if num_up else "no replica"
        return web.json_response(
            {"status": status, "replicas_up": num_up, "replicas": state.num_replicas},
            status=200 if status == "ok" else 503,
        )

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self._tenant(request)
        return self._metrics_page()

    def _metrics_page(self) -> web.Response:
        page = Exposition()
        self.telemetry.write(page)
        add_dispatcher(page, self.dispatcher)
        if self._poller is not None:
            page.counter(
                "servegym_replica_failed_polls",
                "Polls of engine metrics that failed",
                [
                    ({"replica": name}, count)
                    for name, count in zip(
                        self.dispatcher.names, self._poller.num_failed, strict=True
                    )
                ],
            )
        return web.Response(body=page.page().encode(), headers={"Content-Type": CONTENT_TYPE})


def serve(config: RouterConfig, ready: Callable[[Router], None]) -> None:
    """Run a router until it is told to stop (SIGTERM, SIGINT), then let it drain.

    SIGHUP reads the API keys anew and stops nothing.

    Args:
        config: Its configuration.
        ready: Called once it serves.

    Raises:
        ServeGymError: If the configuration cannot be used.
    """
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(config, ready))


async def _serve(config: RouterConfig, ready: Callable[[Router], None]) -> None:
    router = Router(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, router.reload_keys)
    await router.start()
    # what is there now stays: looking through all of it would stop every stream for 0.1 s
    gc.freeze()
    ready(router)
    await stop.wait()
    _log.warning("stopping: %d requests in progress", router.telemetry.in_flight)
    left = await router.drain()
    if left:
        _log.warning("%d requests are cut off after %g s", left, config.drain_s)
    await router.stop()


def _request_id(request: web.Request) -> str:
    """Return the id that a client has given its request, else a new one."""
    key = request.headers.get(_ID_HEADER, "")
    good = 0 < len(key) <= _MAX_ID_CHARACTERS and key.isprintable()
    return key if good else secrets.token_hex(12)


def _no_model(name: str, models: Iterable[str]) -> RequestError:
    known = ", ".join(sorted(models)) or "none yet"
    return RequestError(404, f"there is no model {name!r}, only {known}", "model_not_found")


def _upstream_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ConfigError(f"the environment variable {name} with the replicas' key is not set")
    return key
