"""What routers lose that do not know of each other, and what telling each other gives back.

    python benchmarks/router_peers.py --out router_peers.json
    python benchmarks/router_peers.py --chat --out router_peers_chat.json

One router, then several with and without `peers`, stand before the same emulated replicas. Clients
go to the routers in turn, each with one request at a time, and ask for the same in every part;
parts follow each other in rounds, in turned order, as the machine may do other things, too. How
uneven the load is, is looked at again and again: the standard deviation of the replicas' requests
in progress over their mean.

With `--chat` clients hold conversations, and all routers of a part are peers: what is compared is a
client that keeps to one router with one that goes to any, turn by turn. Cached is the share of the
tokens of prompts that the engines found in their caches.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
import uvloop
from chat_load import Chat, ChatLoad
from fleet_processes import Engines, Router, free_ports, get, metric, replica_entries
from load_client import Load, Tally, Work
from rich.console import Console
from rich.table import Table
from router_cpu import interval

#: Found in each part, by round.
Found = dict[str, dict[str, list[float]]]


class Part(NamedTuple):
    """What is measured by turns with other parts.

    Attributes:
        urls: Of the routers.
        spread: Whether each turn of a conversation goes to one of them drawn at random.
    """

    urls: list[str]
    spread: bool = False


@dataclass(frozen=True)
class RouterPeers:
    """Measure several routers before one fleet, by turns."""

    scenario: str = "mixed-chat"
    """Of the eight replicas."""
    policy: str = "added-delay"
    """Of all routers."""
    routers: tuple[int, ...] = (2, 4)
    """Numbers of routers beside one."""
    clients: int = 64
    """Requests in progress."""
    seconds: float = 30.0
    """Of a part."""
    warm_up_s: float = 5.0
    """At the beginning of each part; its requests do not count."""
    look_s: float = 0.2
    """Between two looks at the replicas."""
    speed: float = 1.0
    """Of the emulated engines."""
    metrics_s: float = 0.25
    """Between two polls of an engine's metrics, by each router."""
    rounds: int = 5
    """Of all parts."""
    chat: bool = False
    """Whether clients hold conversations."""
    out: Path | None = None
    """JSON file."""

    def run(self) -> None:
        """Measure, print and write."""
        found: Found = {}
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            entries = replica_entries(self.scenario)
            engines = stack.enter_context(
                Engines(self.scenario, count=len(entries), speed=self.speed)
            )
            parts = self._parts(Path(name), engines, stack)
            for turn in range(self.rounds):
                for label, part in list(parts.items())[:: -1 if turn % 2 else 1]:
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        values = runner.run(self._part(turn, label, part, engines))
                    for what, value in values.items():
                        found.setdefault(label, {}).setdefault(what, []).append(value)
                    Console(stderr=True).print(turn, label, values)
        document: dict[str, Any] = {
            "settings": {k: str(v) for k, v in self.__dict__.items()},
            "load": os.getloadavg(),
            "found": found,
        }
        if self.out is not None:
            self.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
        _show(found)

    def _parts(self, folder: Path, engines: Engines, stack: ExitStack) -> dict[str, Part]:
        """Start all routers; return the parts by name."""
        entries = replica_entries(self.scenario, engines.urls)
        parts: dict[str, Part] = {}
        for count in (1, *self.routers):
            tells = (True,) if self.chat else (False, True)
            for told in tells if count > 1 else (False,):
                ports = free_ports(count)
                urls = []
                for port in ports:
                    others = [f"127.0.0.1:{other}" for other in ports if other != port]
                    peers = {"peers": {"port": port, "addresses": others}} if told else {}
                    router = Router(
                        folder,
                        entries,
                        dispatch={"runtime": {"policy": self.policy}},
                        metrics={"interval_s": self.metrics_s},
                        **peers,
                    )
                    stack.enter_context(router)
                    urls.append(router.url)
                if count == 1:
                    parts["1"] = Part(urls)
                elif self.chat:
                    parts[f"{count} routers, a client keeps to one"] = Part(urls)
                    parts[f"{count} routers, a client goes to any"] = Part(urls, spread=True)
                else:
                    parts[f"{count} routers, {'peers' if told else 'apart'}"] = Part(urls)
        return parts

    async def _part(self, turn: int, label: str, part: Part, engines: Engines) -> dict[str, float]:
        load: Load
        if self.chat:
            salt = f"{turn} {label}"
            load = ChatLoad(part.urls, Chat(), spread=part.spread, seed=turn, salt=salt)
        else:
            load = Load(part.urls, Work((500, 8000), (50, 300)), seed=turn)
        before: list[float] = []
        spreads: list[float] = []

        async def look() -> None:
            await asyncio.sleep(self.warm_up_s)
            before.extend(await asyncio.to_thread(_prompt_tokens, engines))
            while True:
                states = await asyncio.to_thread(engines.state)
                there = np.array([state["num_streams"] for state in states], np.float64)
                spreads.append(float(there.std() / max(1.0, there.mean())))
                await asyncio.sleep(self.look_s)

        looking = asyncio.create_task(look())
        begin_s = asyncio.get_running_loop().time()
        tally = await load.run(self.clients, self.seconds)
        looking.cancel()
        after = await asyncio.to_thread(_prompt_tokens, engines)
        cached, all_tokens = (late - early for late, early in zip(after, before, strict=True))
        found = self._values(tally, begin_s + self.warm_up_s)
        return found | {"cached": cached / all_tokens, "spread": float(np.mean(spreads))}

    def _values(self, tally: Tally, from_s: float) -> dict[str, float]:
        good = [r for r in tally.results if r.outcome == "ok" and r.sent_s >= from_s]
        ttft_s = np.array([r.first_s - r.sent_s for r in good])
        e2e_s = np.array([r.end_s - r.sent_s for r in good])
        return {
            "TTFT mean, s": float(ttft_s.mean()),
            "TTFT p50, s": float(np.quantile(ttft_s, 0.5)),
            "TTFT p99, s": float(np.quantile(ttft_s, 0.99)),
            "E2E mean, s": float(e2e_s.mean()),
            "requests": float(len(good)),
            "lost": float(sum(r.outcome != "ok" for r in tally.results)),
        }


def _prompt_tokens(engines: Engines) -> tuple[float, float]:
    """Prompt tokens that all engines have found cached, and looked for, since their start."""
    pages = [get(f"{url}/metrics") for url in engines.urls]
    hits, queries = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    return sum(metric(p, hits) for p in pages), sum(metric(p, queries) for p in pages)


def _show(found: Found) -> None:
    first = next(iter(found))
    load = os.getloadavg()[1]
    table = Table(
        title=f"Medians, and over one router; load average {load:.1f} on {os.cpu_count()}"
    )
    for column in ("", *found):
        table.add_column(column, justify="right")
    for what in found[first]:
        base, row = np.array(found[first][what]), []
        for label, values in found.items():
            text = f"{np.median(values[what]):.3g}"
            if label != first and base.all():
                text += "\n{:.2f} [{:.2f}, {:.2f}]".format(*interval(np.array(values[what]) / base))
            row.append(text)
        table.add_row(what, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    tyro.cli(RouterPeers).run()
