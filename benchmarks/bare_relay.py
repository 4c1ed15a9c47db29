"""A relay that does nothing: what bytes cost that pass through a process of uvloop and Python.

    python benchmarks/bare_relay.py PORT URL...

Every client's connection gets one of its own to a replica, in turn, and what comes on one is
written to the other as it is. Nothing is read, decided, booked or waited for with a time-out.
`router_cpu.py` starts it beside the routers.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import uvloop


class Side(asyncio.Protocol):
    """One of two connections that are as one."""

    other: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.other.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        self.other.close()


class Client(Side):
    """The side of a client: its replica is asked once there is something to ask."""

    def __init__(self, places: Iterator[tuple[str, int]]) -> None:
        self._places = places
        self._early = b""
        self._is_asked = False

    def data_received(self, data: bytes) -> None:
        if self._is_asked:
            self.other.write(data)
            return
        self._early += data
        if self._early == data:
            asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        self.other, replica = await loop.create_connection(Side, *next(self._places))
        replica.other = self.transport
        self._is_asked = True
        self.other.write(self._early)

    def connection_lost(self, _: Exception | None) -> None:
        if self._is_asked:
            self.other.close()


async def relay(port: int, urls: list[str]) -> None:
    """Relay until this process is ended."""
    places = itertools.cycle([(p.hostname or "", p.port or 80) for p in map(urlsplit, urls)])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Client(places), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(relay(int(sys.argv[1]), sys.argv[2:]))
