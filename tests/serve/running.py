"""A router in front of small engines, for the time of one test."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import selectors
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from unittest import mock

import aiohttp
import uvloop

from servegym.serve.listening import bind
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config
from servegym.serve.router.workers.decider import Shared
from servegym.serve.router.workers.worker import Worker

from .upstream import Upstream

#: What has been sent may be on its way through the kernel: for so many real seconds, and so often,
#: a loop of virtual time looks before its time goes by.
_ON_ITS_WAY_S = 0.001
_LOOKS = 20
#: No timer of it runs out before its time, however that is rounded.
_LATE_S = 1e-7
#: Longer than any policy takes to decide.
PATIENT_S = 60.0
RATES = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01}


class Running:
    """What a test needs: the router, its replicas and a client.

    Attributes:
        urls: Of the workers, each at a port of its own; else of the router.
        url: The first of them.
    """

    def __init__(
        self, router: Router, replicas: list[Upstream], client, workers: dict[int, Worker]
    ) -> None:
        self.router, self.replicas, self.client = router, replicas, client
        self.workers = list(workers.values())
        self.urls = [f"http://127.0.0.1:{port}" for port in workers or [router.port]]
        self.url = self.urls[0]
        self.admin = f"http://127.0.0.1:{router.admin_port}"

    @property
    def state(self):
        return self.router.dispatcher.state

    def standing(self, replica: int):
        return self.router._health.ejection.standings[replica]

    async def post(self, body, path: str = "/v1/completions", *, worker: int = 0, **settings):
        url = self.urls[worker] + path
        async with self.client.post(url, json=body, **settings) as response:
            return response.status, await response.read(), response.headers

    async def get(self, path: str, **settings):
        async with self.client.get(self.url + path, **settings) as response:
            return response.status, await response.text()

    async def operate(self, path: str, body=None, **settings):
        async with self.client.post(self.admin + path, json=body or {}, **settings) as response:
            return response.status, await response.json()

    def idle(self) -> bool:
        """Whether nothing is left in any book."""
        slots = self.router.dispatcher.slots()
        return (
            self.router.telemetry.in_flight == 0
            and self.state.num_held == 0
            and all(self.state.outstanding(slot) == 0 for slot in slots)
            and all(self.state.replicas[3] == 0)
        )


@contextlib.asynccontextmanager
async def running(
    num_replicas: int = 2, num_workers: int = 0, roles: Sequence[str] = (), **settings
) -> AsyncIterator[Running]:
    """Start engines, a router and a client; stop all of them.

    Args:
        num_replicas: Engines.
        num_workers: Workers that carry the router's requests, on the same loop; 0: it does so.
        roles: Of the replicas; without them all do everything.
        settings: Of the router's file.
    """
    replicas = [Upstream() for _ in roles or range(num_replicas)]
    for replica in replicas:
        await replica.start()
    data = {
        "replicas": [
            {"name": f"r{i}", "url": replica.url, "rates": RATES}
            | ({"role": roles[i]} if roles else {})
            for i, replica in enumerate(replicas)
        ],
        "listen": {"port": 0, "admin_port": 0},
        "dispatch": {},
        "drain_s": 5.0,
    }
    for key, value in settings.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    # a policy that is late on a busy machine would be taken for one that hangs
    runtime = {"policy": "least-outstanding", "timeout_s": PATIENT_S}
    data["dispatch"] = {
        **data["dispatch"],
        "runtime": {**runtime, **data["dispatch"].get("runtime", {})},
    }
    data["request"] = {"expose_replica": True, **data.get("request", {})}
    data["health"] = {"interval_s": 0.05, **data.get("health", {})}
    config = parse_config(data, "test")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decider"
        shared = Shared(path, 0, bind("127.0.0.1", 0)) if num_workers else None
        router = Router(config, shared)
        await router.start()
        workers: dict[int, Worker] = {}
        for _ in range(num_workers):
            worker = Worker(config, path)
            assert await worker.connect(5.0)
            workers[await worker.server.start("127.0.0.1", 0)] = worker
        async with aiohttp.ClientSession() as client:
            try:
                yield Running(router, replicas, client, workers)
            finally:
                await client.close()
                for worker in workers.values():
                    await worker.stop()
                await router.stop()
                for replica in replicas:
                    await replica.stop()


class _Selector(selectors.DefaultSelector):
    """Waits in the time of its loop: hardly at all, but that time has gone by then.

    Attributes:
        now_s: The loop's time.
        num_outside: How much of what is waited for other threads do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_s = time.monotonic()
        self.num_outside = 0

    def select(self, timeout: float | None = None):
        if timeout is None or timeout <= 0.0:
            return super().select(timeout)
        if self.num_outside:
            return super().select(None)
        for _ in range(_LOOKS):
            begin_s = time.perf_counter()
            events = super().select(_ON_ITS_WAY_S)
            if events:
                return events
            if time.perf_counter() - begin_s < 2.0 * _ON_ITS_WAY_S:
                break  # else the machine is busy, and its kernel may be, too
        self.now_s += timeout + _LATE_S
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose time goes by only while there is nothing to do, however slow the machine is.

    For what this process does with itself: no timer runs out while a socket of it has something,
    or while another thread does what the loop has asked of it. Its time is `time.monotonic`, too.
    """

    def __init__(self) -> None:
        self._waits = _Selector()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.now_s

    def run_forever(self) -> None:
        with mock.patch.object(time, "monotonic", self.time):
            super().run_forever()

    def run_in_executor(self, executor, func, *args):
        done = super().run_in_executor(executor, func, *args)
        self._waits.num_outside += 1
        done.add_done_callback(self._came_back)
        return done

    def _came_back(self, _: asyncio.Future) -> None:
        self._waits.num_outside -= 1


def run(
    test: Callable[[], Awaitable[None]],
    *,
    loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    limit_s: float = 20.0,
) -> None:
    """Run a test's coroutine on the loop that the router runs on; none takes long.

    Args:
        test: The coroutine.
        loop: Makes another loop to run it on.
        limit_s: It fails if it takes longer.
    """

    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await test()

    # a loop that cannot be closed after a failure would hold up everything: who is where, and out
    faulthandler.dump_traceback_later(limit_s + 60.0, exit=True, file=sys.__stderr__)
    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            try:
                runner.run(limited())
            except BaseException:
                # what a failed test leaves open uvloop warns of while it closes; a warning that is
                # an error keeps it from closing that, and it waits for it for ever
                warnings.simplefilter("ignore", ResourceWarning)
                raise
    except BaseException as error:
        # what it has left open lives as long as its frames do: another test would fail for it
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            traceback.clear_frames(error.__traceback__)
            gc.collect()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
