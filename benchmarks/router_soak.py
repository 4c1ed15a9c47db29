"""The router's memory over many requests: does it stay?

    python benchmarks/router_soak.py --requests 500000

Clients send short requests and streams of five events, no two with the same prompt, and one in
fifty leaves before its answer. Replicas and clients are this process. Memory is what the router's
process has in use, at equal steps; its slope is by least squares over the second half, when the
prefix index is full (the replicas' caches are small here), and the interval by bootstrap over
blocks of neighbouring samples.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import uvloop
from fleet_processes import Router, metric
from rich.console import Console
from router_cpu import RouterCpu, _Client, _Replica

from servegym.typing import FloatArray


@dataclass(frozen=True)
class RouterSoak:
    """Send many requests and look at the router's memory."""

    requests: int = 500_000
    """In all."""
    clients: int = 32
    """At once."""
    samples: int = 200
    """Of memory."""
    out: Path | None = None
    """JSON file."""

    def run(self) -> None:
        """Measure, print and write."""
        _Replica.gap_s = 0.001
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rss_mb, page = runner.run(self._measure())
        half = np.array(rss_mb[len(rss_mb) // 2 :])
        step = self.requests / len(rss_mb) / 1000.0
        slope, low, high = slope_of(half, step)
        finished = metric(page, 'servegym_router_outcomes_total{outcome="finished"}')
        cancelled = metric(page, 'servegym_router_outcomes_total{outcome="cancelled"}')
        Console().print(
            f"{self.requests} requests ({finished:.0f} finished, {cancelled:.0f} left by their "
            f"clients): {rss_mb[0]:.0f} MB at first, {half[0]:.1f} at half, {half[-1]:.1f} at the "
            f"end; {1e3 * slope:.1f} [{1e3 * low:.1f}, {1e3 * high:.1f}] kB per 1,000 requests"
        )
        if self.out is not None:
            document = {"rss_mb": rss_mb, "mb_per_1000": [slope, low, high]}
            self.out.write_text(json.dumps(document, indent=1), encoding="utf-8")

    async def _measure(self) -> tuple[list[float], str]:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(_Replica, "127.0.0.1", 0) for _ in range(4)]
        urls = [f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}" for s in servers]
        maker = RouterCpu(before=Path())
        rates = {
            "prefill_tokens_per_s": 20_000.0,
            "decode_step_s": 0.01,
            "kv_capacity_tokens": 20_000,
        }
        entries = [{"name": f"r{i}", "url": url, "rates": rates} for i, url in enumerate(urls)]
        rss_mb: list[float] = []
        with tempfile.TemporaryDirectory() as name:
            router = await asyncio.to_thread(Router, Path(name), entries)
            with router:
                port = int(router.url.rpartition(":")[2])
                left = self.requests

                async def connect() -> _Client:
                    return (await loop.create_connection(_Client, "127.0.0.1", port))[1]

                async def play() -> None:
                    nonlocal left
                    client = await connect()
                    while left > 0:
                        left -= 1
                        if left % (self.requests // self.samples) == 0:
                            rss_mb.append(router.rss_bytes / 1e6)
                        stream = left % 2 == 0
                        body = maker._body(f"soak {left}", max_tokens=5, stream=stream)
                        asked = asyncio.create_task(client.ask(body))
                        if left % 50 == 0:
                            await asyncio.sleep(0.002)
                            client._transport.abort()
                            asked.cancel()
                            client = await connect()
                        else:
                            await asked
                    client._transport.close()

                await asyncio.gather(*(play() for _ in range(self.clients)))
                await asyncio.sleep(0.5)
                page = await asyncio.to_thread(router.metrics)
                assert metric(page, "servegym_router_in_flight") == 0
                assert metric(page, "servegym_replica_outstanding_requests") == 0
        for server in servers:
            server.close()
        return rss_mb, page


def slope_of(values: FloatArray, step: float) -> tuple[float, float, float]:
    """Return the slope of equally spaced values and its 95 % interval."""
    x = np.arange(len(values)) * step
    fit = np.polyfit(x, values, 1)
    left = values - np.polyval(fit, x)
    size = max(1, len(values) // 10)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        begins = rng.integers(0, len(values) - size + 1, -(-len(values) // size))
        noise = np.concatenate([left[b : b + size] for b in begins])[: len(values)]
        drawn.append(np.polyfit(x, np.polyval(fit, x) + noise, 1)[0])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(fit[0]), float(low), float(high)


if __name__ == "__main__":
    tyro.cli(RouterSoak).run()
