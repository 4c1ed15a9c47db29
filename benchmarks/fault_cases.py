"""What goes wrong in `router_faults.py`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import time
import urllib.request
from pathlib import Path

from fault_stage import VICTIM, Case, Stage
from fleet_processes import metric, post, replica_entries

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
        name = f'servegym_replica_outstanding_requests{{replica="{VICTIM}"}}'
        return metric(stage.router.metrics(), name)

    admin = stage.router.admin_url
    await asyncio.to_thread(post, f"{admin}/drain", {"replica": VICTIM})
    while await asyncio.to_thread(left):
        await asyncio.sleep(0.1)
    await asyncio.to_thread(stage.victim.stop)
    await stage.restart()
    await asyncio.to_thread(post, f"{admin}/undrain", {"replica": VICTIM})


async def _come_and_go(stage: Stage) -> None:
    """Take the victim out of the fleet, and back in under another name."""
    admin, here = stage.router.admin_url, stage.notes["times gone"]
    name = f"{VICTIM}-{here}" if here else VICTIM
    request = urllib.request.Request(f"{admin}/replicas/{name}", method="DELETE")
    await asyncio.to_thread(urllib.request.urlopen, request, timeout=5.0)
    entry = replica_entries(stage.scenario, stage.victim.urls * 99)[0]
    while True:  # until its last request is over its url is taken
        again = {**entry, "name": f"{VICTIM}-{here + 1}"}
        status, _ = await asyncio.to_thread(post, f"{admin}/replicas", again)
        if status == 201:
            break
        stage.notes[f"adding answers {status}"] += 1
        await asyncio.sleep(0.1)
    stage.notes["times gone"] += 1


async def _restart_routers(stage: Stage) -> None:
    """Restart one router after the other, each when the one before serves again."""
    for i, router in enumerate(stage.routers):
        told_s = time.monotonic()
        router.popen.terminate()
        status = await asyncio.to_thread(router.popen.wait, 90.0)
        stage.notes[f"s until router {i} had ended"] = round(time.monotonic() - told_s)
        stage.notes["ended with another status than 0"] += status != 0
        stage.routers[i] = await asyncio.to_thread(router.again)


async def _kill_router(stage: Stage) -> None:
    """Kill the second router, and wait until the first no longer counts its requests."""
    first, second = stage.routers

    def told() -> int:
        """Requests at the replicas that the first router has of the second."""
        return int(first.state()["peers"][0]["outstanding_requests"])

    stage.notes["requests it had told of"] = await asyncio.to_thread(told)
    second.popen.kill()
    second.popen.wait()
    stage.broken_s = time.monotonic()
    while await asyncio.to_thread(told):
        await asyncio.sleep(0.01)
    stage.notes["ms until they no longer counted"] = round(
        1e3 * (time.monotonic() - stage.broken_s)
    )


async def _start_router(stage: Stage) -> None:
    stage.routers[1] = await asyncio.to_thread(stage.routers[1].again)


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
    "two routers restarted in turn": Case(_restart_routers, _nothing, routers=2),
    "two routers of two workers restarted in turn": Case(
        _restart_routers, _nothing, settings={"workers": 2}, routers=2
    ),
    "one of two routers killed (SIGKILL)": Case(
        _kill_router,
        _start_router,
        routers=2,
        excused=lambda result, broken_s: result.url_idx == 1 and result.sent_s < broken_s,
    ),
    "no key, no service": Case(_intrude, _nothing, 0.02, settings={"auth": {}}),
}
