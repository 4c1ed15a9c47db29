"""The router: OpenAI's endpoints in front of a fleet of replicas."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from servegym import __version__
from servegym.errors import ConfigError
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.facts import fleet_facts
from servegym.serve.listening import listen
from servegym.serve.monitoring.exposition import add_dispatcher
from servegym.serve.monitoring.loop_lag import LoopLag
from servegym.serve.monitoring.metrics import metric_names
from servegym.serve.monitoring.poller import MetricsPoller
from servegym.serve.monitoring.process import add_process
from servegym.serve.monitoring.prometheus import CONTENT_TYPE, Exposition
from servegym.serve.router.admin import Admin
from servegym.serve.router.api import EVERYONE, Api
from servegym.serve.router.auth import read_keys, watch_file
from servegym.serve.router.client import Server
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.health import Health
from servegym.serve.router.http_log import http_logger
from servegym.serve.router.latencies import Latencies
from servegym.serve.router.proxy import Proxy
from servegym.serve.router.reply import Reply
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import KEEPALIVE_S

if TYPE_CHECKING:
    from servegym.serve.router.tracing import Tracing

_log = logging.getLogger(__name__)


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
        tenants = {EVERYONE} if config.auth is None else set(config.tenants)
        self.telemetry = Telemetry(latencies=Latencies(tenants))
        self._make_tracing = _tracing(config)
        self.dispatcher = Dispatcher(
            config.dispatch,
            [replica.name for replica in config.replicas],
            fleet_facts([replica.facts for replica in config.replicas]),
        )
        self._admin: web.AppRunner | None = None
        self._server: Server | None = None
        self._proxy: Proxy | None = None
        self._session: aiohttp.ClientSession | None = None
        self._health: Health | None = None
        self._poller: MetricsPoller | None = None
        self._api: Api | None = None
        self._ports: list[int] = []
        self._watch: asyncio.Task[None] | None = None
        self._tracing: Tracing | None = None
        self._loop_lag = LoopLag()

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
        # for health and metrics alone: requests go through the proxy's own connections
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        self._health = Health(config.health, config.replicas, self.dispatcher, self._session)
        self._poller = MetricsPoller(
            [replica.metrics_page for replica in config.replicas],
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
            [replica.url for replica in config.replicas],
            self._upstream_key,
        )
        if self._make_tracing is not None:
            self._tracing = self._make_tracing()
        self._api = Api(
            config,
            self.dispatcher,
            self.telemetry,
            self._health,
            self._proxy,
            self._keys,
            self._metrics_page,
            self._tracing,
        )
        admin = Admin(self.dispatcher, self._health, self._metrics_page)
        listen = config.listen
        self._loop_lag.start()
        try:
            await self._health.start()
            await self._poller.start()
            self._server = self._api.server()
            self._ports.append(await self._server.start(listen.host, listen.port))
            await self._listen(admin.app(), listen.admin_host, listen.admin_port)
        except OSError as error:
            await self.stop()
            raise ConfigError(f"the router cannot listen: {error.strerror or error}") from error
        if config.auth is not None and config.auth.keys_file is not None:
            watching = watch_file(config.auth.keys_file, self.reload_keys)
            self._watch = asyncio.create_task(watching)

    async def stop(self) -> None:
        """Stop serving; requests in progress are cut off. See `drain`."""
        self._loop_lag.stop()
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            await self._server.stop()
        if self._admin is not None:
            await self._admin.cleanup()
            self._admin = None
        if self._proxy is not None:
            self._proxy.close()
        for part in (self._health, self._poller):
            if part is not None:
                await part.stop()
        if self._session is not None:
            await self._session.close()
        if self._api is not None:
            self._api.close()
        await asyncio.to_thread(self.dispatcher.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def reload_keys(self) -> None:
        """Read the API keys anew; keys that cannot be read leave the old ones in place."""
        if self.config.auth is None:
            _log.info("there are no API keys to read anew")
            return
        try:
            keys = read_keys(self.config.auth)
        except ConfigError as error:
            _log.error("the API keys stay as they are: %s", error)
        else:
            if self._api is not None:
                self._api.keys = keys
            _log.info("the API keys have been read anew")

    async def drain(self) -> int:
        """Refuse new requests and wait for those in progress, at most `drain_s`.

        Returns:
            How many are still there.
        """
        if self._api is not None:
            self._api.draining = True
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self.config.drain_s
        while self.telemetry.in_flight and loop.time() < until_s:
            await asyncio.sleep(0.05)
        return self.telemetry.in_flight

    async def _listen(self, app: web.Application, host: str, port: int) -> None:
        self._admin = web.AppRunner(
            app, access_log=None, logger=http_logger, shutdown_timeout=1.0, lingering_time=1.0
        )
        await self._admin.setup()
        _, port = await listen(self._admin, host, port)
        self._ports.append(port)

    def _metrics_page(self) -> Reply:
        page = Exposition()
        self.telemetry.write(page, self.dispatcher.names)
        add_dispatcher(page, self.dispatcher)
        if self._health is not None:
            standings = self._health.ejection.standings
            page.counter(
                "servegym_replica_ejections",
                "Times a replica was left alone for what became of requests there",
                [
                    ({"replica": name}, standing.num_ejections)
                    for name, standing in zip(self.dispatcher.names, standings, strict=True)
                ],
            )
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
        page.gauge("servegym_build_info", "What runs", 1.0, version=__version__)
        page.histogram(
            "servegym_event_loop_lag_seconds",
            "How much later than asked the event loop wakes who waits",
            self._loop_lag.lag,
        )
        add_process(page)
        return Reply(200, page.page().encode(), [("Content-Type", CONTENT_TYPE)])


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


def _tracing(config: RouterConfig) -> Callable[[], Tracing] | None:
    """Return what makes spans, once the router starts: it has a thread of its own.

    Raises:
        ConfigError: If a package is missing.
    """
    if config.tracing is None:
        return None
    try:
        from servegym.serve.router.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracing needs {error.name}: pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http, or leave tracing out"
        ) from error
    return partial(Tracing, config.tracing, config.metrics.engine)


def _upstream_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ConfigError(f"the environment variable {name} with the replicas' key is not set")
    return key
