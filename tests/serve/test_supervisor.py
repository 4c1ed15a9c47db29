"""The processes of a router with several workers: each may die, and all end together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import yaml

from servegym.cli import main
from servegym.errors import ConfigError
from servegym.serve.router.config import parse_config
from servegym.serve.router.workers import supervisor
from servegym.serve.router.workers.child import Child

from .running import RATES, run
from .test_command import free_port
from .upstream import Upstream

COMMAND = (sys.executable, "-c", "from servegym.cli import main; main()", "serve", "router")
#: The same program, whose router stands still while it starts, as long as a file is there.
HANGS = """
import pathlib, time
from servegym.cli import main
from servegym.serve.router.app import Router
start = Router.start
async def hang_first(router):
    while pathlib.Path(FILE).exists():
        time.sleep(0.05)
    await start(router)
Router.start = hang_first
main()
"""
STREAM = {"model": "m", "prompt": "hello", "stream": True}


class Processes:
    """A router of two workers, before one replica."""

    def __init__(self, folder: Path, **listen: float) -> None:
        self.listen = listen
        self.replica = Upstream()
        self.port, self.admin_port = free_port(), free_port()
        self.path = folder / "router.yaml"
        self.hangs, self.said = folder / "hangs", folder / "said"

    async def start(self) -> None:
        await self.replica.start()
        config = {
            "replicas": [{"name": "a", "url": self.replica.url, "rates": RATES}],
            "listen": {"port": self.port, "admin_port": self.admin_port, **self.listen},
            "dispatch": {"runtime": {"policy": "least-outstanding"}},
            "drain_s": 10,
        }
        self.path.write_text(yaml.safe_dump(config))
        program = HANGS.replace("FILE", repr(str(self.hangs)))
        command = (sys.executable, "-c", program, *COMMAND[3:])
        with self.said.open("w") as said:
            self.process = await asyncio.create_subprocess_exec(
                *command, "--config", str(self.path), "--workers", "2", stderr=said
            )
        self.client = aiohttp.ClientSession()

    async def state(self) -> dict:
        async with self.client.get(f"http://127.0.0.1:{self.admin_port}/state") as response:
            return json.loads(await response.read())

    async def pids(self) -> list[int]:
        return sorted(worker["pid"] for worker in (await self.state())["workers"])

    async def ask(self, body=STREAM) -> tuple[int, int]:
        """Return status and number of events; a status of 0 stands for an answer that broke off."""
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        # each on a connection of its own
        headers = {"Connection": "close"}
        async with self.client.post(url, json=body, headers=headers) as response:
            try:
                return response.status, (await response.read()).count(b"data: ")
            except aiohttp.ClientError:
                return 0, 0

    async def becomes(self, condition, timeout_s: float = 60.0) -> None:
        """Wait for something to become true, while nobody may be there to say so."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    if await condition():
                        return
                except (aiohttp.ClientError, OSError):
                    pass
                await asyncio.sleep(0.02)

    async def streams(self, count: int) -> list[asyncio.Task[tuple[int, int]]]:
        """Begin answers that stand still behind their first token until `let_go`."""
        self.replica.mode = "pause"
        self.replica.go_on.clear()
        begun = self.replica.sent + count
        asked = [asyncio.create_task(self.ask()) for _ in range(count)]
        async with asyncio.timeout(60):
            while self.replica.sent < begun:
                await asyncio.sleep(0.01)
        return asked

    def let_go(self) -> None:
        self.replica.mode = "ok"
        self.replica.go_on.set()

    async def connects(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except ConnectionRefusedError:
            return False
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return True

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.client.close()
        await self.replica.stop()


def test_a_router_outlives_each_of_its_processes_and_ends_in_order(tmp_path):
    it = Processes(tmp_path)

    async def has_two_workers() -> bool:
        return len(await it.pids()) == 2

    async def test() -> None:
        await it.start()
        await it.becomes(has_two_workers)
        first = await it.pids()
        assert await asyncio.gather(*(it.ask() for _ in range(6))) == [(200, 6)] * 6

        # a worker is killed: its streams break off, the other's go on, and another comes
        streams = await it.streams(8)
        by_pid = {w["pid"]: w["requests"] for w in (await it.state())["workers"]}
        assert sorted(by_pid.values())[0] >= 2  # connections are shared out
        os.kill(first[0], signal.SIGKILL)
        it.let_go()
        ended = await asyncio.gather(*streams)
        assert ended.count((0, 0)) == by_pid[first[0]]
        assert ended.count((200, 6)) == by_pid[first[1]]
        await it.becomes(has_two_workers)
        second = await it.pids()
        assert first[1] in second
        assert first[0] not in second
        features = (await it.state())["replicas"][0]["features"]
        assert features["outstanding_requests"] == 0.0

        # the decider is killed: streams go on, requests are refused until another has come
        decider = _children(it.process.pid) - set(second)
        assert len(decider) == 1
        streams = await it.streams(4)
        os.kill(decider.pop(), signal.SIGKILL)
        assert (await it.ask())[0] in (502, 503)
        it.let_go()
        assert await asyncio.gather(*streams) == [(200, 6)] * 4

        async def answers() -> bool:
            return (await it.ask())[0] == 200

        await it.becomes(answers)
        await it.becomes(has_two_workers)
        assert await it.pids() == second

        # told to stop, it lets streams end, and who connects is refused
        streams = await it.streams(4)
        it.process.send_signal(signal.SIGTERM)

        async def refuses() -> bool:
            return not await it.connects()

        await it.becomes(refuses)
        it.let_go()
        assert await asyncio.gather(*streams) == [(200, 6)] * 4
        assert await asyncio.wait_for(it.process.wait(), 20.0) == 0
        for pid in second:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    async def whole() -> None:
        try:
            await test()
        finally:
            await it.stop()

    run(whole, limit_s=120.0)


def _children(pid: int) -> set[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return set(map(int, text.split()))


@pytest.mark.slow
def test_a_process_that_hangs_is_replaced(tmp_path):
    it = Processes(tmp_path, hang_s=5.0)  # a slow machine must not make one of a live process

    async def has_two_workers() -> bool:
        return len(await it.pids()) == 2

    async def test() -> None:
        await it.start()
        await it.becomes(has_two_workers)
        first = await it.pids()
        os.kill(first[0], signal.SIGSTOP)

        async def is_another() -> bool:
            pids = await it.pids()
            return len(pids) == 2 and first[0] not in pids

        await it.becomes(is_another)
        assert first[1] in await it.pids()
        assert await asyncio.gather(*(it.ask() for _ in range(6))) == [(200, 6)] * 6

        # the one that decides: streams go on, new requests wait for it and are told of its end
        await asyncio.sleep(0.5)
        workers = await it.pids()
        (decider,) = _children(it.process.pid) - set(workers)
        streams = await it.streams(2)
        os.kill(decider, signal.SIGSTOP)
        assert (await it.ask())[0] == 503
        it.let_go()
        assert await asyncio.gather(*streams) == [(200, 6)] * 2
        await it.becomes(has_two_workers)
        assert await it.pids() == workers
        assert await it.ask() == (200, 6)

    async def whole() -> None:
        try:
            await test()
        finally:
            await it.stop()

    run(whole, limit_s=100.0)


@pytest.mark.slow
def test_a_decider_that_hangs_while_it_starts_anew_is_replaced(tmp_path):
    it = Processes(tmp_path, start_s=5.0)

    async def has_two_workers() -> bool:
        return len(await it.pids()) == 2

    async def is_killed() -> bool:
        return "has not begun its work" in it.said.read_text()

    async def answers() -> bool:
        return await it.ask() == (200, 6)

    async def test() -> None:
        try:
            await it.start()
            await it.becomes(has_two_workers)
            workers = await it.pids()
            (decider,) = _children(it.process.pid) - set(workers)
            it.hangs.touch()
            os.kill(decider, signal.SIGKILL)
            await it.becomes(is_killed)
            assert (await it.ask())[0] == 503
            it.hangs.unlink()
            await it.becomes(answers)
            await it.becomes(has_two_workers)
            assert await it.pids() == workers
        finally:
            await it.stop()

    run(test, limit_s=100.0)


def test_a_router_whose_first_decider_hangs_ends_and_says_why(tmp_path):
    it = Processes(tmp_path, start_s=1.0)

    async def test() -> None:
        it.hangs.touch()
        try:
            await it.start()
            assert await asyncio.wait_for(it.process.wait(), 60.0) == 2
        finally:
            await it.stop()

    run(test, limit_s=100.0)
    said = it.said.read_text()
    assert "has not begun to decide within 1 s: look what it waits for, or give it longer" in said
    assert "Traceback" not in said


def test_its_processes_do_not_outlive_a_supervisor_that_is_killed(tmp_path):
    it = Processes(tmp_path)

    async def test() -> None:
        try:
            await it.start()

            async def has_two_workers() -> bool:
                return len(await it.pids()) == 2

            await it.becomes(has_two_workers)
            pids = _children(it.process.pid)
            assert len(pids) == 3
            it.process.kill()
            await it.process.wait()
            await asyncio.sleep(0.05)

            async def are_gone() -> bool:
                return not any(_is_running(pid) for pid in pids)

            await it.becomes(are_gone, 20.0)
        finally:
            await it.stop()

    run(test, limit_s=100.0)


def _is_running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_what_the_decider_cannot_use_is_said_in_one_sentence(tmp_path):
    path = tmp_path / "router.yaml"
    config = {
        "replicas": [{"name": "a", "url": "http://127.0.0.1:9", "rates": RATES}],
        "listen": {"port": 0, "admin_port": 0, "workers": 2},
        "dispatch": {"runtime": {"policy": str(tmp_path / "none" / "policy.onnx")}},
    }
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [*COMMAND, "--config", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "must exist with a manifest.json beside it" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_taken_is_said(tmp_path):
    config = parse_config(
        {
            "replicas": [{"name": "a", "url": "http://127.0.0.1:9", "rates": RATES}],
            "listen": {"port": 0, "host": "192.0.2.1", "admin_port": 0},
        },
        "test",
    )
    with pytest.raises(ConfigError, match="the router cannot listen: "):
        supervisor.supervise(config, lambda router: None)


def test_a_child_that_keeps_failing_is_started_later_and_later(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    child = Child("worker 0", lambda: 0)
    child.start_s, child.is_up = 50.0, True
    pauses = []
    for _ in range(8):  # the first has lived for 50 s, the others die at once
        child.ended()
        pauses.append(round(child.start_s - now_s, 6))
        now_s = child.start_s
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    now_s += 10.0  # it has lived so long, but not begun its work
    child.ended()
    assert (child.failures, round(child.start_s - now_s, 6)) == (9, 5.0)
    now_s, child.is_up = child.start_s + 10.0, True
    child.ended()
    assert (child.failures, round(child.start_s - now_s, 6)) == (1, 0.1)


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [("0", "--workers must be from 1 to 64, got 0"), ("65", "must be from 1 to 64, got 65")],
)
def test_a_wrong_number_of_workers_is_one_sentence(tmp_path, capsys, workers, sentence):
    path = tmp_path / "router.yaml"
    path.write_text(
        "replicas: [{name: a, url: 'http://127.0.0.1:9', "
        "rates: {prefill_tokens_per_s: 1000, decode_step_s: 0.01}}]\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["serve", "router", "--config", str(path), "--workers", workers])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    path.write_text(path.read_text() + "listen: {workers: 0}\n")
    with pytest.raises(SystemExit):
        main(["serve", "router", "--config", str(path)])
    said = capsys.readouterr().err
    assert "listen.workers" in said
    assert said.count("\n") == 1
