"""Faults while the router is under load: what happened, what failed, and whether it recovered.

    python benchmarks/router_faults.py --out router_faults.json

Replica 0 of the scenario is a process of its own, the victim; the others share one. In every case
the load runs for a while, then something goes wrong, then it is put right. A stream counts as lost
if it did not end as it must; lost rightly are only those that had begun on a killed or hanging
replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import uvloop
from fleet_processes import Engines, Router, metric, post, replica_entries
from load_client import Load, Result, Work
from rich.console import Console
from rich.table import Table

_KEY = "a-key-for-the-fault-benchmark"
_VICTIM = "replica-0"
#: A case never takes so long; its load is stopped.
_LONGEST_S = 600.0
_GOOD = {"model": "Llama-3.1-8B", "max_tokens": 200, "ignore_eos": True, "stream": True}
_MALFORMED = (
    b"",
    b"{",
    b"[" * 10_000,
    b'{"model": "Llama-3.1-8B"}',
    b'{"model": "Llama-3.1-8B", "prompt": {"a": 1}}',
    b'{"model": "Llama-3.1-8B", "prompt": "\xff\xfe"}',
    b'{"model": "Llama-3.1-8B", "prompt": "x", "max_tokens": -5}',
    b'{"model": "other", "prompt": "x"}',
    b"x" * 9_000_000,
)


class Stage:
    """The fleet and the router of one case.

    Attributes:
        notes: What a case wants to say.
    """

    def __init__(self, victim: Engines, others: Engines, router: Router, folder: Path) -> None:
        self.victim, self.others, self.router, self.folder = victim, others, router, folder
        self.notes: Counter[str] = Counter()
        self.policy = ""
        self.scenario = str(others.settings["scenario"])
        self._tasks: list[asyncio.Task[None]] = []

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


async def _storm(stage: Stage) -> None:
    """Two hundred clients come; half of them ask for something; all go at once."""
    body = json.dumps({**_GOOD, "prompt": f"storm {random.random()}"}).encode()
    links = await asyncio.gather(*(stage.connect() for _ in range(200)))
    for i, (_, writer) in enumerate(links):
        if i % 2:
            writer.write(stage.request(body))
    await asyncio.sleep(random.uniform(0.0, 0.3))
    for _, writer in links:
        writer.transport.abort()
    stage.notes["clients that came and went"] += len(links)


async def _bodies(stage: Stage) -> None:
    await stage.send(random.choice(_MALFORMED))


async def _intrude(stage: Stage) -> None:
    await stage.send(json.dumps({**_GOOD, "prompt": "x"}).encode(), random.choice(["", "guess"]))


async def _corrupt(stage: Stage) -> None:
    """Ask for a policy that is broken in one of several ways."""
    wrong = random.choice(
        [str(stage.folder / "corrupt" / "policy.onnx"), "no-such-rule", stage.policy]
    )
    status, _ = await asyncio.to_thread(post, f"{stage.router.admin_url}/policy", {"policy": wrong})
    stage.notes[f"reload answers {status}"] += 1


async def _be_slow(stage: Stage) -> None:
    """Come with clients that send half a body, say nothing, or never read."""
    loop = asyncio.get_running_loop()
    host, _, port = stage.router.url.removeprefix("http://").partition(":")
    body = json.dumps({**_GOOD, "prompt": "deaf", "max_tokens": 20_000}).encode()
    for i in range(60):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.setblocking(False)
        await loop.sock_connect(one, (host, int(port)))
        if i % 3 == 0:
            await loop.sock_sendall(one, stage.request(body))
        elif i % 3 == 1:
            await loop.sock_sendall(one, stage.request(body)[:-10])
        _SLOW.append(one)
    stage.notes["slow clients"] += 60


_SLOW: list[socket.socket] = []


async def _end_slow(_: Stage) -> None:
    while _SLOW:
        _SLOW.pop().close()


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong.

    Attributes:
        begin: Makes it so.
        end: Puts it right.
        every_s: `begin` is repeated after so long; 0 is once.
        may_lose: Whether streams that had begun on the victim may be lost.
        settings: Of the router.
        excused: Whether another request may be lost, by when the fault was there, seconds.
    """

    begin: Callable[[Stage], Awaitable[None]]
    end: Callable[[Stage], Awaitable[None]]
    every_s: float = 0.0
    may_lose: bool = False
    settings: dict[str, Any] | None = None
    excused: Callable[[Result, float], bool] = lambda result, broken_s: False


async def _nothing(_: Stage) -> None:
    pass


def _fault(kind: str, value: float = 1.0, *, everywhere: bool = False) -> Case:
    return Case(
        lambda stage: stage.fault(kind, value, everywhere=everywhere),
        lambda stage: stage.fault("recover", everywhere=everywhere),
        may_lose=kind == "hang",
    )


def _processes(stage: Stage) -> tuple[list[int], int]:
    """Return the process ids of the workers and of the one that decides."""
    workers = [int(worker["pid"]) for worker in stage.router.state()["workers"]]
    main = stage.router.popen.pid
    children = Path(f"/proc/{main}/task/{main}/children").read_text(encoding="ascii").split()
    (decider,) = set(map(int, children)) - set(workers)
    return workers, decider


async def _stop_worker(stage: Stage) -> None:
    workers, _ = await asyncio.to_thread(_processes, stage)
    os.kill(workers[0], signal.SIGSTOP)


async def _stop_decider(stage: Stage) -> None:
    _, decider = await asyncio.to_thread(_processes, stage)
    os.kill(decider, signal.SIGSTOP)


async def _count_replaced(stage: Stage) -> None:
    log = Path(f"/proc/self/fd/{stage.router.log.fileno()}")  # opened anew: the router writes on
    lines = log.read_text(encoding="utf-8").splitlines()
    stage.notes["processes killed and replaced"] += sum("it is killed" in line for line in lines)


async def _restart_drained(stage: Stage) -> None:
    """Restart the victim as one does that is to lose nothing."""

    def left() -> float:
        name = f'servegym_replica_outstanding_requests{{replica="{_VICTIM}"}}'
        return metric(stage.router.metrics(), name)

    admin = stage.router.admin_url
    await asyncio.to_thread(post, f"{admin}/drain", {"replica": _VICTIM})
    while await asyncio.to_thread(left):
        await asyncio.sleep(0.1)
    await asyncio.to_thread(stage.victim.stop)
    await stage.restart()
    await asyncio.to_thread(post, f"{admin}/undrain", {"replica": _VICTIM})


async def _come_and_go(stage: Stage) -> None:
    """Take the victim out of the fleet, and back in under another name."""
    admin, here = stage.router.admin_url, stage.notes["times gone"]
    name = f"{_VICTIM}-{here}" if here else _VICTIM
    request = urllib.request.Request(f"{admin}/replicas/{name}", method="DELETE")
    await asyncio.to_thread(urllib.request.urlopen, request, timeout=5.0)
    entry = replica_entries(stage.scenario, stage.victim.urls * 99)[0]
    while True:  # until its last request is over its url is taken
        again = {**entry, "name": f"{_VICTIM}-{here + 1}"}
        status, _ = await asyncio.to_thread(post, f"{admin}/replicas", again)
        if status == 201:
            break
        stage.notes[f"adding answers {status}"] += 1
        await asyncio.sleep(0.1)
    stage.notes["times gone"] += 1


async def _suspend(stage: Stage) -> None:
    stage.suspend(True)


async def _resume(stage: Stage) -> None:
    stage.suspend(False)


CASES = {
    "replica killed (SIGKILL)": Case(Stage.kill, Stage.restart, may_lose=True),
    "replica slowed 10 times": _fault("slow", 10.0),
    "engine hangs, server answers": _fault("hang"),
    "replica's process stands still": Case(_suspend, _resume, may_lose=True),
    "metrics endpoints down": _fault("metrics-off", everywhere=True),
    "metrics frozen": _fault("metrics-frozen", everywhere=True),
    "corrupt policy on reload": Case(_corrupt, _nothing, 0.3),
    "client storms": Case(_storm, _nothing, 0.2),
    "malformed and oversized bodies": Case(_bodies, _nothing, 0.02),
    "slow and silent clients": Case(_be_slow, _end_slow),
    "a worker hangs (SIGSTOP)": Case(
        _stop_worker,
        _count_replaced,
        settings={"workers": 2},
        excused=lambda result, broken_s: result.sent_s < broken_s,
    ),
    "the deciding process hangs (SIGSTOP)": Case(
        _stop_decider,
        _count_replaced,
        settings={"workers": 2},
        excused=lambda result, _: result.status == 503,
    ),
    "replica drained and restarted": Case(_restart_drained, _nothing),
    "replica leaves and joins": Case(_come_and_go, _nothing, 1.0),
    "no key, no service": Case(_intrude, _nothing, 0.02, settings={"auth": {}}),
}


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
        others = ",".join(str(r) for r in range(1, count + 1))
        with (
            Engines(self.scenario, replicas=others, count=count) as rest,
            contextlib.ExitStack() as stack,
        ):
            victim = Engines(self.scenario, replicas="0", count=1)
            entries = replica_entries(self.scenario, [*victim.urls, *rest.urls])
            settings, headers = self._settings(case, folder)
            router = stack.enter_context(Router(folder, entries, **settings))
            stage = Stage(victim, rest, router, folder)
            stage.policy = settings["dispatch"]["runtime"]["policy"]
            stack.callback(lambda: stage.victim.stop())
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
        load = Load([stage.router.url], Work((200, 2000), (100, 300)), headers=headers)
        begin_s, enough = time.monotonic(), asyncio.Event()
        running = asyncio.create_task(load.run(self.streams, _LONGEST_S, until=enough.is_set))
        await asyncio.sleep(self.before_s)
        fault_s = time.monotonic()
        if case.every_s:
            stage.repeat(lambda: case.begin(stage), case.every_s)
        else:
            await case.begin(stage)
        broken_s = time.monotonic()  # finding out whom to stop takes a while
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
        of_victim = [r for r in lost if case.may_lose and r.begun and r.replica == _VICTIM]
        excused = [r for r in lost if r not in of_victim and case.excused(r, broken_s)]
        wrongly = [r for r in lost if r not in of_victim and r not in excused]
        page = await asyncio.to_thread(stage.router.metrics)
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
        if r.replica == _VICTIM and r.outcome == "ok" and r.sent_s >= over_s
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
