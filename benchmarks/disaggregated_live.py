"""Predict with the simulator what a fleet that prefills and decodes apart does behind the router.

    python benchmarks/disaggregated_live.py

The same requests of a scenario are played under several policies `DISPATCH+PLACEMENT`: in the
simulator, and by clients before `servegym serve router` and the emulated engines of the scenario,
each a process of its own. The engines' time is the simulator's; what differs is what the router
knows of the fleet, and the way over HTTP. Ratios are live over simulated, of means over the same
requests, with 95 % bootstrap intervals of paired requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import tyro
from fleet_processes import Engines, Router, metric, replica_entries
from rich.console import Console
from rich.table import Table

from servegym.cluster.spec import Episode
from servegym.export.resolve import resolve_dispatch
from servegym.policy.placed import Placed
from servegym.policy.run_placed import make_simulator, run_placed
from servegym.scenario import Scenario, load_scenario

_BOOTSTRAPS = 2000


@dataclass(frozen=True)
class DisaggregatedLive:
    """Compare simulated and live times of a scenario with roles."""

    scenario: str = "pd-equal"
    """Bundled scenario name."""
    policies: tuple[str, ...] = (
        "token-least-load+least-outstanding",
        "splitwise+splitwise",
        "conductor+least-tpot",
        "added-delay+least-tpot",
    )
    """Of both decisions."""
    requests: int = 300
    """Played under each policy."""
    load: float = 0.8
    """Of the scenario's rate."""
    speed: float = 1.0
    """Of the engines' clocks."""
    seed: int = 0
    """Of the requests."""

    def run(self) -> None:
        """Play and print."""
        scenario = load_scenario(self.scenario)
        episode = scenario.episode(self.seed, num_requests=self.requests, load=self.load)
        table = Table(
            "policy", "TTFT sim ms", "live", "live / sim", "E2E sim ms", "live", "live / sim",
            "prefilled apart"
        )  # fmt: skip
        entries = _entries(self.scenario, scenario)
        for policy in self.policies:
            simulated = simulate(scenario, episode, policy)
            with (
                tempfile.TemporaryDirectory() as folder,
                Engines(self.scenario, count=len(entries), speed=self.speed) as engines,
                Router(
                    Path(folder),
                    [
                        entry | {"url": url}
                        for entry, url in zip(entries, engines.urls, strict=True)
                    ],
                    dispatch={"runtime": {"policy": policy, "range_margin": 10.0}},
                    metrics={"interval_s": 0.2 / self.speed},
                ) as router,
            ):
                live = asyncio.run(play(router.url, episode, self.speed)) * self.speed
                apart = metric(router.metrics(), "servegym_router_prefill_seconds_count")
            cells = []
            for k in range(2):
                ratio = " ".join(map("{:.3f}".format, interval(live[k], simulated[k])))
                cells += [f"{1e3 * x.mean():.0f}" for x in (simulated[k], live[k])] + [ratio]
            table.add_row(policy, *cells, f"{apart / self.requests:.0%}")
        console = Console(width=140)
        console.print(table)
        console.print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")


def _entries(name: str, scenario: Scenario) -> list[dict[str, object]]:
    entries = replica_entries(name)
    types = scenario.episode(0, num_requests=1).type_idx
    for entry, t in zip(entries, types, strict=True):
        fleet = scenario.fleet[int(t)]
        entry["role"] = fleet.role
        if fleet.link is not None and isinstance(hardware := entry["hardware"], dict):
            hardware["link_gb_per_s"] = fleet.link.gb_per_s
    return entries


def simulate(scenario: Scenario, episode: Episode, policy: str) -> np.ndarray:
    """Return TTFT and E2E of every request, `float64[2, n]`, seconds."""
    placed = resolve_dispatch(policy)
    assert isinstance(placed, Placed)
    simulator = make_simulator(scenario.spec, [episode])
    run_placed(simulator, placed)
    outcomes = simulator.outcomes(0)
    ends = np.stack([outcomes["first_token_s"], outcomes["finish_s"]])
    return ends - outcomes["arrival_s"]


async def play(url: str, episode: Episode, speed: float) -> np.ndarray:
    """Send the requests of an episode when they arrive; see `simulate`."""
    rng = np.random.default_rng(0)
    table, begin_s = episode.table, time.monotonic() + 1.0
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        asking = []
        for i in range(len(table)):
            body = {
                "prompt": rng.integers(0, 50_000, int(table.prompt_tokens[i])).tolist(),
                "max_tokens": int(table.output_tokens[i]),
                "ignore_eos": True,
                "stream": True,
            }
            due_s = begin_s + float(table.arrival_s[i]) / speed
            asking.append(ask(session, url, json.dumps(body).encode(), due_s))
        return np.array(await asyncio.gather(*asking)).T


async def ask(
    session: aiohttp.ClientSession, url: str, body: bytes, due_s: float
) -> tuple[float, float]:
    """Return TTFT and E2E of a request that is sent when it is due."""
    await asyncio.sleep(due_s - time.monotonic())
    headers = {"Content-Type": "application/json"}
    begin_s, first_s = time.monotonic(), 0.0
    async with session.post(f"{url}/v1/completions", data=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.content:
            if not first_s and line.startswith(b"data: {"):
                first_s = time.monotonic()
    return first_s - begin_s, time.monotonic() - begin_s


def interval(live: np.ndarray, simulated: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of means, and the ends of its 95 % interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(live), (_BOOTSTRAPS, len(live)))
    ratios = live[drawn].mean(1) / simulated[drawn].mean(1)
    return live.mean() / simulated.mean(), *np.quantile(ratios, (0.025, 0.975)).tolist()


if __name__ == "__main__":
    tyro.cli(DisaggregatedLive).run()
