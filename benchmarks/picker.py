"""What the endpoint picker costs: time and CPU of a request's messages, over loopback.

    python benchmarks/picker.py [--seconds 10]

A client in this process plays the gateway's part, the picker is a process of its own, and eight
replicas answer health checks and metrics alone. Beside the picker works, by turns, a process that
gives the same answers and does nothing else: what is left between the two is servegym's, the rest
is gRPC for Python. CPU time is that of all threads of a process, by the scheduler's own count.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tyro
import yaml
from aiohttp import web
from fleet_processes import Process, free_ports

from servegym.serve.picker.wire import (
    _CLASSES,
    METHOD,
    SERVICE,
    Body,
    Destination,
    Direction,
    Message,
    pass_headers,
    read,
    stream_body,
)

REPLICAS = 8
ROUNDS = 3
#: Events of a stream that costs and of one that it is compared with.
FEW, MANY = 1, 101
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1750000000,"model":"m",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = EVENT.replace(b'"finish_reason":null', b'"finish_reason":"length"') + b"data: [DONE]\n\n"


@dataclass
class Args:
    """What is measured."""

    seconds: float = 10.0
    """How long each turn takes."""
    echo: int | None = None
    """Be the process that only gives answers, on this port."""


def message(kind: str, part: Any, *, first: bool = False) -> bytes:
    """Write a message of a gateway."""
    made = _CLASSES["ProcessingRequest"]()
    getattr(made, kind).CopyFrom(part)
    if first:
        made.protocol_config.request_body_mode = made.protocol_config.response_body_mode = 4
    return made.SerializeToString()


def headers(**fields: str) -> Any:
    """Write headers; `_path` stands for `:path`."""
    part = _CLASSES["HttpHeaders"]()
    for key, value in fields.items():
        name = ":" + key[1:] if key.startswith("_") else key.replace("_", "-")
        part.headers.headers.add(key=name, raw_value=value.encode())
    return part


def body(data: bytes, *, ends: bool) -> Any:
    """Write a piece of a body."""
    return _CLASSES["HttpBody"](body=data, end_of_stream=ends)


@dataclass
class Script:
    """A request and its answer, ready to be sent.

    Attributes:
        asked: Messages up to the last of the request.
        num_placed: Answers until it has its destination and its body back.
        answered: Messages of the answer; each is answered by one.
    """

    asked: list[bytes]
    num_placed: int
    answered: list[bytes]


def script(prompt_bytes: int, num_events: int) -> Script:
    """Write a request for a stream."""
    asked = json.dumps({"model": "m", "prompt": "x" * prompt_bytes, "stream": True}).encode()
    fields = {"_method": "POST", "_path": "/v1/completions", "content_type": "application/json"}
    pieces = [asked[i : i + 16_384] for i in range(0, len(asked), 16_384)]  # as Envoy reads them
    return Script(
        [message("request_headers", headers(**fields), first=True)]
        + [
            message("request_body", body(piece, ends=i == len(pieces) - 1))
            for i, piece in enumerate(pieces)
        ],
        1 + len(list(stream_body(Direction.REQUEST, asked, ends=True))),
        [message("response_headers", headers(_status="200", content_type="text/event-stream"))]
        + [message("response_body", body(EVENT, ends=False))] * (num_events - 1)
        + [message("response_body", body(LAST, ends=True))],
    )


async def play(stub: Any, told: Script) -> tuple[float, float]:
    """Play a request; return seconds from its last message to its destination, and in all."""
    begin_s = time.perf_counter()
    call = stub()
    for each in told.asked[:-1]:
        await call.write(each)
    sent_s = time.perf_counter()
    await call.write(told.asked[-1])
    await call.read()
    placed_s = time.perf_counter()
    for _ in range(told.num_placed - 1):
        await call.read()
    for each in told.answered:
        await call.write(each)
        await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return placed_s - sent_s, time.perf_counter() - begin_s


async def turn(port: int, told: Script, at_once: int, seconds: float) -> tuple[list[float], float]:
    """Play requests for a time; return their delays, and the time it took."""
    delays: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        await play(stub, told)
        begin_s = time.perf_counter()

        async def one_after_another() -> None:
            while time.perf_counter() - begin_s < seconds:
                delays.append((await play(stub, told))[0])

        await asyncio.gather(*(one_after_another() for _ in range(at_once)))
        return delays, time.perf_counter() - begin_s


async def echo(port: int) -> None:
    """Give the picker's answers, to whatever."""
    to = Destination(["127.0.0.1:8000"], ["accept-encoding"])

    async def process(messages: Any, context: Any) -> Any:
        whole = b""
        async for each in messages:
            assert isinstance(each, Message)
            part = each.part
            if not isinstance(part, Body):
                if part.direction is Direction.RESPONSE:
                    yield pass_headers(Direction.RESPONSE)
            elif part.direction is Direction.RESPONSE:
                for answer in stream_body(part.direction, part.data, ends=part.ends):
                    yield answer
            else:
                whole += part.data
                if part.ends:
                    yield pass_headers(Direction.REQUEST, to)
                    for answer in stream_body(Direction.REQUEST, whole, ends=True):
                        yield answer

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(process, request_deserializer=read)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def replicas(count: int) -> tuple[list[str], Callable[[], Any]]:
    """Start replicas that are healthy and idle; return their urls, and what ends them."""

    async def good(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m"}]})

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            text='vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"}'
            ' 0\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        )

    app = web.Application()
    app.router.add_get("/health", good)
    app.router.add_get("/v1/models", good)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    ports = free_ports(count)
    for port in ports:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    return [f"http://127.0.0.1:{port}" for port in ports], runner.cleanup


def picker_file(folder: Path, urls: Sequence[str], port: int, admin_port: int) -> Path:
    """Write the picker's file."""
    rates = {"prefill_tokens_per_s": 20_000, "decode_step_s": 0.01, "decode_seq_s": 0.0001}
    path = folder / "picker.yaml"
    data = {
        "listen": {"port": port, "admin_port": admin_port},
        "replicas": [
            {"name": f"r{i}", "url": url, "rates": rates | {"kv_capacity_tokens": 500_000}}
            for i, url in enumerate(urls)
        ],
        "dispatch": {"runtime": {"policy": "added-delay"}},
    }
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


async def measure(args: Args) -> None:
    """Measure both by turns and print."""
    urls, end = await replicas(REPLICAS)
    port, admin_port, echo_port = free_ports(3)
    servegym = (sys.executable, "-c", "from servegym.cli import main; main()")
    with tempfile.TemporaryDirectory() as folder:
        path = picker_file(Path(folder), urls, port, admin_port)
        with (
            Process([*servegym, "serve", "picker", "--config", str(path)]) as picker,
            Process([sys.executable, __file__, "--echo", str(echo_port)]) as bare,
        ):
            await asyncio.to_thread(picker.wait_for, f"http://127.0.0.1:{admin_port}/metrics")
            await asyncio.sleep(1.0)
            both = (("picker", port, picker), ("answers alone", echo_port, bare))
            await measure_delays(args, both)
            await measure_cpu(args, both)
    await end()
    print(f"load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")


Both = Sequence[tuple[str, int, Process]]


async def measure_delays(args: Args, both: Both) -> None:
    """Print the time to the destination, and how many are placed a second."""
    print("| | streams at once | prompt | to the destination, p50 ms | p99 ms | requests/s |")
    print("|---|--:|--:|--:|--:|--:|")
    for at_once, prompt_bytes in ((1, 1_000), (1, 128_000), (32, 1_000)):
        told = script(prompt_bytes, FEW)
        for name, port, _ in both:
            delays, took_s = await turn(port, told, at_once, args.seconds)
            p50, p99 = np.quantile(np.array(delays) * 1e3, (0.5, 0.99))
            rate = len(delays) / took_s
            size = f"{prompt_bytes // 1000} kB"
            print(f"| {name} | {at_once} | {size} | {p50:.2f} | {p99:.2f} | {rate:.0f} |")


async def measure_cpu(args: Args, both: Both) -> None:
    """Print the CPU time of a request and of an event of its answer."""
    few, many = script(1_000, FEW), script(1_000, MANY)
    print("\n| | CPU of a request, us | CPU of an event of a stream, us |")
    print("|---|--:|--:|")
    spent: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for name, port, process in both:
            for told in (few, many):
                before_s = process.cpu_s
                delays, _ = await turn(port, told, 8, args.seconds / ROUNDS)
                each_s = (process.cpu_s - before_s) / (len(delays) + 1)
                spent.setdefault((name, len(told.answered)), []).append(each_s)
    for name, _, _ in both:
        short, long = (np.median(spent[name, len(told.answered)]) for told in (few, many))
        event = (long - short) / (MANY - FEW)
        print(f"| {name} | {short * 1e6:.0f} | {event * 1e6:.0f} |")


if __name__ == "__main__":
    given = tyro.cli(Args, description=__doc__)
    asyncio.run(measure(given) if given.echo is None else echo(given.echo))
