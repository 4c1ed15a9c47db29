"""The fleet and the routers of one case of `router_faults.py`, and what a case is."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_processes import Engines, Router
from load_client import Result

#: Replica 0 of the scenario, a process of its own.
VICTIM = "replica-0"


class Stage:
    """The fleet and the routers of one case.

    Attributes:
        broken_s: When the fault was there, if that is not when `Case.begin` has ended, on the
            machine's monotonic clock.
        notes: What a case wants to say.
    """

    def __init__(
        self, victim: Engines, others: Engines, routers: list[Router], folder: Path
    ) -> None:
        self.victim, self.others, self.routers, self.folder = victim, others, routers, folder
        self.broken_s: float | None = None
        self.notes: Counter[str] = Counter()
        self.policy = ""
        self.scenario = str(others.settings["scenario"])
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def router(self) -> Router:
        """The first of them, in most cases the only one."""
        return self.routers[0]

    def metrics(self) -> str:
        """Return the pages of all routers."""
        return "\n".join(router.metrics() for router in self.routers)

    async def fault(self, kind: str, value: float = 1.0, *, everywhere: bool = False) -> None:
        """Let a fault happen to the victim or to all replicas."""
        await asyncio.to_thread(self.victim.fault, 0, kind, value)
        if everywhere:
            for r in range(1, 1 + len(self.others.urls)):
                await asyncio.to_thread(self.others.fault, r, kind, value)

    async def kill(self) -> None:
        """Kill the victim's process."""
        self.victim.popen.kill()
        self.victim.popen.wait()

    async def restart(self) -> None:
        """Start it again on its port."""
        port = int(self.victim.urls[0].rpartition(":")[2])
        settings = self.victim.settings | {"ports": [port]}
        self.victim = await asyncio.to_thread(lambda: Engines(**settings))

    def suspend(self, stop: bool) -> None:
        """Let the victim's process stand still, or go on."""
        self.victim.popen.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)

    def repeat(self, act: Callable[[], Awaitable[None]], every_s: float) -> None:
        """Do something again and again until `stop_repeating`."""

        async def loop() -> None:
            while True:
                try:
                    await act()
                except (OSError, asyncio.IncompleteReadError):
                    self.notes["connection refused or reset"] += 1
                await asyncio.sleep(every_s)

        self._tasks.append(asyncio.create_task(loop()))

    async def stop_repeating(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.router.url.removeprefix("http://").partition(":")
        return await asyncio.open_connection(host, int(port))

    def request(self, body: bytes, key: str = "") -> bytes:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if key:
            head += f"Authorization: Bearer {key}\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def send(self, body: bytes, key: str = "") -> None:
        """Send one request and note the status."""
        reader, writer = await self.connect()
        try:
            writer.write(self.request(body, key))
            async with asyncio.timeout(10):
                line = await reader.readline()
            status = line[9:12].decode() or "closed"
            self.notes[f"status {status}"] += 1
        except (TimeoutError, ConnectionError) as error:
            self.notes[type(error).__name__] += 1
        finally:
            writer.close()


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong.

    Attributes:
        begin: Makes it so.
        end: Puts it right.
        every_s: `begin` is repeated after so long; 0 is once.
        may_lose: Whether streams that had begun on the victim may be lost.
        settings: Of each router.
        routers: So many, which are peers; clients that one refuses go to the next.
        excused: Whether another request may be lost, by when the fault was there, seconds.
    """

    begin: Callable[[Stage], Awaitable[None]]
    end: Callable[[Stage], Awaitable[None]]
    every_s: float = 0.0
    may_lose: bool = False
    settings: dict[str, Any] | None = None
    routers: int = 1
    excused: Callable[[Result, float], bool] = lambda result, broken_s: False
