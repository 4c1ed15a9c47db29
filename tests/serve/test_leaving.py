"""A router that is told to stop loses no request: clients go elsewhere, answered until then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest

from servegym.errors import ConfigError
from servegym.serve.router.config import parse_config
from servegym.serve.router.reply import json_reply
from servegym.serve.router.server import Server

from .running import RATES, run, running, until

WHOLE = {"model": "m", "prompt": "hello"}
STREAM = {**WHOLE, "stream": True}


class Client:
    """One connection, which is kept as long as the router keeps it."""

    async def connect(self, port: int) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(self) -> tuple[int, bool]:
        """Return the status of a whole answer, and whether the connection ends with it."""
        body = json.dumps(WHOLE).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        said = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(said.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await self.reader.readexactly(length)
        return int(said[9:12]), b"connection: close" in said

    async def has_ended(self) -> bool:
        return await self.reader.read() == b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def is_refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return False


def test_who_connects_is_refused_and_who_is_connected_is_answered_once_more():
    async def test() -> None:
        async with running(1, drain_s=60) as it:
            kept = Client()
            await kept.connect(it.router.port)
            assert await kept.ask() == (200, False)
            it.replicas[0].gap_s = 30.0
            stream = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.replicas[0].sent >= 1)
            drained = asyncio.create_task(it.router.drain())
            async with asyncio.timeout(5):
                while not await is_refused(it.router.port):
                    await asyncio.sleep(0.01)
            it.replicas[0].gap_s = 0.0
            assert await kept.ask() == (200, True)
            assert await kept.has_ended()
            await kept.close()
            assert not drained.done()  # the stream goes on
            async with it.client.get(it.admin + "/readyz") as response:
                assert (response.status, (await response.json())["status"]) == (503, "stopping")
            stream.cancel()
            assert await drained == 0
            assert it.router.telemetry.outcomes == {"finished": 2, "cancelled": 1}

    run(test)


def test_workers_let_their_clients_go_and_the_router_ends_with_the_last():
    async def test() -> None:
        async with running(1, 2, drain_s=60) as it:
            leaving = [  # as `carry` does, with the socket that they share
                asyncio.create_task(worker.leave_when_told(worker.server.stop_listening))
                for worker in it.workers
            ]
            ports = [int(url.rpartition(":")[2]) for url in it.urls]
            kept = Client()
            await kept.connect(ports[0])
            assert await kept.ask() == (200, False)
            it.replicas[0].gap_s = 30.0
            stream = asyncio.create_task(it.post(STREAM, worker=1))
            await until(lambda: it.replicas[0].sent >= 1)
            drained = asyncio.create_task(it.router.drain())
            async with asyncio.timeout(5):
                while not all([await is_refused(port) for port in ports]):
                    await asyncio.sleep(0.01)
            it.replicas[0].gap_s = 0.0
            assert await kept.ask() == (200, True)
            await asyncio.wait_for(leaving[0], 5.0)
            assert not drained.done()  # the other worker's stream goes on
            stream.cancel()
            assert await drained == 0
            assert leaving[1].done()
            assert it.router.telemetry.outcomes == {"finished": 2, "cancelled": 1}
            await kept.close()

    run(test)


def test_a_router_says_that_it_is_not_ready_before_it_refuses_anybody():
    async def test() -> None:
        async with running(1, drain_s=60, unready_s=30) as it:
            drained = asyncio.create_task(it.router.drain())
            await until(lambda: it.router._server.leaving)
            status, page = await it.get("/health")
            assert (status, json.loads(page)["status"]) == (503, "stopping")
            late = Client()
            await late.connect(it.router.port)
            assert await late.ask() == (200, True)
            await late.close()
            drained.cancel()

    run(test)


def test_what_is_not_over_in_time_is_counted():
    async def test() -> None:
        async with running(1, drain_s=0.1) as it:
            it.replicas[0].gap_s = 30.0
            stream = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.replicas[0].sent >= 1)
            assert await it.router.drain() == 1
            stream.cancel()
            await until(it.idle)

    run(test)


def test_who_waits_to_be_taken_when_listening_ends_is_answered():
    async def answer(request) -> None:
        await request.body(5.0)
        request.reply(json_reply({"good": True}))

    async def test() -> None:
        server = Server(answer, 1000)
        port = await server.start("127.0.0.1", 0)
        ask = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for one in clients:  # the loop has not turned: the system has taken them, nobody else
            one.sendall(ask)
        assert server.num_connections == 0
        leaving = asyncio.create_task(server.leave(0.0, server.stop_listening))
        for one in clients:
            reader, writer = await asyncio.open_connection(sock=one)
            said = await asyncio.wait_for(reader.read(), 5.0)
            assert said.startswith(b"HTTP/1.1 200 ")
            assert said.endswith(b'{"good": true}')
            writer.close()
            await writer.wait_closed()
        await asyncio.wait_for(leaving, 5.0)
        assert await is_refused(port)
        await server.stop()

    run(test)


def test_who_waits_to_be_taken_when_all_stops_is_let_go():
    async def answer(request) -> None:
        raise AssertionError("nobody asks")

    async def test() -> None:
        server = Server(answer, 1000)
        port = await server.start("127.0.0.1", 0)
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        await server.stop()
        assert server.num_connections == 0
        for one in clients:
            one.settimeout(5.0)
            assert one.recv(1) == b""
            one.close()

    run(test)


def test_a_part_longer_than_the_whole_is_refused():
    replica = {"name": "r", "url": "http://127.0.0.1:1", "rates": RATES}
    sentence = "unready_s is a part of drain_s, and must be at most 60, got 90"
    with pytest.raises(ConfigError, match=sentence):
        parse_config({"replicas": [replica], "unready_s": 90}, "test")
