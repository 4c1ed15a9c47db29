"""A tiny engine: OpenAI's endpoints and vLLM's metrics, with faults on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from aiohttp import web

from servegym.serve.router.forms import FORMS


class Upstream:
    """One replica, on a free port.

    Attributes:
        adapters: Names of those that it has loaded.
        mode: What it does with requests: `ok`, `hang` (says nothing until `go_on`), `headers`
            (says 200 and no more), `pause` (stands still behind its first token until `go_on`),
            `die` (breaks off after half of its tokens), `die_first` (breaks
            off at once), `error` (an error event in the stream), `error_first` (instead of its
            first token), or a status to answer.
        go_on: Set to let those go on that hang or pause.
        script: Pieces of a stream, in place of its tokens; a number is a pause in seconds.
        streams_always: It streams whatever it is asked.
        refusal: Headers beside a status.
        said: Body beside a status.
        poison: A prompt that makes any engine answer 500.
        healthy: What its health check says.
        tokens: Events of an answer.
        gap_s: Between them.
        params: What it says of the KV that it keeps for another, if it is asked to keep it.
        document: Its answer to what is no completion.
        bodies: Requests it got.
        others: Path and body of requests that are no completions.
        headers: Their headers.
        queries: Their query strings, as they came.
        cancelled: Requests whose connection went away.
        sent: Events it has written.
    """

    def __init__(self, model: str = "m") -> None:
        self.model = model
        self.adapters: list[str] = []
        self.mode: str | int = "ok"
        self.healthy = True
        self.metrics = True
        self.tokens = 5
        self.gap_s = 0.0
        self.go_on = asyncio.Event()
        self.script: list[bytes | float] | None = None
        self.streams_always = False
        self.refusal: dict[str, str] = {}
        self.said = b'{"error": {"message": "no"}}'
        self.poison: str | None = None
        self.pad = ""
        self.params: dict | None = None
        self.document: dict = {}
        self.bodies: list[dict] = []
        self.others: list[tuple[str, bytes]] = []
        self.headers: list[Mapping[str, str]] = []
        self.queries: list[str] = []
        self.cancelled = 0
        self.sent = 0
        self.running = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        for path in FORMS:
            completes = path.endswith("/completions")
            app.router.add_post(path, self._complete if completes else self._other)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, request):
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request):
        return web.json_response(
            {
                "object": "list",
                "data": [
                    {"id": self.model, "object": "model", "parent": None},
                    *(
                        {"id": name, "object": "model", "parent": self.model}
                        for name in self.adapters
                    ),
                ],
            }
        )

    async def _metrics(self, request):
        if not self.metrics:
            return web.Response(status=500)
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {self.running}\n'
            'vllm:num_requests_waiting{engine="0"} 0\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1\n'
        )

    async def _other(self, request):
        """Answer what is no completion: with `script` if it is there, else with `document`."""
        self.headers.append(request.headers)
        self.others.append((request.path, await request.read()))
        self.running += 1
        try:
            if self.script is not None:
                return await self._answer(request, {"stream": True})
            if isinstance(self.mode, int):
                return web.Response(status=self.mode)
            return web.json_response(self.document)
        finally:
            self.running -= 1

    async def _complete(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.queries.append(request.rel_url.raw_query_string)
        self.running += 1
        try:
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request, body):
        if isinstance(self.mode, int):
            return web.Response(
                body=self.said,
                status=self.mode,
                headers=self.refusal,
                content_type="application/json",
            )
        if self.poison is not None and body.get("prompt") == self.poison:
            return web.json_response({"error": {"message": "poison"}}, status=500)
        if self.mode == "die_first":
            request.transport.abort()
        if self.mode == "hang":
            await asyncio.wait_for(self.go_on.wait(), 60)
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": self.tokens,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        if not body.get("stream") and not self.streams_always:
            await asyncio.sleep(self.gap_s * self.tokens)
            keeps = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
            kept = {"kv_transfer_params": self.params} if keeps else {}
            return web.json_response(
                {"choices": [{"text": "x " * self.tokens}], "usage": usage} | kept,
                headers={"X-Engine": "fake"},
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.mode == "headers":
            await asyncio.sleep(60)
        if self.mode == "error_first":
            await response.write(b'data: {"error": {"message": "no memory", "code": 500}}\n\n')
            return response
        if self.script is not None:
            for piece in self.script:
                if isinstance(piece, bytes):
                    await response.write(piece)
                else:
                    await asyncio.sleep(piece)
            return response
        for i in range(self.tokens):
            if self.mode == "die" and i == self.tokens // 2:
                request.transport.abort()
                return response
            if self.mode == "pause" and i == 1:
                await asyncio.wait_for(self.go_on.wait(), 60)
            if self.mode == "error" and i == 1:
                await response.write(b'data: {"error": {"message": "out of memory"}}\n\n')
                return response
            event = {"choices": [{"text": f"t{i}{self.pad}"}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.sent += 1
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(b"data: " + json.dumps({"usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
