"""What workers cost and gain: the router with one process, with several, and nginx.

    python benchmarks/router_workers.py --out router_workers.json

Routers with the given numbers of workers, and nginx if it is installed, stand before the same
replicas and work by turns, so that whatever else the machine does meets all of them. Clients and
replicas are this process, as in `router_cpu.py`. In a turn clients ask for short answers as fast as
they come, then streams pass whose replicas write events as fast as they are taken.

CPU time is each process's own, by the scheduler's count; a router of one process is all `worker`.
The last row says how many workers keep one decider busy: what one machine can gain, if it has so
many processors. Rates are those of this machine, which all processes share, this one included.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import uvloop
from fleet_processes import Nginx, Process, Router
from rich.console import Console
from rich.table import Table
from router_cpu import Client, Replica, interval

#: Found of each proxy, by turn.
Found = dict[str, dict[str, list[float]]]


class Roles:
    """Whose CPU time is whose.

    Args:
        proxy: A router or nginx.
    """

    def __init__(self, proxy: Process) -> None:
        self._proxy = proxy
        main = proxy.popen.pid
        self._workers, self._decider = [main], 0
        if isinstance(proxy, Router):
            workers = [int(worker["pid"]) for worker in proxy.state()["workers"]]
            if workers != [main]:
                children = Path(f"/proc/{main}/task/{main}/children").read_text(encoding="ascii")
                (self._decider,) = set(map(int, children.split())) - set(workers)
                self._workers = workers

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds that all workers and the decider have used."""
        decider_s = self._proxy.cpu_s_of(self._decider) if self._decider else 0.0
        return sum(map(self._proxy.cpu_s_of, self._workers)), decider_s


@dataclass(frozen=True)
class RouterWorkers:
    """Measure routers of one and of several workers by turns."""

    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers."""
    policy: str = "added-delay"
    """Of all routers."""
    replicas: int = 8
    """Of the fleet."""
    clients: int = 32
    """Of short requests, at once."""
    requests: int = 1600
    """Short ones in a turn."""
    streams: int = 64
    """Open at once."""
    events: int = 100
    """Of a stream."""
    gap_s: float = 0.005
    """Between two events of a stream."""
    prompt_chars: int = 1000
    """Of every prompt; no two are equal."""
    pairs: int = 10
    """Turns of each proxy."""
    out: Path | None = None
    """JSON file."""

    def run(self) -> None:
        """Measure, print and write."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(self._measure())
        load = os.getloadavg()
        document = {"settings": {k: str(v) for k, v in self.__dict__.items()}, "load": load}
        if self.out is not None:
            self.out.write_text(json.dumps(document | {"found": found}, indent=1), encoding="utf-8")
        _show(found, load[1])

    async def _measure(self) -> Found:
        loop = asyncio.get_running_loop()
        Replica.gap_s = self.gap_s
        servers = [
            await loop.create_server(Replica, "127.0.0.1", 0, backlog=1024)
            for _ in range(self.replicas)
        ]
        urls = [f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}" for s in servers]
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            proxies: dict[str, Process] = {}
            for count in self.workers:
                router = await asyncio.to_thread(self._router, Path(name), urls, count)
                proxies[f"{count} worker" + "s" * (count > 1)] = stack.enter_context(router)
            try:
                nginx = await asyncio.to_thread(Nginx, Path(name), urls)
                proxies["nginx"] = stack.enter_context(nginx)
            except RuntimeError as error:
                Console(stderr=True).print(f"without nginx: {error}")
            found: Found = {label: {} for label in proxies}
            for turn in range(-1, self.pairs):  # the first one is not counted
                for label, proxy in list(proxies.items())[:: 1 if turn % 2 else -1]:
                    roles = await asyncio.to_thread(Roles, proxy)
                    for kind in ("request", "event"):
                        values = await self._turn(kind, proxy, roles, f"{turn} {label}")
                        for what, value in values.items():
                            kept = found[label].setdefault(what, [])
                            kept += [value] if turn >= 0 else []
        for server in servers:
            server.close()
        return found

    def _router(self, folder: Path, urls: list[str], workers: int) -> Router:
        rates = {"prefill_tokens_per_s": 20_000.0, "decode_step_s": 0.01}
        entries = [{"name": f"r{i}", "url": url, "rates": rates} for i, url in enumerate(urls)]
        router = Router(
            folder,
            entries,
            workers=workers,
            dispatch={"runtime": {"policy": self.policy, "max_metrics_age_s": 60.0}},
            # what is measured is requests, not polls
            metrics={"interval_s": 5.0},
            health={"interval_s": 5.0},
        )
        until_s = time.monotonic() + 60.0
        while len(router.state()["workers"]) < workers:
            if time.monotonic() > until_s:
                raise RuntimeError(f"the workers do not come:\n{router.output()}")
            time.sleep(0.05)
        return router

    async def _turn(self, kind: str, proxy: Process, roles: Roles, key: str) -> dict[str, float]:
        """Return CPU microseconds of a request or event, by role, and how many passed a second."""
        count = self.clients if kind == "request" else self.streams
        port = int(proxy.url.rpartition(":")[2])
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(Client, "127.0.0.1", port) for _ in range(count)]
        each = self.requests // count if kind == "request" else 1
        settings: dict[str, object] = {"max_tokens": 1}
        if kind == "event":
            settings = {"max_tokens": self.events, "stream": True}

        async def play(i: int) -> None:
            for k in range(each):
                prompt = f"{kind} {key} {i} {k} ".ljust(self.prompt_chars, "z")
                await made[i][1].ask(
                    json.dumps({"model": "m", "prompt": prompt, **settings}).encode()
                )

        begin, began_s = roles.cpu_s(), time.monotonic()
        await asyncio.gather(*(play(i) for i in range(count)))
        took_s, end = time.monotonic() - began_s, roles.cpu_s()
        for transport, _ in made:
            transport.close()
        num = count * each if kind == "request" else count * self.events
        return {
            f"{kind}: worker us": 1e6 * (end[0] - begin[0]) / num,
            f"{kind}: decider us": 1e6 * (end[1] - begin[1]) / num,
            f"{kind}s a second": num / took_s,
        }


def _show(found: Found, load: float) -> None:
    labels = list(found)
    table = Table(title=f"By turns; load average {load:.1f} on {os.cpu_count()} processors")
    for column in ("", *labels, f"{labels[1]} / {labels[0]}" if len(labels) > 1 else ""):
        table.add_column(column, justify="right")
    for what in found[labels[0]]:
        row = [f"{np.median(found[label][what]):.0f}" for label in labels]
        first = np.array(found[labels[0]][what])
        if len(labels) > 1 and first.all():
            ratio = interval(np.array(found[labels[1]][what]) / first)
            row.append("{:.2f} [{:.2f}, {:.2f}]".format(*ratio))
        table.add_row(what, *row)
    for kind in ("request", "event"):
        row = []
        for label in labels:
            decider = np.array(found[label][f"{kind}: decider us"])
            worker = np.array(found[label][f"{kind}: worker us"])
            row.append(f"{np.median(worker / decider):.1f}" if decider.all() else "-")
        table.add_row(f"{kind}: workers for a decider", *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    tyro.cli(RouterWorkers).run()
