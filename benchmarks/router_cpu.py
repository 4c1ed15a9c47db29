"""What the router costs: CPU time for an event and for a short request, and what TTFT it adds.

    git worktree add ../before REVISION
    python benchmarks/router_cpu.py ../before --out router_cpu.json

This checkout's router, the other's, a relay of uvloop that does nothing (`bare_relay.py`) and, if
it is installed, nginx stand before the same replicas and work by turns, a second or so each, so
that whatever else the machine does meets all of them. Clients and replicas are this process:
replicas that write events as vLLM does, one piece each, and clients that count bytes. CPU time is
that of the proxy's process, by the scheduler's own count. A ratio is of two neighbouring turns; its
interval is by bootstrap over the pairs. An event is what a stream of many costs more than one of
few, so that its request is not counted.

The replicas send their first event at once: the time to it is all delay, of the proxy and of this
process. Streams come at a steady rate there, and a direct connection has its turn, too.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import uvloop
from fleet_processes import BareRelay, Nginx, Process, Router
from rich.console import Console
from rich.table import Table

from servegym.typing import FloatArray

_COLUMNS = ("before", "this", "bare relay", "nginx", "direct")
_EVENT = (
    b'data: {"id":"cmpl-%d","object":"text_completion","created":1750000000,"model":"m",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)
_END = (
    b'data: {"id":"cmpl-%d","object":"text_completion","created":1750000000,"model":"m",'
    b'"choices":[{"index":0,"text":" end","logprobs":null,"finish_reason":"length"}]}\n\n'
    b"data: [DONE]\n\n"
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_WHOLE = (
    b'{"choices":[{"index":0,"text":"x","finish_reason":"length"}],"usage":{"prompt_tokens":7}}'
)
_METRICS = (
    b'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"} 0\n'
    b'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
    b'vllm:cache_config_info{block_size="16",num_gpu_blocks="10000"} 1\n'
)


def _sized(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


class Replica(asyncio.Protocol):
    """Answers at once what is short, and streams events `gap_s` apart."""

    gap_s = 0.02

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        lower = head.lower()
        at = lower.find(b"content-length:")
        length = int(lower[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
        if not found or len(body) < length:
            return
        self._buffer = b""
        if head.startswith(b"GET /v1/models"):
            self._transport.write(_sized(b'{"data":[{"id":"m"}]}'))
        elif head.startswith(b"GET"):
            self._transport.write(_sized(_METRICS))
        elif b'"stream": true' in body:
            count = json.loads(body)["max_tokens"]
            self._transport.write(_STREAM_HEAD)
            asyncio.get_running_loop().create_task(self._stream(count))
        else:
            self._transport.write(_sized(_WHOLE))

    async def _stream(self, count: int) -> None:
        for i in range(count):
            if self._transport.is_closing():
                return
            event = _EVENT % 7 if i < count - 1 else _END % 7
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(self.gap_s)
        if not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n")


class Client(asyncio.Protocol):
    """Asks one thing after the other on one connection."""

    def __init__(self) -> None:
        self._buffer = b""
        self._ended: asyncio.Future[bytes] | None = None
        self.first_s = float("nan")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    async def ask(self, body: bytes) -> bytes:
        self._buffer = b""
        self._ended = asyncio.get_running_loop().create_future()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\n"
        self._transport.write(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        return await self._ended

    def data_received(self, data: bytes) -> None:
        if not self._buffer:
            self.first_s = time.monotonic()
        self._buffer += data
        if self._ended is None or self._ended.done():
            return
        streams = b"chunked" in self._buffer[:400].lower()
        whole = self._buffer.endswith(b"\r\n0\r\n\r\n") if streams else _WHOLE in self._buffer
        if whole:
            self._ended.set_result(self._buffer)

    def connection_lost(self, _: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionError("an answer broke off"))


@dataclass(frozen=True)
class RouterCpu:
    """Measure the routers of two checkouts by turns."""

    before: tyro.conf.Positional[Path]
    """The other checkout."""
    policy: str = "added-delay"
    """Of both routers."""
    replicas: int = 8
    """Of the fleet."""
    streams: int = 50
    """Open at once."""
    events: int = 110
    """Of a long stream; a short one has ten."""
    arrivals: int = 150
    """Streams of five events in a turn, for their TTFT."""
    rate_rps: float = 50.0
    """At which they come."""
    requests: int = 800
    """Short ones in a turn, 16 at once."""
    prompt_chars: int = 1000
    """Of every prompt; no two are equal."""
    trace: float | None = None
    """Share of its requests that this checkout's router makes spans of, by default without tracing.
    BEFORE may be this checkout, too. A replica stands in for the collector."""
    pairs: int = 10
    """Turns of each proxy."""
    out: Path | None = None
    """JSON file."""

    def run(self) -> None:
        """Measure, print and write."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(self._measure())
        document = {"settings": {k: str(v) for k, v in self.__dict__.items()}, **found}
        if self.out is not None:
            self.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
        _show(found)

    async def _measure(self) -> dict[str, dict[str, list[float]]]:
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(Replica, "127.0.0.1", 0, backlog=1024)
            for _ in range(self.replicas)
        ]
        urls = [f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}" for s in servers]
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            proxies: dict[str, Process] = {}
            for label, checkout in (("this", None), ("before", self.before)):
                router = await asyncio.to_thread(self._router, folder, urls, checkout)
                proxies[label] = stack.enter_context(router)
            bare = await asyncio.to_thread(BareRelay, urls)
            proxies["bare relay"] = stack.enter_context(bare)
            try:
                nginx = await asyncio.to_thread(Nginx, folder, urls)
                proxies["nginx"] = stack.enter_context(nginx)
            except RuntimeError as error:
                Console(stderr=True).print(f"without nginx: {error}")
            found: dict[str, dict[str, list[float]]] = {
                kind: {label: [] for label in (*proxies, "direct")}
                for kind in ("event", "request", "ttft_ms")
            }
            ports = {label: proxy.url for label, proxy in proxies.items()} | {"direct": urls[0]}
            for turn in range(-1, self.pairs):  # the first one is not counted
                for label, url in ports.items():
                    ttft_ms = await self._arrive(url, turn)
                    found["ttft_ms"][label] += ttft_ms if turn >= 0 else []
                # who comes after the direct connection finds the processor otherwise: by turns, too
                for label, proxy in list(proxies.items())[:: 1 if turn % 2 else -1]:
                    for kind, measure in (("event", self._events), ("request", self._requests)):
                        used_us = await measure(proxy, turn)
                        found[kind][label] += [used_us] if turn >= 0 else []
        for server in servers:
            server.close()
        return found

    def _router(self, folder: Path, urls: Sequence[str], checkout: Path | None) -> Router:
        rates = {"prefill_tokens_per_s": 20_000.0, "decode_step_s": 0.01}
        entries = [{"name": f"r{i}", "url": url, "rates": rates} for i, url in enumerate(urls)]
        more: dict[str, object] = {}
        if self.trace is not None and checkout is None:
            more["tracing"] = {"endpoint": f"{urls[0]}/v1/traces", "sample": self.trace}
        return Router(
            folder,
            entries,
            checkout=checkout,
            **more,
            dispatch={"runtime": {"policy": self.policy, "max_metrics_age_s": 60.0}},
            # what is measured is requests, not polls
            metrics={"interval_s": 5.0},
            health={"interval_s": 5.0},
        )

    async def _clients(self, url: str, count: int) -> list[Client]:
        loop = asyncio.get_running_loop()
        port = int(url.rpartition(":")[2])
        made = [await loop.create_connection(Client, "127.0.0.1", port) for _ in range(count)]
        return [client for _, client in made]

    def _body(self, key: str, **more: object) -> bytes:
        prompt = f"{key} ".ljust(self.prompt_chars, "z")
        return json.dumps({"model": "m", "prompt": prompt, **more}).encode()

    async def _events(self, proxy: Process, turn: int) -> float:
        few_s = await self._streams(proxy, f"few {turn}", 10)
        many_s = await self._streams(proxy, f"many {turn}", self.events)
        return 1e6 * (many_s - few_s) / (self.streams * (self.events - 10))

    async def _streams(self, proxy: Process, key: str, events: int) -> float:
        """Return the CPU seconds of streams of so many events."""
        clients = await self._clients(proxy.url, self.streams)
        begin_s = proxy.cpu_s
        answers = await asyncio.gather(
            *(
                client.ask(self._body(f"{key} {i}", max_tokens=events, stream=True))
                for i, client in enumerate(clients)
            )
        )
        used_s = proxy.cpu_s - begin_s
        assert all(answer.count(b"data: {") == events for answer in answers)
        for client in clients:
            client._transport.close()
        return used_s

    async def _arrive(self, url: str, turn: int) -> list[float]:
        """Return the milliseconds to the first byte of streams that come at a steady rate."""
        clients = await self._clients(url, self.arrivals)
        begin_s = time.monotonic()

        async def play(i: int) -> float:
            await asyncio.sleep(begin_s + i / self.rate_rps - time.monotonic())
            sent_s = time.monotonic()
            await clients[i].ask(self._body(f"ttft {turn} {i}", max_tokens=5, stream=True))
            return 1e3 * (clients[i].first_s - sent_s)

        found = await asyncio.gather(*(play(i) for i in range(self.arrivals)))
        for client in clients:
            client._transport.close()
        return list(found)

    async def _requests(self, proxy: Process, turn: int) -> float:
        clients = await self._clients(proxy.url, 16)

        async def play(i: int) -> None:
            for k in range(self.requests // 16):
                await clients[i].ask(self._body(f"short {turn} {i} {k}", max_tokens=1))

        begin_s, began_s = proxy.cpu_s, time.monotonic()
        await asyncio.gather(*(play(i) for i in range(16)))
        used_s = proxy.cpu_s - begin_s
        assert time.monotonic() - began_s < 600.0
        for client in clients:
            client._transport.close()
        return 1e6 * used_s / (self.requests // 16 * 16)


def interval(ratios: FloatArray) -> tuple[float, float, float]:
    """Return the median and its 95 % interval."""
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def _show(found: dict[str, dict[str, list[float]]]) -> None:
    names = [name for name in _COLUMNS if found["ttft_ms"].get(name)]
    table = Table(title="CPU time of the proxy, and milliseconds to the first byte of streams")
    for column in ("", *names, "before / this"):
        table.add_column(column, justify="right")
    for kind in ("event", "request"):
        by = found[kind]
        ratio = interval(np.array(by["before"]) / np.array(by["this"]))
        row = [f"{np.median(by[name]):.0f} µs" if by[name] else "-" for name in names]
        table.add_row(kind, *row, "{:.2f} [{:.2f}, {:.2f}]".format(*ratio))
    for share in (0.5, 0.99):
        row = [f"{np.quantile(found['ttft_ms'][name], share):.2f}" for name in names]
        table.add_row(f"ttft p{100 * share:.0f}", *row, "")
    Console(width=100).print(table)


if __name__ == "__main__":
    tyro.cli(RouterCpu).run()
