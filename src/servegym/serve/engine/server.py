"""One replica's HTTP server: OpenAI's endpoints, the engine's metrics, and faults."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from aiohttp import web

from servegym.cluster.spec import Role
from servegym.errors import ConfigError, ServeGymError, WorkloadError
from servegym.serve.engine import asks
from servegym.serve.engine.content import Content, answer_text, request_digest
from servegym.serve.engine.faults import Fault
from servegym.serve.engine.handovers import Handovers, NoKvError
from servegym.serve.engine.metrics import EngineMetrics
from servegym.serve.engine.pacer import Pacer
from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest, Status
from servegym.serve.engine.roles import DecodeReplica, Kept, PrefillReplica
from servegym.serve.engine.stream import Stream
from servegym.serve.listening import listen
from servegym.serve.monitoring.prometheus import CONTENT_TYPE

#: Largest body taken, bytes: room for a prompt of 128k tokens, whatever the encoding.
MAX_BODY_BYTES = 8 * 1024 * 1024
#: Where TensorRT-LLM's server has its metrics; for routers' sake they are at `/metrics` too.
TRTLLM_METRICS_PATH = "/prometheus/metrics"
#: Sets the length of an answer, as the field `output_tokens` of a body does.
OUTPUT_TOKENS_HEADER = "X-Output-Tokens"


class EngineServer:
    """Serves one replica on one port.

    Args:
        index: The replica in its scenario.
        replica: Its engine.
        metrics: What the engine reports to.
        model_name: As clients must name it.
        speed: Seconds of the replica's clock in one real second.
        draw_tokens: Length of the answer to a request, from the digest of the request.
        stamped: Whether events tell when they were sent; see `Stream`.
        role: What it does of a request.
        handovers: Of the fleet's KV.
        source_kinds: Of the replicas that prefill, the kind of each for those that fetch.
        origin_s: When all clocks of the fleet are at 0; see `Pacer`.

    Attributes:
        role: As given.
        faults: What is wrong just now, in words.
    """

    def __init__(
        self,
        index: int,
        replica: Replica,
        metrics: EngineMetrics,
        *,
        model_name: str,
        speed: float,
        draw_tokens: Callable[[bytes], int],
        stamped: bool = False,
        role: Role = "mixed",
        handovers: Handovers | None = None,
        source_kinds: Mapping[int, int] = MappingProxyType({}),
        origin_s: float | None = None,
    ) -> None:
        self.index = index
        self.role = role
        self.faults: set[str] = set()
        self._replica = replica
        self._metrics = metrics
        self._model_name = model_name
        self._draw_tokens = draw_tokens
        self._stamped = stamped
        self._streams: dict[EngineRequest, Stream] = {}
        self._pacer = Pacer(replica, speed, self._deliver, origin_s=origin_s)
        self._handovers = handovers
        self._source_kinds = source_kinds
        self._frozen_page = ""
        self._address: tuple[str, int] = ("", 0)
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        trtllm = replica.kind.engine == "trtllm"
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics_page),
                *([web.get(TRTLLM_METRICS_PATH, self._metrics_page)] if trtllm else []),
            ]
        )
        # a client that goes away cancels its handler, which aborts the request
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        self._site: web.SockSite | None = None

    @property
    def url(self) -> str:
        """Address that the server listens at."""
        host, port = self._address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def kind_name(self) -> str:
        """Name of the replica type."""
        return self._replica.kind.name

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one.

        Raises:
            ConfigError: If the address cannot be had.
        """
        await self._runner.setup()
        self._address = (host, port)
        await self._listen()

    async def _listen(self) -> None:
        host, port = self._address
        try:
            self._site, port = await listen(self._runner, host, port)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {host}:{port} ({reason}): choose another --host or --port"
            ) from error
        self._address = (host, port)

    async def stop(self) -> None:
        """Close all connections and do no more steps."""
        self._pacer.stop()
        self._drop_connections()
        await self._runner.cleanup()

    async def apply(self, fault: Fault) -> None:
        """Let a fault happen, or end."""
        kind = fault.kind
        if kind == "recover":
            await self._recover()
            return
        self.faults = {f for f in self.faults if not f.startswith(kind)}
        self.faults.add(f"{kind}={fault.value:g}" if kind == "slow" else kind)
        if kind == "slow":
            self._pacer.set_multiplier(1.0 / fault.value)
        elif kind == "hang":
            self._pacer.hang()
        elif kind == "metrics-frozen":
            self._frozen_page = self._page()
        elif kind == "fail":
            if self._site is not None:
                await self._site.stop()
                self._site = None
            self._pacer.fail()
            if self._handovers is not None:
                self._handovers.lose(self.index)
            self._drop_connections()
            await asyncio.sleep(0.01)  # those that were just being accepted
            self._drop_connections()

    async def _recover(self) -> None:
        self.faults = set()
        self._pacer.set_multiplier(1.0)
        self._pacer.resume()
        if self._site is None:
            await self._listen()

    def _drop_connections(self) -> None:
        if self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    def state(self) -> dict[str, object]:
        """Return what an operator wants to see."""
        lateness, replica = self._pacer.lateness_s, self._replica
        return {
            "replica": self.index,
            "kind": self.kind_name,
            "role": self.role,
            "num_kept": replica.num_kept if isinstance(replica, PrefillReplica) else 0,
            "url": self.url,
            "faults": sorted(self.faults),
            "num_running": self._replica.num_running,
            "num_waiting": self._replica.num_waiting,
            "kv_cache_usage": self._replica.kv_usage,
            "num_streams": len(self._streams),
            "steps": lateness.count,
            "lateness_mean_s": lateness.total / max(lateness.count, 1),
            "lateness_p50_s": lateness.quantile(0.5),
            "lateness_p99_s": lateness.quantile(0.99),
        }

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, asks.Completion)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, asks.Chat)

    async def _answer(
        self, http: web.Request, kind: type[asks.Completion] | type[asks.Chat]
    ) -> web.StreamResponse:
        if "drain" in self.faults:
            return _refusal(503, "ServiceUnavailable", "this replica takes no new requests")
        try:
            ask = asks.parse(kind, await http.read())
            if ask.model not in (None, self._model_name):
                return _refusal(
                    404, "NotFoundError", f"the model {ask.model!r} is not {self._model_name!r}"
                )
            stream = self._stream(ask, kind is asks.Chat, http.headers)
            self._submit(ask, stream.request)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(
                413, "BadRequestError", f"a body may have at most {MAX_BODY_BYTES} bytes"
            )
        except NoKvError as error:
            return _refusal(500, "InternalServerError", str(error))
        except ServeGymError as error:
            return _refusal(400, "BadRequestError", str(error))
        self._streams[stream.request] = stream
        try:
            if not ask.stream:
                await stream.done.wait()
                return web.json_response(stream.document() | self._kept(stream.request))
            response = await stream.open(http)
            await stream.done.wait()
            await response.write_eof(stream.rest(ask.include_usage))
            return response
        except ConnectionError:  # the client went away while the end was being written
            return web.Response(status=499)
        finally:
            del self._streams[stream.request]
            if stream.request.status != Status.FINISHED:
                self._pacer.abort(stream.request)
                self._metrics.aborted()

    def _stream(
        self, ask: asks.Completion | asks.Chat, chat: bool, headers: Mapping[str, str]
    ) -> Stream:
        prompt = ask.text
        digest = request_digest(prompt, ask.seed)
        size = self._replica.block_size
        room = self._replica.capacity_tokens + 1 - Content(prompt, "", size).prompt_tokens
        natural = ask.output_tokens or output_tokens(headers) or self._draw_tokens(digest)
        tokens, finish_reason = asks.answer(ask, natural, room)
        if isinstance(self._replica, PrefillReplica):
            tokens = 1  # of which nobody wants more here
        text = answer_text(digest, tokens)
        content = Content(prompt, text, size)
        name = headers.get("X-Request-Id") or secrets.token_hex(16)
        request = EngineRequest(
            f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            content.prompt_tokens,
            tokens,
            content.identity,
            ask.priority or 0,
            finish_reason,
        )
        return Stream(
            request,
            text,
            chat=chat,
            model_name=self._model_name,
            fingerprint=f"replica-{self.index}",
            stamped=self._stamped,
        )

    def _submit(self, ask: asks.Completion | asks.Chat, request: EngineRequest) -> None:
        """Put a request into the waiting queue, with the KV that is kept for it if it has some.

        Raises:
            ServeGymError: If it cannot be served here.
        """
        replica = self._replica
        if isinstance(replica, PrefillReplica):
            if not ask.keeps_kv or ask.stream:
                raise WorkloadError(
                    f"replica-{self.index} only prefills: ask it without a stream, with "
                    "kv_transfer_params in which do_remote_decode is true"
                )
        elif ask.fetches_kv and ask.kv_transfer_params is not None:
            if not isinstance(replica, DecodeReplica) or self._handovers is None:
                raise WorkloadError(
                    f"replica-{self.index} fetches no KV: its scenario has no roles"
                )
            kept = self._handovers.take(ask.kv_transfer_params, request.prompt_tokens)
            kind = self._source_kinds[kept.source]
            self._pacer.do(lambda now_s: replica.fetch(request, kept, kind, now_s))
            return
        self._pacer.submit(request)

    def _kept(self, request: EngineRequest) -> dict[str, Any]:
        """Return what tells another replica where the KV of a prefilled request is."""
        replica, handovers = self._replica, self._handovers
        if not isinstance(replica, PrefillReplica) or handovers is None:
            return {}

        def release(_: float) -> None:
            self._pacer.do(lambda now_s: replica.release(request, now_s))

        kept = Kept(self.index, request.prompt_tokens, release)
        num_blocks = -(-request.prompt_tokens // replica.block_size)
        return {"kv_transfer_params": handovers.keep(request.request_id, kept, num_blocks)}

    def _deliver(self, request: EngineRequest) -> None:
        stream = self._streams.get(request)
        if stream is not None:
            stream.send(self._replica.generated(request))

    async def _models(self, _: web.Request) -> web.Response:
        model = {
            "id": self._model_name,
            "object": "model",
            "owned_by": "servegym",
            "max_model_len": self._replica.capacity_tokens,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if "drain" in self.faults else 200)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        if "metrics-off" in self.faults:
            return web.Response(status=503)
        page = self._frozen_page if "metrics-frozen" in self.faults else self._page()
        return web.Response(body=page.encode(), headers={"Content-Type": CONTENT_TYPE})

    def _page(self) -> str:
        return self._metrics.page(self._replica, self._pacer.lateness_s)


def output_tokens(headers: Mapping[str, str]) -> int | None:
    """Read the header that sets the length of an answer; `None` if it is not there.

    Raises:
        WorkloadError: If it is no length.
    """
    text = headers.get(OUTPUT_TOKENS_HEADER)
    if text is None:
        return None
    if not (text.isdecimal() and len(text) <= 10 and 0 < int(text) <= asks.MAX_TOKENS):
        raise WorkloadError(
            f"{OUTPUT_TOKENS_HEADER} must be a number from 1 to {asks.MAX_TOKENS}, got {text:.40}"
        )
    return int(text)


def _refusal(status: int, kind: str, message: str) -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)
