"""The router: OpenAI's endpoints in front of a fleet of replicas."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping

import aiohttp
from aiohttp import web

from servegym import __version__
from servegym.errors import ConfigError
from servegym.serve.discovery.replicas_file import ReplicasFile
from servegym.serve.discovery.sources import Sources
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.facts import fleet_facts
from servegym.serve.gossip.gossip import Gossip
from servegym.serve.listening import bind, listen_at
from servegym.serve.monitoring.exposition import add_dispatcher
from servegym.serve.monitoring.loop_lag import LAG_S, LoopLag
from servegym.serve.monitoring.metrics import metric_names
from servegym.serve.monitoring.poller import MetricsPoller
from servegym.serve.monitoring.process import add_process, add_workers
from servegym.serve.monitoring.prometheus import CONTENT_TYPE, Exposition, Histogram
from servegym.serve.router.admin import Admin
from servegym.serve.router.api import EVERYONE, Api
from servegym.serve.router.auth import read_keys, upstream_key, watch_file
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.desk import LocalDesk
from servegym.serve.router.fleet import Fleet
from servegym.serve.router.health import Health
from servegym.serve.router.http_log import http_logger
from servegym.serve.router.latencies import Latencies
from servegym.serve.router.otel import tracing_of
from servegym.serve.router.pages import Pages
from servegym.serve.router.proxy import Proxy
from servegym.serve.router.reply import Reply
from servegym.serve.router.server import Server
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import KEEPALIVE_S
from servegym.serve.router.workers.decider import Decider, Shared
from servegym.serve.until_told import loop_factory, serve_until_told

_log = logging.getLogger(__name__)


class Router:
    """A running router; also the way to have one inside another program.

    Args:
        config: See `RouterConfig`; `listen.workers` is the business of `workers.supervisor`.
        shared: What it has of its supervisor, if workers take the clients; `None`: it takes them.

    Attributes:
        config: As given.
        dispatcher: Decides and keeps the books.
        telemetry: The router's own counts.

    Raises:
        ServeGymError: If a part of the configuration cannot be used.
    """

    def __init__(self, config: RouterConfig, shared: Shared | None = None) -> None:
        self.config = config
        self._shared = shared
        self._keys = read_keys(config.auth) if config.auth else None
        self._upstream_key = upstream_key(config.upstream_key_env)
        self._names = metric_names(config.metrics.engine)
        self._file = ReplicasFile(config.replicas_file) if config.replicas_file else None
        if self._file is not None:
            self._file.read()  # wrong at the start is wrong
        tenants = {EVERYONE} if config.auth is None else set(config.tenants)
        self.telemetry = Telemetry(latencies=Latencies(tenants))
        tracing_of(config)  # what is missing is missing at the start, whoever carries requests
        self.dispatcher = Dispatcher(
            config.dispatch,
            [replica.name for replica in config.replicas],
            fleet_facts([replica.facts for replica in config.replicas]),
        )
        self._gossip = Gossip(config.peers, self.dispatcher) if config.peers else None
        self._admin: web.AppRunner | None = None
        self._server: Server | None = None
        self._proxy: Proxy | None = None
        self._session: aiohttp.ClientSession | None = None
        self._health: Health | None = None
        self._fleet: Fleet | None = None
        self._sources: Sources | None = None
        self._poller: MetricsPoller | None = None
        self._desk: LocalDesk | None = None
        self._api: Api | None = None
        self._decider: Decider | None = None
        self._ports: list[int] = []
        self._watch: asyncio.Task[None] | None = None
        self._lag = Histogram(LAG_S)
        self._loop_lag = LoopLag(self._lag.observe)

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
        self._health = Health(config.health, self.dispatcher, self._session)
        self._poller = MetricsPoller(
            self._names,
            self.dispatcher,
            self._session,
            interval_s=config.metrics.interval_s,
            timeout_s=config.metrics.timeout_s,
        )
        pages = Pages(self._health, self._metrics_page)
        self._desk = desk = LocalDesk(config, self.dispatcher, self._health, self.telemetry, pages)
        self._fleet = Fleet(
            config.replicas,
            self.dispatcher,
            self._health,
            self._poller,
            desk,
            self.telemetry,
        )
        admin = Admin(
            self.dispatcher,
            self._health,
            self._fleet,
            self._metrics_page,
            lambda: desk.show("/health"),
            self._workers,
            self._gossip.status if self._gossip else list,
        )
        self._sources = Sources(self._fleet, self._file, config.discover)
        listen = config.listen
        self._loop_lag.start()
        try:
            await self._sources.start()
            await self._health.start()
            await self._poller.start()
            if self._gossip is not None:
                await self._gossip.start()
            if self._shared is None:
                await self._take_clients(desk)
                await self._take_operators(admin, bind(listen.admin_host, listen.admin_port))
            else:
                self._decider = Decider(desk, self._keys)
                self._decider.listen(self._shared.path)
                self._ports.append(self._shared.port)
                await self._take_operators(admin, self._shared.admin)
        except OSError as error:
            await self.stop()
            raise ConfigError(f"the router cannot listen: {error.strerror or error}") from error
        except ConfigError:
            await self.stop()
            raise
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
        if self._decider is not None:
            self._decider.stop()
        if self._admin is not None:
            await self._admin.cleanup()
            self._admin = None
        if self._proxy is not None:
            self._proxy.close()
        for part in (self._gossip, self._sources, self._fleet, self._health, self._poller):
            if part is not None:
                await part.stop()
        if self._session is not None:
            await self._session.close()
        if self._api is not None:
            await self._api.close()
        await asyncio.to_thread(self.dispatcher.close)

    @property
    def fleet(self) -> Fleet:
        """The replicas, once started."""
        assert self._fleet is not None
        return self._fleet

    def read_anew(self) -> None:
        """Read the API keys and the file of replicas anew; what is wrong changes nothing."""
        self.reload_keys()
        if self._sources is not None:
            self._sources.read_anew()

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
            if self._decider is not None:  # this may be a thread
                self._decider.loop.call_soon_threadsafe(self._decider.tell_keys, keys)
            _log.info("the API keys have been read anew")

    @property
    def in_flight(self) -> int:
        """How many requests are in progress."""
        return self.telemetry.in_flight

    async def drain(self) -> int:
        """Let clients go elsewhere and wait for requests in progress, at most `drain_s`.

        Returns:
            How many are still there.
        """
        if self._desk is not None:
            self._desk.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                if self._server is not None:
                    await self._server.leave(self.config.unready_s, self._server.stop_listening)
                if self._decider is not None:
                    await self._decider.leave()
                while self.telemetry.in_flight:
                    await asyncio.sleep(0.05)
        return self.telemetry.in_flight

    async def _take_clients(self, desk: LocalDesk) -> None:
        config, clock = self.config, self.dispatcher.clock
        self._proxy = Proxy(config.request, clock, self._upstream_key, config.disaggregation)
        self._api = Api(config, desk, self.dispatcher.reader, self._proxy, self._keys, clock)
        self._server = self._api.server()
        self._ports.append(await self._server.start(config.listen.host, config.listen.port))

    async def _take_operators(self, admin: Admin, listener: socket.socket) -> None:
        self._admin = web.AppRunner(
            admin.app(),
            access_log=None,
            logger=http_logger,
            shutdown_timeout=1.0,
            lingering_time=1.0,
        )
        await self._admin.setup()
        _, port = await listen_at(self._admin, listener)
        self._ports.append(port)

    def _workers(self) -> list[dict[str, int]]:
        """The processes that carry requests."""
        if self._decider is not None:
            return self._decider.workers
        return [{"pid": os.getpid(), "requests": self.telemetry.in_flight}]

    def _metrics_page(self) -> Reply:
        page = Exposition()
        self.telemetry.write(page)
        page.gauge("servegym_router_workers", "Processes that carry requests", len(self._workers()))
        if self._decider is not None:
            page.counter(
                "servegym_router_workers_lost",
                "Processes that carried requests and have gone",
                [({}, self._decider.num_lost)],
            )
            page.histogram(
                "servegym_worker_event_loop_lag_seconds",
                "How much later than asked the event loops of workers wake who waits",
                self._decider.lag,
            )
            add_workers(page, [worker["pid"] for worker in self._workers()])
        add_dispatcher(page, self.dispatcher)
        if self._gossip is not None:
            self._gossip.write(page)
        if self._health is not None:
            ejections = {
                slot: standing.num_ejections
                for slot, standing in self._health.ejection.standings.items()
            }
            page.counter(
                "servegym_replica_ejections",
                "Times a replica was left alone for what became of requests there",
                self._by_name(ejections),
            )
        if self._poller is not None:
            page.counter(
                "servegym_replica_failed_polls",
                "Polls of engine metrics that failed",
                self._by_name(self._poller.num_failed),
            )
        page.gauge("servegym_build_info", "What runs", 1.0, version=__version__)
        page.histogram(
            "servegym_event_loop_lag_seconds",
            "How much later than asked the event loop wakes who waits",
            self._lag,
        )
        add_process(page)
        return Reply(200, page.page().encode(), [("Content-Type", CONTENT_TYPE)])

    def _by_name(self, counts: Mapping[int, int]) -> list[tuple[dict[str, str], int]]:
        """Name what is counted by slot; one that leaves may have the name of one that has come."""
        named: Counter[str] = Counter()
        for slot, count in sorted(counts.items()):
            named[self.dispatcher.names[slot]] += count
        return [({"replica": name}, count) for name, count in named.items()]


def serve(config: RouterConfig, ready: Callable[[Router], None]) -> None:
    """Run a router until it is told to stop (SIGTERM, SIGINT), then let it drain.

    SIGHUP reads the API keys and the file of replicas anew, and stops nothing.

    Args:
        config: Its configuration, with one worker; see `workers.supervisor` for several.
        ready: Called once it serves.

    Raises:
        ServeGymError: If the configuration cannot be used.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve_until_told(Router(config), ready))
