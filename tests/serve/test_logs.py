"""The router's log: what machines read, and what it never says."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import signal
import subprocess
import sys
from datetime import datetime

import aiohttp
import pytest
import yaml

from servegym.errors import ConfigError
from servegym.serve.router.config import LogConfig, parse_config
from servegym.serve.router.logs import JsonLines, TextLines, set_up

from .running import RATES, run, running, until
from .test_command import answer, free_port

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 5}
STREAM = {**BODY, "stream": True}
ALICE, WRONG, FLEET, URL = (f"{who}-0123456789abcdef" for who in ("alice", "wrong", "fleet", "url"))


@pytest.fixture
def lines():
    """Set the process's log up as a router does; return what writes there."""
    root, ours = logging.getLogger(), logging.getLogger("servegym")
    before = root.handlers[:], root.level, ours.level
    written = io.StringIO()

    def begin(**settings) -> io.StringIO:
        set_up(LogConfig(**settings))
        root.handlers[0].setStream(written)
        return written

    yield begin
    root.handlers[:], level, own = before
    root.setLevel(level)
    ours.setLevel(own)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_line_is_an_object_with_the_id_of_its_request(lines, num_workers):
    written = lines(format="json", requests=True)

    async def test() -> None:
        settings = {"log": {"format": "json", "requests": True}}
        async with running(2, num_workers, **settings) as it:
            await it.post(STREAM, headers={"X-Request-Id": "mine"})
            await it.post({"model": "m"}, headers={"X-Request-Id": 'a "quoted"\tone'})
            await it.post(BODY, headers={"X-Request-Id": "überall"})
            await it.get("/health")  # machines ask for it every few seconds: no line

    run(test)
    found = [json.loads(line) for line in written.getvalue().splitlines()]
    assert len(found) >= 5  # two replicas that are up, and three requests
    for line in found:
        assert {"time", "level", "logger", "process", "message"} <= line.keys()
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
    first, second, third = (line for line in found if line["logger"].endswith("router.logs"))
    assert first["request_id"] == "mine"
    assert (first["method"], first["endpoint"]) == ("POST", "/v1/completions")
    assert (first["status"], first["tenant"]) == (200, "default")
    assert first["replica"] in ("r0", "r1")
    assert 0 < first["duration_s"] < 5
    assert first["level"] == "info"
    assert (second["status"], "replica" in second) == (400, False)
    assert third["request_id"] == "überall"
    assert [line["request_id"] for line in found if "request_id" in line] == [
        first["request_id"],
        second["request_id"],
        third["request_id"],
    ]


def test_an_error_of_a_request_has_its_id_and_its_traceback(lines, monkeypatch):
    written = lines(format="json")

    async def test() -> None:
        async with running(1) as it:
            broken = f"no header may be Authorization: Bearer {ALICE}"
            monkeypatch.setattr(
                it.router._proxy, "forward", lambda *_, **__: (_ for _ in ()).throw(OSError(broken))
            )
            status, _, _ = await it.post(BODY, headers={"X-Request-Id": "mine"})
            assert status == 500

    run(test)
    (line,) = (
        found
        for found in map(json.loads, written.getvalue().splitlines())
        if found["level"] == "error"
    )
    assert line["request_id"] == "mine"
    assert line["error"]["type"] == "OSError"
    assert "Traceback" in line["error"]["traceback"]
    assert "Bearer ***" in line["error"]["traceback"]
    assert ALICE not in written.getvalue()


def test_an_error_where_it_is_decided_has_the_id_too(lines, monkeypatch):
    written = lines(format="json")

    async def test() -> None:
        async with running(1, 1) as it:
            monkeypatch.setattr(it.router.dispatcher, "arrive", lambda *_, **__: 1 / 0)
            status, _, _ = await it.post(BODY, headers={"X-Request-Id": "mine"})
            assert status == 500

    run(test)
    found = [json.loads(line) for line in written.getvalue().splitlines()]
    (line,) = (one for one in found if one["level"] == "error")
    assert (line["request_id"], line["error"]["type"]) == ("mine", "ZeroDivisionError")


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_key_is_ever_logged_whatever_happens(lines, monkeypatch, form):
    written = lines(format=form, level="debug", requests=True)
    monkeypatch.setenv("KEYS", f"alice={ALICE}")
    monkeypatch.setenv("FLEET", FLEET)
    # of the test's replicas, which are servers of aiohttp; the router has none
    monkeypatch.setattr(logging.getLogger("aiohttp.access"), "disabled", True)

    async def test() -> None:
        settings = {
            "auth": {"keys_env": "KEYS"},
            "upstream_key_env": "FLEET",
            "log": {"format": form, "level": "debug", "requests": True},
            "health": {"timeout_s": 0.1, "down_after": 1},
            "metrics": {"interval_s": 0.02},
        }
        async with running(2, **settings) as it:
            good = {"Authorization": f"Bearer {ALICE}"}
            await it.post(STREAM, headers=good)
            await it.post(STREAM, headers={"Authorization": f"Bearer {WRONG}"})
            await it.post(STREAM, f"/v1/completions?key={ALICE}", headers=good)
            await it.post(STREAM, f"/v1/{ALICE}", headers=good)
            for mode in ("die", "die_first", "error", "error_first", 500, 503, 429):
                it.replicas[0].mode = it.replicas[1].mode = mode
                try:
                    await it.post(STREAM, headers=good)
                except aiohttp.ClientError:
                    continue
            # what is not HTTP, on either port
            for port in (it.router.port, it.router.admin_port):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"NO HTTP Authorization: Bearer {ALICE}\r\n\r\n".encode())
                await reader.read()
                writer.close()
            it.router.reload_keys()
            monkeypatch.setenv("KEYS", f"alice={ALICE},bob={ALICE}")
            it.router.reload_keys()  # refused: two tenants have it
            await it.operate("/policy", {"policy": "nonsense"})
            it.replicas[0].healthy = it.replicas[0].metrics = False
            await until(lambda: not it.state.is_up(0))

    run(test)
    said = written.getvalue()
    assert said.count("answered") > 8
    assert "tenants alice and bob have the same key" in said
    assert [key for key in (ALICE, WRONG, FLEET, "hello there") if key in said] == []


def test_a_password_in_a_replicas_url_is_not_shown(lines, capsys):
    data = {
        "replicas": [
            {"name": name, "url": f"http://user:{URL}@127.0.0.1:1/x", "rates": RATES}
            for name in "ab"
        ]
    }
    with pytest.raises(ConfigError, match=r"have the same url, http://127.0.0.1:1/x:") as found:
        parse_config(data, "router.yaml")
    assert URL not in str(found.value)
    written = lines()

    async def test() -> None:
        async with running(1, replicas=data["replicas"][:1]):
            pass

    run(test)
    assert "a is down: http://127.0.0.1:1/x/health has never answered well" in written.getvalue()
    assert URL not in written.getvalue()


def test_levels_leave_out_what_is_less_important(lines):
    written = lines(level="warning")
    logging.getLogger("servegym.x").info("small")
    logging.getLogger("servegym.x").warning("large")
    logging.getLogger("elsewhere").warning("theirs")
    assert re.findall(r"\S+$", written.getvalue(), re.M) == ["large", "theirs"]
    written.truncate(0)
    lines(level="debug")
    logging.getLogger("servegym.x").debug("ours")
    logging.getLogger("elsewhere").debug("theirs")
    assert "ours" in written.getvalue()
    assert "theirs" not in written.getvalue()  # what other libraries send and get


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_credentials_of_other_libraries_are_blanked_out(formatter):
    message = f"sent {{'Authorization': 'Bearer {ALICE}', 'proxy': 'Basic {URL}'}} to a bearer."
    record = logging.LogRecord("x", logging.INFO, "", 0, message, None, None)
    said = formatter.format(record)
    assert ALICE not in said
    assert URL not in said
    assert "'Authorization': 'Bearer ***', 'proxy': 'Basic ***'" in said


def test_the_program_writes_nothing_but_objects(tmp_path):
    port = free_port()
    path = tmp_path / "router.yaml"
    config = {
        "replicas": [{"name": "a", "url": f"http://127.0.0.1:{free_port()}", "rates": RATES}],
        "listen": {"port": port, "admin_port": 0},
        "log": {"format": "json"},
        "drain_s": 1,
    }
    path.write_text(yaml.safe_dump(config))
    code = "from servegym.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "router", "--config", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert answer(f"http://127.0.0.1:{port}/health") == 503
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    messages = [json.loads(line)["message"] for line in said.splitlines()]
    assert any(f"http://127.0.0.1:{port}/v1" in message for message in messages)
    assert any(message.startswith("stopping") for message in messages)
