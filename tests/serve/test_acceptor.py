"""Connections from one socket, shared out evenly."""

from __future__ import annotations

import asyncio
import socket

from servegym.serve.listening import bind
from servegym.serve.router.server import Server
from servegym.serve.router.workers.acceptor import NOBODY, Acceptor, shared_counts

from .running import VirtualTimeLoop, run, until


async def answer(request) -> None:
    raise AssertionError("nobody asks")


def clients(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def test_workers_get_as_many_connections_give_or_take_one():
    async def test() -> None:
        listener = bind("127.0.0.1", 0)
        listener.setblocking(False)
        listener.listen(64)
        counts = shared_counts(3)
        assert list(counts) == [NOBODY] * 3
        servers = [Server(answer, 1000) for _ in range(3)]
        acceptors = [
            Acceptor(listener.dup(), counts, i, server) for i, server in enumerate(servers)
        ]
        port = listener.getsockname()[1]

        def held() -> list[int]:
            return [len(server.connections) for server in servers]

        first = clients(port, 30)  # all at once
        await until(lambda: sum(held()) == 30)
        assert max(held()) - min(held()) <= 2
        left = sum(held()) - held()[1]
        for connection in list(servers[1].connections):
            connection.stop()
        await until(lambda: held()[1] == 0)
        second = clients(port, 10)  # most of them to the one that has lost its own
        await until(lambda: sum(held()) == left + 10)
        assert held()[1] >= 8
        acceptors[2].stop()
        assert counts[2] == NOBODY
        before = held()[2]
        third = clients(port, 4)
        await until(lambda: sum(held()) == left + 14)
        assert held()[2] == before
        for acceptor in acceptors[:2]:
            acceptor.stop()
        for one in (*first, *second, *third):
            one.close()
        for server in servers:
            await server.stop()
        listener.close()

    run(test, loop=VirtualTimeLoop)  # or a machine that is slow makes who has more wait in vain


def test_a_worker_that_does_not_take_its_turn_is_not_waited_for():
    async def test() -> None:
        listener = bind("127.0.0.1", 0)
        listener.setblocking(False)
        listener.listen(64)
        counts = shared_counts(2)
        counts[1] = 0  # it hangs, with no connection at all
        server = Server(answer, 1000)
        acceptor = Acceptor(listener.dup(), counts, 0, server)
        there = clients(listener.getsockname()[1], 5)
        await until(lambda: len(server.connections) == 5)
        assert counts[0] == 5
        acceptor.stop()
        for one in there:
            one.close()
        await server.stop()
        listener.close()

    run(test)


def test_a_client_that_has_gone_before_it_is_taken_harms_nobody():
    async def test() -> None:
        listener = bind("127.0.0.1", 0)
        listener.setblocking(False)
        listener.listen(64)
        server = Server(answer, 1000)
        for one in clients(listener.getsockname()[1], 3):
            one.close()
        acceptor = Acceptor(listener.dup(), shared_counts(1), 0, server)
        (there,) = clients(listener.getsockname()[1], 1)
        await until(lambda: len(server.connections) == 1)
        await asyncio.sleep(0.01)
        assert len(server.connections) == 1
        acceptor.stop()
        there.close()
        await server.stop()
        listener.close()

    run(test)
