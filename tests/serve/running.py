"""A router in front of small engines, for the time of one test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import uvloop

from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config

from .upstream import Upstream

RATES = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01}


class Running:
    """What a test needs: the router, its replicas and a client."""

    def __init__(self, router: Router, replicas: list[Upstream], client) -> None:
        self.router, self.replicas, self.client = router, replicas, client
        self.url = f"http://127.0.0.1:{router.port}"
        self.admin = f"http://127.0.0.1:{router.admin_port}"

    @property
    def state(self):
        return self.router.dispatcher.state

    def standing(self, replica: int):
        return self.router._health.ejection.standings[replica]

    async def post(self, body, path: str = "/v1/completions", **settings):
        async with self.client.post(self.url + path, json=body, **settings) as response:
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
async def running(num_replicas: int = 2, **settings) -> AsyncIterator[Running]:
    """Start engines, a router and a client; stop all of them."""
    replicas = [Upstream() for _ in range(num_replicas)]
    for replica in replicas:
        await replica.start()
    data = {
        "replicas": [
            {"name": f"r{i}", "url": replica.url, "rates": RATES}
            for i, replica in enumerate(replicas)
        ],
        "listen": {"port": 0, "admin_port": 0},
        "dispatch": {"runtime": {"policy": "least-outstanding"}},
        "drain_s": 5.0,
    }
    for key, value in settings.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    data["request"] = {"expose_replica": True, **data.get("request", {})}
    data["health"] = {"interval_s": 0.05, **data.get("health", {})}
    router = Router(parse_config(data, "test"))
    await router.start()
    async with aiohttp.ClientSession() as client:
        try:
            yield Running(router, replicas, client)
        finally:
            await client.close()
            await router.stop()
            for replica in replicas:
                await replica.stop()


def run(test: Callable[[], Awaitable[None]], *, plain: bool = False) -> None:
    """Run a test's coroutine on the loop that the router runs on; none takes long.

    Args:
        test: The coroutine.
        plain: Run it on Python's own loop.
    """

    async def limited() -> None:
        async with asyncio.timeout(20):
            await test()

    with asyncio.Runner(loop_factory=None if plain else uvloop.new_event_loop) as runner:
        runner.run(limited())


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
