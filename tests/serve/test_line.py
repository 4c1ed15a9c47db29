"""Requests that wait at the router for a replica with room."""

from __future__ import annotations

import asyncio
import json

from servegym.policy.contract import MAX_NUM_SEQS
from servegym.serve.router.line import Line, Waiting

from .running import run, running, until

WAITED = ["batch", "chat", "urgent"]
LEVELS = [{"name": "chat"}, {"name": "urgent", "priority": 5}, {"name": "batch", "priority": -5}]


def test_the_line_goes_by_priority_then_by_arrival_and_model_by_model():
    async def test():
        line, went = Line(), []

        async def stand(name: str, one: Waiting) -> None:
            while not line.may_go(one) or name not in freed:
                await line.wait(one, 10.0)
            line.leave(one)
            went.append(name)

        freed: set[str] = set()
        people = {
            "early": Waiting(0, 1.0, "m"),
            "late": Waiting(0, 2.0, "m"),
            "urgent": Waiting(5, 3.0, "m"),
            "other": Waiting(0, 9.0, "other"),
        }
        tasks = [asyncio.create_task(stand(name, one)) for name, one in people.items()]
        await asyncio.sleep(0)
        assert not line.may_go(Waiting(0, 4.0, "m"))  # who comes now is behind them
        assert line.may_go(Waiting(9, 4.0, "m"))
        assert line.may_go(Waiting(0, 4.0, "third"))
        freed |= {"other"}
        line.call()
        await until(lambda: went == ["other"])
        freed |= people.keys()
        line.call()
        await asyncio.gather(*tasks)
        assert went == ["other", "urgent", "early", "late"]
        assert line.may_go(Waiting(-9, 9.0, "m"))

    run(test)


def test_who_goes_away_does_not_hold_up_the_others():
    async def test():
        line = Line()
        first, second = Waiting(0, 1.0, "m"), Waiting(0, 1.0, "m")  # at the same moment
        waits = [asyncio.create_task(line.wait(one, 10.0)) for one in (first, second)]
        await asyncio.sleep(0)
        assert line.may_go(first)
        waits[0].cancel()
        await asyncio.gather(waits[0], return_exceptions=True)
        line.leave(first)
        line.leave(first)
        await asyncio.wait_for(waits[1], 1.0)  # it is called
        assert line.may_go(second)

    run(test)


def test_requests_wait_at_the_router_while_all_replicas_are_full():
    """Two replicas of two sequences each take four; the others go by priority as these end."""

    async def test():
        settings = {
            "request": {"max_load": 1.0, "max_hold_s": 10.0, "max_held": 3},
            "dispatch": {"slo_classes": LEVELS},
        }
        async with running(2, **settings) as it:
            it.state.replicas[MAX_NUM_SEQS] = 2
            for replica in it.replicas:
                replica.tokens, replica.gap_s = 40, 0.02

            def ask(level: str, prompt: str):
                body = {"prompt": prompt, "stream": True}
                return asyncio.create_task(it.post(body, headers={"x-slo-class": level}))

            served = [ask("chat", f"first {i}") for i in range(4)]
            await until(lambda: sum(replica.running for replica in it.replicas) == 4)
            waiting = [ask("batch", "batch")]
            await until(lambda: it.state.num_held == 1)
            waiting.append(ask("chat", "chat"))
            await until(lambda: it.state.num_held == 2)
            waiting.append(ask("urgent", "urgent"))
            await until(lambda: it.state.num_held == 3)
            status, said, headers = await it.post({"prompt": "one too many"})
            assert (status, json.loads(said)["error"]["code"]) == (429, "overloaded")
            assert headers["Retry-After"] == "1"
            assert max(replica.running for replica in it.replicas) == 2
            answers = await asyncio.gather(*served, *waiting)
            assert {status for status, _, _ in answers} == {200}
            assert it.idle()
            came = [body["prompt"] for replica in it.replicas for body in replica.bodies]
            assert sorted(came) == sorted([f"first {i}" for i in range(4)] + WAITED)

    run(test)


def test_a_freed_place_is_the_most_urgent_requests():
    async def test():
        settings = {
            "request": {"max_load": 1.0, "max_hold_s": 10.0},
            "dispatch": {"slo_classes": LEVELS},
        }
        async with running(1, **settings) as it:
            it.state.replicas[MAX_NUM_SEQS] = 1
            it.replicas[0].tokens, it.replicas[0].gap_s = 10, 0.02
            tasks = []
            for i, level in enumerate(["chat", "batch", "chat", "urgent"]):
                body = {"prompt": f"{level} {i}", "stream": True}
                headers = {"x-slo-class": level}
                tasks.append(asyncio.create_task(it.post(body, headers=headers)))
                await until(lambda i=i: it.state.num_held == i and it.replicas[0].running == 1)
            await asyncio.gather(*tasks)
            came = [body["prompt"] for body in it.replicas[0].bodies]
            assert came == ["chat 0", "urgent 3", "chat 2", "batch 1"]
            assert it.idle()

    run(test)
