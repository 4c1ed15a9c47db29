"""Faults while the router is under load: what happened, what failed, and whether it recovered.

    python benchmarks/router_faults.py --out router_faults.json

Replica 0 of the scenario is a process of its own, the victim; the others share one. In every case
the load runs for a while, then something goes wrong, then it is put right. A stream counts as lost
if it did not end as it must; lost rightly are only those that had begun on a killed or hanging
replica, or that a killed process of the router carried.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import uvloop
from fault_cases import CASES
from fault_stage import VICTIM, Case, Stage
from fleet_processes import Engines, Router, free_ports, metric, replica_entries
from load_client import Load, Result, Work
from rich.console import Console
from rich.table import Table

_KEY = "a-key-for-the-fault-benchmark"
#: A case never takes so long; its load is stopped.
_LONGEST_S = 600.0


@dataclass(frozen=True)
class RouterFaults:
    """Let things go wrong under load."""

    scenario: str = "mixed-chat"
    """Of the replicas."""
    policy: str = "added-delay"
    """Rule or policy.onnx of the router."""
    streams: int = 200
    """Open at any time."""
    before_s: float = 10.0
    """Load before the fault."""
    fault_s: float = 15.0
    """Length of the fault."""
    after_s: float = 15.0
    """Load after it."""
    timeout_s: float = 5.0
    """Of the router, to the first token and between two; half of it makes a replica silent."""
    only: str = ""
    """Only cases whose name contains this."""
    out: Path | None = None
    """JSON file."""

    def run(self) -> None:
        """Play all cases, print the table and write it."""
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for case_name, case in CASES.items():
                if self.only in case_name:
                    rows.append({"case": case_name, **self._play(case, folder)})
                    Console(stderr=True).print(rows[-1])
        if self.out is not None:
            self.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        _show(rows)

    def _play(self, case: Case, folder: Path) -> dict[str, Any]:
        count = len(replica_entries(self.scenario)) - 1
        kept = ",".join(str(r) for r in range(1, count + 1))
        with (
            Engines(self.scenario, replicas=kept, count=count) as rest,
            contextlib.ExitStack() as stack,
        ):
            victim = Engines(self.scenario, replicas="0", count=1)
            entries = replica_entries(self.scenario, [*victim.urls, *rest.urls])
            settings, headers = self._settings(case, folder)
            stage = Stage(victim, rest, [], folder)
            stage.policy = settings["dispatch"]["runtime"]["policy"]
            stack.callback(lambda: [process.stop() for process in (stage.victim, *stage.routers)])
            ports = free_ports(case.routers)
            for port in ports:
                others = [f"127.0.0.1:{other}" for other in ports if other != port]
                if others:
                    settings["peers"] = {"port": port, "addresses": others}
                stage.routers.append(Router(folder, entries, **settings))
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(self._measure(case, stage, headers))

    def _settings(self, case: Case, folder: Path) -> tuple[dict[str, Any], str]:
        policy = self.policy
        corrupt = folder / "corrupt"
        shutil.rmtree(corrupt, ignore_errors=True)
        if policy.endswith(".onnx"):
            shutil.copytree(Path(policy).parent, corrupt)
            graph = (corrupt / "policy.onnx").read_bytes()
            (corrupt / "policy.onnx").write_bytes(graph[: len(graph) // 2])
        else:
            corrupt.mkdir()
            (corrupt / "policy.onnx").write_bytes(b"no graph")
            (corrupt / "manifest.json").write_text('{"sha256": "0"}', encoding="utf-8")
        settings: dict[str, Any] = {
            "dispatch": {"runtime": {"policy": policy}},
            "request": {
                "first_byte_timeout_s": self.timeout_s,
                "stall_timeout_s": self.timeout_s,
                "body_timeout_s": self.timeout_s,
                "client_timeout_s": self.timeout_s,
            },
            "health": {"interval_s": 1.0, "silent_after_s": self.timeout_s / 2},
            **(case.settings or {}),
        }
        headers = ""
        if "auth" in settings:
            keys = folder / "keys.yaml"
            keys.write_text(f"load: {_KEY}\n", encoding="utf-8")
            settings["auth"] = {"keys_file": str(keys)}
            headers = f"Authorization: Bearer {_KEY}\r\n"
        return settings, headers

    async def _measure(self, case: Case, stage: Stage, headers: str) -> dict[str, Any]:
        urls, work = [router.url for router in stage.routers], Work((200, 2000), (100, 300))
        load = Load(urls, work, headers=headers, elsewhere=len(urls) > 1)
        begin_s, enough = time.monotonic(), asyncio.Event()
        running = asyncio.create_task(load.run(self.streams, _LONGEST_S, until=enough.is_set))
        await asyncio.sleep(self.before_s)
        fault_s = time.monotonic()
        if case.every_s:
            stage.repeat(lambda: case.begin(stage), case.every_s)
        else:
            await case.begin(stage)
        broken_s = stage.broken_s or time.monotonic()  # finding out whom to stop takes a while
        await asyncio.sleep(self.fault_s)
        await stage.stop_repeating()
        await case.end(stage)
        over_s = time.monotonic()  # a killed process has come up again by now
        await asyncio.sleep(self.after_s)
        enough.set()
        stop_s = time.monotonic()
        tally = await running
        await asyncio.sleep(2.0)
        end_s = time.monotonic()
        results = tally.results
        lost = [r for r in results if r.outcome != "ok"]
        of_victim = [r for r in lost if case.may_lose and r.begun and r.replica == VICTIM]
        excused = [r for r in lost if r not in of_victim and case.excused(r, broken_s)]
        wrongly = [r for r in lost if r not in of_victim and r not in excused]
        page = await asyncio.to_thread(stage.metrics)
        states = [
            state
            for engines in (stage.victim, stage.others)
            for state in await asyncio.to_thread(engines.state)
        ]
        return {
            "requests": len(results),
            "ok": len(results) - len(lost),
            "lost_begun_on_victim": len(of_victim),
            "lost_of_the_router": len(excused),
            "lost_otherwise": len(wrongly),
            "outcomes": dict(Counter(r.outcome for r in lost)),
            "details": sorted({r.detail for r in wrongly if r.detail})[:4],
            "ok_per_s": [
                round(_rate(results, *span), 1)
                for span in (
                    (begin_s + self.before_s / 2, fault_s),
                    (fault_s, over_s),
                    (over_s, stop_s),
                )
            ],
            "ttft_p50_s": [
                round(_median_ttft(results, *span), 3)
                for span in ((begin_s, fault_s), (fault_s, over_s), (over_s, end_s))
            ],
            "victim_back_s": _first_after(results, over_s),
            "fallbacks": metric(page, "servegym_decisions_total")
            - metric(page, 'servegym_decision_reasons_total{reason="policy"}'),
            "retries": metric(page, "servegym_router_retries_total"),
            "left_in_router": metric(page, "servegym_router_in_flight")
            + metric(page, "servegym_replica_outstanding_requests"),
            "left_in_engines": sum(state["num_streams"] for state in states),
            "router_rss_mb": round(stage.router.rss_bytes / 1e6),
            "load": os.getloadavg(),
            "notes": dict(stage.notes),
        }


def _rate(results: Sequence[Result], from_s: float, to_s: float) -> float:
    ended = sum(r.outcome == "ok" and from_s <= r.end_s < to_s for r in results)
    return ended / max(to_s - from_s, 1e-9)


def _median_ttft(results: Sequence[Result], from_s: float, to_s: float) -> float:
    found = [r.first_s - r.sent_s for r in results if r.begun and from_s <= r.sent_s < to_s]
    return statistics.median(found) if found else float("nan")


def _first_after(results: Sequence[Result], over_s: float) -> float | None:
    """Seconds until the victim begins to answer a request that came after the fault."""
    times = [
        r.first_s - over_s
        for r in results
        if r.replica == VICTIM and r.outcome == "ok" and r.sent_s >= over_s
    ]
    return round(min(times), 2) if times else None


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Faults under load")
    for column in (
        *("fault", "requests", "lost: begun on victim", "with the router's", "otherwise"),
        *("ok/s before, during, after", "victim back after, s", "left behind", "notes"),
    ):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["case"],
            str(row["requests"]),
            str(row["lost_begun_on_victim"]),
            str(row["lost_of_the_router"]),
            str(row["lost_otherwise"]),
            " ".join(f"{x:.0f}" for x in row["ok_per_s"]),
            str(row["victim_back_s"]),
            f"{row['left_in_router']:.0f} + {row['left_in_engines']}",
            ", ".join(f"{n} {k}" for k, n in row["notes"].items()),
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    tyro.cli(RouterFaults).run()
