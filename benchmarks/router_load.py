"""The router under load: 1,000 streams over eight emulated replicas, against nginx and no proxy.

    apt-get install nginx-light
    python benchmarks/router_load.py --out router_load.json

Clients, replicas and proxy are one process each. Every answer is compared with what it must be.
Events carry the time they were sent, so the delay on the way is measured for each of them; what a
proxy adds is its delay minus that of a direct connection, quantile by quantile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import uvloop
from fleet_processes import Engines, Nginx, Process, Router, metric, quantile, replica_entries
from load_client import Load, Tally, Work
from rich.console import Console
from rich.table import Table

#: Answers so short that requests are all there is to do.
_SHORT = Work((100, 400), (8, 8))


@dataclass(frozen=True)
class RouterLoad:
    """Load the router and what it is compared with."""

    scenario: str = "mixed-chat"
    """Of the eight replicas."""
    policy: str = "added-delay"
    """Of the router."""
    streams: int = 1000
    """Open at any time."""
    seconds: float = 120.0
    """Of the router; the direct connection and nginx get half."""
    warm_up_s: float = 10.0
    """At the beginning of each phase; delays are not counted, answers are."""
    stream_interval: int = 8
    """Tokens in an event."""
    rounds: int = 3
    """Of the throughput comparison; medians are shown."""
    round_s: float = 8.0
    """Length of each part of a round."""
    out: Path | None = None
    """JSON file."""

    def run(self) -> None:
        """Measure, print and write."""
        with tempfile.TemporaryDirectory() as folder:
            document = {
                "settings": {k: v for k, v in self.__dict__.items() if k != "out"},
                "steady": self._steady(Path(folder)),
                "throughput": self._throughput(Path(folder)),
            }
        document["settings"] = {k: str(v) for k, v in document["settings"].items()}
        if self.out is not None:
            self.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
        _show(document)

    @contextlib.contextmanager
    def _router(self, folder: Path, engines: Engines) -> Iterator[Router]:
        entries = replica_entries(self.scenario, engines.urls)
        dispatch = {"runtime": {"policy": self.policy}}
        with Router(folder, entries, dispatch=dispatch) as router:
            yield router

    def _steady(self, folder: Path) -> dict[str, Any]:
        phases: dict[str, Any] = {}
        with Engines(self.scenario, stream_interval=self.stream_interval) as engines:
            phases["direct"] = self._phase(engines, engines.urls, None, self.seconds / 2)
            with Nginx(folder, engines.urls) as nginx:
                phases["nginx"] = self._phase(engines, [nginx.url], nginx, self.seconds / 2)
            with self._router(folder, engines) as router:
                phases["router"] = self._phase(engines, [router.url], router, self.seconds)
                page = router.metrics()
                phases["router"]["decision_s"] = _histogram(page, "servegym_decision_seconds")
                phases["router"]["overhead_s"] = _histogram(
                    page, "servegym_router_overhead_seconds"
                )
                phases["router"]["fallbacks"] = metric(
                    page, 'servegym_decisions_total{by="fallback"}'
                )
            phases["engines"] = engines.state()
        return phases

    def _phase(
        self, engines: Engines, urls: Sequence[str], proxy: Process | None, seconds: float
    ) -> dict[str, Any]:
        ended = engines.num_ended()
        engine_cpu_s, proxy_cpu_s = engines.cpu_s, proxy.cpu_s if proxy else 0.0
        begin_s = time.monotonic()
        rss: list[int] = []

        async def play() -> tuple[Tally, tuple[int, int]]:
            load = Load(urls, Work(), seed=int(begin_s))
            task = asyncio.create_task(load.run(self.streams, seconds))
            marks = (0, 0)
            while not task.done():
                await asyncio.wait([task], timeout=1.0)
                if proxy is not None:
                    rss.append(proxy.rss_bytes)
                if time.monotonic() - begin_s < self.warm_up_s:
                    marks = len(load.tally.to_engine_s), len(load.tally.from_engine_s)
            return await task, marks

        tally, marks = _run(play)
        took_s = time.monotonic() - begin_s
        events = len(tally.from_engine_s)
        document = {
            "outcomes": dict(tally.outcomes()),
            "details": sorted({r.detail for r in tally.results if r.detail})[:5],
            "requests": len(tally.results),
            "engine_requests": engines.num_ended() - ended,
            "events": events,
            "seconds": took_s,
            "events_per_s": events / took_s,
            "to_engine_ms": _quantiles_ms(np.array(tally.to_engine_s[marks[0] :])),
            "from_engine_ms": _quantiles_ms(np.array(tally.from_engine_s[marks[1] :])),
            "engine_cpu_share": (engines.cpu_s - engine_cpu_s) / took_s,
            "load_average": os.getloadavg()[0],
        }
        if proxy is not None:
            used_s = proxy.cpu_s - proxy_cpu_s
            document |= {
                "cpu_share": used_s / took_s,
                "cpu_us_per_event": 1e6 * used_s / max(events, 1),
                "rss_mb": [round(x / 1e6, 1) for x in rss],
            }
        return document

    def _throughput(self, folder: Path) -> dict[str, Any]:
        """As many requests as go through, nginx and router by turns."""
        rates: dict[str, list[dict[str, float]]] = {"nginx": [], "router": []}
        with (
            Engines(self.scenario, speed=1000.0, stream_interval=8) as engines,
            Nginx(folder, engines.urls) as nginx,
            self._router(folder, engines) as router,
        ):
            for turn in range(self.rounds):
                for name, proxy in (("nginx", nginx), ("router", router)):
                    used_s, begin_s = proxy.cpu_s, time.monotonic()
                    load = Load([proxy.url], _SHORT, seed=turn)

                    async def play(load: Load = load) -> Tally:
                        return await load.run(64, self.round_s)

                    tally = _run(play)
                    took_s = time.monotonic() - begin_s
                    good = tally.outcomes()["ok"]
                    rates[name].append(
                        {
                            "requests_per_s": good / took_s,
                            "cpu_us_per_request": 1e6 * (proxy.cpu_s - used_s) / max(good, 1),
                            "bad": len(tally.results) - good,
                        }
                    )
        found = {
            name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for name, rows in rates.items()
        }
        keys = ("requests_per_s", "cpu_us_per_request")
        return found | {"ratio": {k: found["router"][k] / found["nginx"][k] for k in keys}}


def _run(play: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(play())


def _quantiles_ms(values_s: np.ndarray) -> dict[str, float]:
    if not len(values_s):
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: float(1e3 * np.quantile(values_s, share)) for name, share in shares.items()}


def _histogram(page: str, name: str) -> dict[str, float]:
    count = metric(page, f"{name}_count")
    return {
        "count": count,
        "mean": metric(page, f"{name}_sum") / max(count, 1),
        "p50_below": quantile(page, name, 0.5),
        "p99_below": quantile(page, name, 0.99),
    }


def _show(document: dict[str, Any]) -> None:
    console = Console(width=132)
    steady = document["steady"]
    table = Table(title="Steady load")
    for column in ("", "direct", "nginx", "router"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(value(steady[phase]) for phase in ("direct", "nginx", "router")))

    row("requests", lambda p: f"{p['requests']}")
    row("seen by engines", lambda p: f"{p['engine_requests']:.0f}")
    row("answers", lambda p: ", ".join(f"{n} {k}" for k, n in p["outcomes"].items()))
    row("events/s", lambda p: f"{p['events_per_s']:.0f}")
    for way in ("to_engine_ms", "from_engine_ms"):
        for share in ("p50", "p99"):
            base = steady["direct"][way][share]
            row(f"{way} {share}", lambda p, w=way, s=share: f"{p[w][s]:.2f}")
            row("  added", lambda p, w=way, s=share, b=base: f"{p[w][s] - b:+.2f}")
    row("load average at the end", lambda p: f"{p['load_average']:.1f}")
    row("CPU of one core", lambda p: f"{p.get('cpu_share', 0):.2f}")
    row("CPU per event, µs", lambda p: f"{p.get('cpu_us_per_event', 0):.1f}")
    row("RSS, MB", lambda p: _span(p.get("rss_mb", [])))
    console.print(table)
    for name in ("decision_s", "overhead_s"):
        found = steady["router"][name]
        console.print(
            f"router {name}: mean {1e6 * found['mean']:.0f} µs, p99 below "
            f"{1e6 * found['p99_below']:.0f} µs, n={found['count']:.0f}"
        )
    table = Table(title="As fast as it goes: 64 streams, answers of one event")
    for column in ("", "nginx", "router", "router / nginx"):
        table.add_column(column, justify="right")
    found = document["throughput"]
    for key, ratio in found["ratio"].items():
        values = (f"{found[name][key]:.0f}" for name in ("nginx", "router"))
        table.add_row(key, *values, f"{ratio:.2f}")
    console.print(table)


def _span(rss_mb: list[float]) -> str:
    """Show memory at a quarter, half, three quarters and the end."""
    if not rss_mb:
        return "-"
    return " ".join(f"{rss_mb[max(0, len(rss_mb) * q // 4 - 1)]:.0f}" for q in (1, 2, 3, 4))


if __name__ == "__main__":
    tyro.cli(RouterLoad).run()
