"""Replicas that come and go in front of a running router: operators, a watched file, names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os

import pytest
import yaml

from servegym.errors import ConfigError
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config

from .running import RATES, VirtualTimeLoop, run, running, until
from .upstream import Upstream

STREAM = {"prompt": "hello", "stream": True, "max_tokens": 50}


def entry(name: str, replica: Upstream, **more) -> dict:
    return {"name": name, "url": replica.url, "rates": RATES, **more}


@contextlib.asynccontextmanager
async def upstream():
    one = Upstream()
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


async def remove(it, name: str):
    async with it.client.delete(f"{it.admin}/replicas/{name}") as response:
        return response.status, await response.json()


async def listed(it) -> dict[str, dict]:
    async with it.client.get(f"{it.admin}/replicas") as response:
        return {replica["name"]: replica for replica in await response.json()}


def answered_by(answers) -> list[str]:
    assert {status for status, _, _ in answers} == {200}
    return [headers["X-Servegym-Replica"] for _, _, headers in answers]


def test_an_added_replica_gets_requests_and_a_removed_one_none():
    async def test():
        async with running(1) as it, upstream() as newcomer:
            status, said = await it.operate("/replicas", entry("new", newcomer))
            assert (status, said["name"], said["takes_requests"]) == (201, "new", False)
            await until(lambda: it.state.is_up(1))
            answers = [await it.post({"prompt": "hi"}) for _ in range(8)]
            assert set(answered_by(answers)) == {"r0", "new"}
            status, said = await remove(it, "r0")
            assert (status, said) == (200, {"replica": "r0", "outstanding_requests": 0})
            answers = [await it.post({"prompt": "hi"}) for _ in range(4)]
            assert answered_by(answers) == ["new"] * 4
            assert list(await listed(it)) == ["new"]
            _, page = await it.get("/metrics")
            assert 'servegym_replica_up{replica="new"} 1' in page
            assert 'replica="r0"' not in page
            _, health = await it.get("/health")
            assert json.loads(health) == {"status": "ok", "replicas_up": 1, "replicas": 1}

    run(test)


def test_requests_on_a_removed_replica_finish_and_its_slot_is_free_after_them():
    async def test():
        async with running(2) as it, upstream() as newcomer:
            it.replicas[0].tokens, it.replicas[0].gap_s = 30, 0.01
            it.router._health.drain(1, True)
            answering = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.replicas[0].sent > 2)
            it.router._health.drain(1, False)
            _, said = await remove(it, "r0")
            assert said["outstanding_requests"] == 1
            leaving = (await listed(it))["r0"]
            assert (leaving["leaving"], leaving["outstanding_requests"]) == (True, 1)
            # the slot is not free yet: whoever comes gets another
            await it.operate("/replicas", entry("new", newcomer))
            assert it.router.fleet["new"].slot == 2
            answers = [await it.post({"prompt": "hi"}) for _ in range(3)]
            assert "r0" not in answered_by(answers)
            status, body, headers = await answering
            assert (status, headers["X-Servegym-Replica"]) == (200, "r0")
            assert body.count(b'"text"') == 30
            assert body.endswith(b"data: [DONE]\n\n")
            await until(lambda: not it.router.fleet.leaving)
            assert it.router.dispatcher.names == ["", "r1", "new"]
            assert set(await listed(it)) == {"r1", "new"}
            async with upstream() as another:
                await it.operate("/replicas", entry("another", another))
                assert it.router.fleet["another"].slot == 0
                await until(lambda: it.state.is_up(0))
                answers = await asyncio.gather(*(it.post({"prompt": "hi"}) for _ in range(9)))
                assert set(answered_by(answers)) == {"r1", "new", "another"}

    run(test, loop=VirtualTimeLoop)


def test_no_answer_is_lost_while_the_fleet_changes():
    async def test():
        async with running(3) as it:
            for replica in it.replicas:
                replica.tokens, replica.gap_s = 12, 0.01

            async def ask(i: int) -> None:
                await asyncio.sleep(0.02 * i)
                status, body, _ = await it.post({**STREAM, "prompt": f"hello {i}"})
                assert status == 200
                assert body.count(b'"text"') == 12
                assert body.endswith(b"data: [DONE]\n\n")

            async def change() -> None:
                for turn in range(6):
                    k = turn % 3
                    status, _ = await remove(it, f"r{k}")
                    assert status == 200
                    status, _ = await it.operate("/replicas", entry(f"r{k}", it.replicas[k]))
                    assert status == 201
                    await until(lambda k=k: it.router.fleet[f"r{k}"].slot in up(it))

            await asyncio.gather(change(), *(ask(i) for i in range(80)))
            await until(lambda: not it.router.fleet.leaving)
            assert len(it.router.fleet) == 3
            assert sum(len(replica.bodies) for replica in it.replicas) == 80  # none twice
            assert it.router.telemetry.outcomes == {"finished": 80}
            assert it.idle()

    run(test, loop=VirtualTimeLoop)


def up(it) -> list[int]:
    return [slot for slot in it.router.dispatcher.slots() if it.state.is_up(slot)]


def test_requests_that_wait_at_the_router_are_decided_anew():
    async def test():
        async with running(1, request={"max_hold_s": 5.0}) as it, upstream() as newcomer:
            await remove(it, "r0")
            waiting = asyncio.create_task(it.post({"prompt": "hi"}))
            await until(lambda: it.state.num_held == 1)
            await it.operate("/replicas", entry("new", newcomer))
            assert answered_by([await waiting]) == ["new"]

    run(test)


def test_a_retry_does_not_go_to_a_replica_that_has_left():
    async def test():
        async with running(2) as it:
            it.replicas[0].mode = "hang"
            it.router._health.drain(1, True)
            asking = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.replicas[0].running == 1)
            it.router._health.drain(1, False)
            await remove(it, "r0")
            await it.replicas[0].stop()  # its connections break
            assert answered_by([await asking]) == ["r1"]
            await until(lambda: not it.router.fleet.leaving)
            assert it.router.telemetry.upstream_failures == {}  # of a name that is gone

    run(test)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "r0", "url": "http://127.0.0.1:1", "rates": RATES}, 409, "a replica r0 already"),
        ({"name": "x", "url": "SAME", "rates": RATES}, 409, "x has the url of r0"),
        ({"name": "x", "url": "http://127.0.0.1:1"}, 400, "x needs either hardware or rates"),
        ({"name": "x", "urk": "http://127.0.0.1:1", "rates": RATES}, 400, "urk; did you mean url"),
        (
            {
                "name": "x",
                "url": "http://127.0.0.1:1",
                "hardware": {"gpu": "H100", "model": "Llama-3.1-8B"},
            },
            400,
            "unknown GPU 'H100'",
        ),
    ],
)
def test_a_replica_that_cannot_be_added_is_refused_in_one_sentence(body, status, words):
    async def test():
        async with running(1) as it:
            asked = {**body, "url": it.replicas[0].url} if body.get("url") == "SAME" else body
            got, said = await it.operate("/replicas", asked)
            assert got == status
            assert words in said["error"]["message"]
            assert list(await listed(it)) == ["r0"]
            got, said = await remove(it, "r1")
            assert (got, said["error"]["message"][:22]) == (404, "unknown replica 'r1': ")

    run(test)


def test_a_file_of_replicas_is_read_anew_and_a_wrong_one_changes_nothing(tmp_path, caplog):
    path = tmp_path / "replicas.yaml"
    caplog.set_level(logging.ERROR)

    def write(text: str) -> None:
        (tmp_path / "next").write_text(text)
        os.replace(tmp_path / "next", path)

    async def test():
        async with upstream() as a, upstream() as b:
            write(yaml.safe_dump([entry("a", a)]))
            async with running(1, replicas_file=str(path)) as it:
                fleet = it.router.fleet
                assert it.state.up.tolist() == [True, True]  # both, before the first request
                status, said = await remove(it, "a")
                assert status == 409
                assert "a comes from replicas_file" in said["error"]["message"]
                write(yaml.safe_dump([entry("b", b), entry("r0", a)]))
                it.router.read_anew()
                await until(lambda: "b" in fleet and "a" not in fleet)
                await until(lambda: "there is a replica r0 already" in caplog.text)
                for wrong, words in (
                    ("[", "is no YAML"),
                    ("a: 1", "must be a list of replicas"),
                    ("- {name: c}", "replicas.0.url: field required"),
                    (yaml.safe_dump([entry("b", b), entry("b", a)]), "names must differ, got b"),
                    (f"- {{name: c, url: '{a.url}', hardware: {{gpu: x, model: y}}}}", "c: unkn"),
                ):
                    write(wrong)
                    it.router.read_anew()
                    await until(lambda words=words: words in caplog.text)
                path.unlink()
                it.router.read_anew()
                await until(lambda: "there is no file of replicas" in caplog.text)
                assert {member.replica.name for member in fleet} == {"r0", "b"}
                # the same replica, described otherwise: it keeps its slot and its requests
                slot = fleet["b"].slot
                write(yaml.safe_dump([entry("b", b, rates={**RATES, "decode_step_s": 0.5})]))
                it.router.read_anew()
                await until(lambda: it.state.describe(slot)["decode_step_s"] == 0.5)
                assert it.state.is_up(slot)
                # the same name elsewhere is another replica
                write(yaml.safe_dump([entry("b", a)]))
                it.router.read_anew()
                await until(lambda: fleet["b"].replica.url == a.url)
                write("[]")
                it.router.read_anew()
                await until(lambda: len(fleet) == 1 and not fleet.leaving)
                assert answered_by([await it.post({"prompt": "hi"})]) == ["r0"]

    run(test)


def test_a_router_does_not_start_with_a_wrong_file_of_replicas(tmp_path):
    path = tmp_path / "replicas.yaml"
    config = parse_config({"replicas_file": str(path)}, "test")
    with pytest.raises(ConfigError, match="there is no file of replicas at"):
        Router(config)
    path.write_text("- {name: a, url: 'http://x', hardware: {gpu: H100, model: Llama-3.1-8B}}")
    with pytest.raises(ConfigError, match=r"replicas\.yaml: a: unknown GPU 'H100'"):
        Router(config)
