"""The endpoint picker: Envoy's external processing in front of a dispatcher."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from functools import partial

import aiohttp
import grpc
from aiohttp import web
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servegym.errors import ConfigError
from servegym.serve.discovery.replicas_file import ReplicasFile
from servegym.serve.discovery.sources import Sources
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.facts import fleet_facts
from servegym.serve.gossip.gossip import Gossip
from servegym.serve.listening import listen
from servegym.serve.loaded_policy import LoadedPolicy
from servegym.serve.monitoring.exposition import add_dispatcher
from servegym.serve.monitoring.metrics import metric_names
from servegym.serve.monitoring.poller import MetricsPoller
from servegym.serve.monitoring.prometheus import CONTENT_TYPE, Exposition
from servegym.serve.picker.binding import bind
from servegym.serve.picker.config import PickerConfig, check_endpoint
from servegym.serve.picker.desk import PickerDesk
from servegym.serve.picker.ends import AssumedEnds
from servegym.serve.picker.exchange import Exchange
from servegym.serve.picker.reading import Reading
from servegym.serve.picker.unseen import require_seen
from servegym.serve.picker.wire import METHOD, SERVICE, BodyMode, Message, read
from servegym.serve.router.admin import Admin
from servegym.serve.router.fleet import Fleet
from servegym.serve.router.health import Health
from servegym.serve.router.http_log import http_logger
from servegym.serve.router.pages import Pages
from servegym.serve.router.reply import Reply
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.until_told import serve_until_told

_log = logging.getLogger(__name__)

#: Names under which gateways and Kubernetes ask for the picker's health, by the endpoint picker
#: protocol; the empty one is gRPC's for the whole server.
_READY = ("", "readiness", SERVICE)
_ALIVE = "liveness"
_REQUEST_MODES = {
    "full-duplex": BodyMode.FULL_DUPLEX_STREAMED,
    "buffered": BodyMode.BUFFERED,
    "none": BodyMode.NONE,
}
#: Beyond `max_body_bytes`: what a message has beside a body that comes in one piece.
_MESSAGE_BYTES = 1_000_000


class Picker:
    """A running endpoint picker; also the way to have one inside another program.

    Args:
        config: See `PickerConfig`.

    Attributes:
        config: As given.
        dispatcher: Decides and keeps the books.
        telemetry: Counts of requests, as the router's.
        ends: Of requests whose answers are not seen.

    Raises:
        ServeGymError: If a part of the configuration cannot be used.
    """

    def __init__(self, config: PickerConfig) -> None:
        self.config = config
        self.telemetry = Telemetry()
        self._names = metric_names(config.metrics.engine)
        self._file = ReplicasFile(config.replicas_file) if config.replicas_file else None
        if self._file is not None:
            replicas = self._file.read()  # wrong at the start is wrong
            try:
                for replica in replicas:
                    check_endpoint(replica)
            except ConfigError as error:
                raise ConfigError(f"{config.replicas_file}: {error}") from error
        self.dispatcher = Dispatcher(
            config.dispatch,
            [replica.name for replica in config.replicas],
            fleet_facts([replica.facts for replica in config.replicas]),
        )
        self._gossip = Gossip(config.peers, self.dispatcher) if config.peers else None
        self.ends = AssumedEnds(config.ends, self.dispatcher)
        self._request_mode = _REQUEST_MODES[config.request_body]
        if config.response != "bodies":
            self._require_seen()
        self._server: grpc.aio.Server | None = None
        self._grpc_health = grpc_health.aio.HealthServicer()
        self._session: aiohttp.ClientSession | None = None
        self._health: Health | None = None
        self._poller: MetricsPoller | None = None
        self._desk: PickerDesk | None = None
        self._fleet: Fleet | None = None
        self._sources: Sources | None = None
        self._reading = Reading(
            config.request,
            self.dispatcher.reader,
            config.dispatch.prefix.bytes_per_token,
            self.dispatcher.clock,
        )
        self._admin: web.AppRunner | None = None
        self._looking: asyncio.Task[None] | None = None
        self._complained = False
        self.port = 0
        self.admin_port = 0

    def _require_seen(self) -> None:
        """Refuse policies, now and later, that go by what is not seen."""
        runtime = self.dispatcher.runtime
        runtime.condition = partial(require_seen, response=self.config.response)
        runtime.condition(LoadedPolicy(runtime.config.fallback, runtime.fallback))
        try:
            if runtime.loaded is not None:
                runtime.condition(runtime.loaded)
        except ConfigError as error:
            if runtime.config.require_policy:
                raise
            runtime.loaded = None
            runtime.counters.num_refused += 1
            _log.error("%s; %s decides", error, runtime.config.fallback)

    async def start(self) -> None:
        """Begin to serve; every replica has been looked at once before.

        Raises:
            ConfigError: If an address cannot be listened on, or a certificate cannot be used.
        """
        config = self.config
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._health = Health(config.health, self.dispatcher, self._session)
        self._poller = MetricsPoller(
            self._names,
            self.dispatcher,
            self._session,
            interval_s=config.metrics.interval_s,
            timeout_s=config.metrics.timeout_s,
        )
        pages = Pages(self._health, self._metrics_page)
        self._desk = desk = PickerDesk(config, self.dispatcher, self._health, self.telemetry, pages)
        self._fleet = Fleet(
            config.replicas,
            self.dispatcher,
            self._health,
            self._poller,
            desk,
            self.telemetry,
            partial(check_endpoint, response=config.response),
        )
        self._sources = Sources(self._fleet, self._file, config.discover)
        admin = Admin(
            self.dispatcher,
            self._health,
            self._fleet,
            self._metrics_page,
            lambda: desk.show("/health"),
            lambda: [{"pid": os.getpid(), "requests": self.telemetry.in_flight}],
            self._gossip.status if self._gossip else list,
        )
        try:
            await self._sources.start()
            await self._health.start()
            await self._poller.start()
            if self._gossip is not None:
                await self._gossip.start()
            self._looking = asyncio.create_task(self.ends.run())
            await self._listen_for_operators(admin)
            await self._serve()
        except OSError as error:
            await self.stop()
            raise ConfigError(f"the picker cannot listen: {error.strerror or error}") from error
        except ConfigError:
            await self.stop()
            raise

    async def _serve(self) -> None:
        config = self.config
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.request.max_body_bytes + _MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),  # a second picker on the port is a mistake
            ],
            maximum_concurrent_rpcs=config.listen.max_streams,
        )
        process = grpc.stream_stream_rpc_method_handler(
            self.process, request_deserializer=read, response_serializer=None
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: process}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._grpc_health, self._server)
        self.port = bind(self._server, config.listen)
        await self._server.start()
        await self._tell_health(ready=True)

    async def _listen_for_operators(self, admin: Admin) -> None:
        self._admin = web.AppRunner(
            admin.app(), access_log=None, logger=http_logger, shutdown_timeout=1.0
        )
        await self._admin.setup()
        _, self.admin_port = await listen(self._admin, "127.0.0.1", self.config.listen.admin_port)

    async def stop(self) -> None:
        """Stop serving; conversations in progress are cut off. See `drain`."""
        if self._server is not None:
            await self._server.stop(grace=None)
        if self._looking is not None:
            self._looking.cancel()
        if self._admin is not None:
            await self._admin.cleanup()
        for part in (self._gossip, self._sources, self._fleet, self._health, self._poller):
            if part is not None:
                await part.stop()
        if self._session is not None:
            await self._session.close()
        self._reading.close()
        await asyncio.to_thread(self.dispatcher.close)

    @property
    def fleet(self) -> Fleet:
        """The replicas, once started."""
        assert self._fleet is not None
        return self._fleet

    def read_anew(self) -> None:
        """Read the file of replicas anew; what is wrong changes nothing."""
        if self._sources is not None:
            self._sources.read_anew()

    @property
    def in_flight(self) -> int:
        """How many conversations are in progress."""
        return self.telemetry.in_flight

    async def drain(self) -> int:
        """Tell gateways to go elsewhere and wait for what is in progress, at most `drain_s`.

        Returns:
            How many conversations are still there.
        """
        await self._tell_health(ready=False)
        if self._desk is not None:
            self._desk.stopping = True
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self.config.drain_s
        while self.telemetry.in_flight and loop.time() < until_s:
            await asyncio.sleep(0.05)
        return self.telemetry.in_flight

    async def process(
        self, messages: AsyncIterator[Message], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        """Answer one request's messages; gRPC calls it.

        What goes wrong here ends the stream with an error, and the gateway's failure mode says
        what becomes of the request.
        """
        exchange = self._exchange()
        try:
            async for message in messages:
                self._compare(message)
                for answer in await exchange.take(message):
                    yield answer
                if exchange.over:
                    return
        finally:
            exchange.close()

    def _exchange(self) -> Exchange:
        assert self._desk is not None
        response = self.config.response
        return Exchange(
            self._desk,
            self._reading,
            self.ends,
            (
                self._request_mode,
                BodyMode.STREAMED if response == "bodies" else BodyMode.NONE,
            ),
            sees_headers=response != "none",
        )

    def _compare(self, message: Message) -> None:
        """Say once that the gateway sends less of answers than the file says."""
        if message.modes is None or self._complained or self.config.response != "bodies":
            return
        if message.modes[1] is BodyMode.NONE:
            self._complained = True
            _log.error(
                "the gateway sends no bodies of answers (response_body_mode NONE) and the file "
                "says response: bodies: ends of requests are guessed, and the policy may go by "
                "what nobody sees; correct one of the two"
            )

    async def _tell_health(self, *, ready: bool) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in _READY:
            await self._grpc_health.set(name, status)
        await self._grpc_health.set(_ALIVE, serving)

    def _metrics_page(self) -> Reply:
        page = Exposition()
        self.telemetry.write(page)
        add_dispatcher(page, self.dispatcher)
        if self._gossip is not None:
            self._gossip.write(page)
        page.counter(
            "servegym_picker_assumed_ends",
            "Requests that counted as ended without a sign of it",
            [
                ({"by": "count"}, self.ends.num_counted),
                ({"by": "time"}, self.ends.num_timed),
            ],
        )
        return Reply(200, page.page().encode(), [("Content-Type", CONTENT_TYPE)])


def serve(config: PickerConfig, ready: Callable[[Picker], None]) -> None:
    """Run a picker until it is told to stop (SIGTERM, SIGINT), then let it drain.

    SIGHUP reads the file of replicas anew, and stops nothing.

    Args:
        config: Its configuration.
        ready: Called once it serves.

    Raises:
        ServeGymError: If the configuration cannot be used.
    """
    # uvloop makes no difference here: gRPC waits for sockets in a thread of its own
    asyncio.run(serve_until_told(Picker(config), ready))
