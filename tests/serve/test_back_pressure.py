"""Engines that are full, slow, hung or asked for what no engine can do, before real requests."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from servegym.serve.router.patience import Patience
from servegym.serve.router.timers import Timers

from .running import VirtualTimeLoop, run, running, until

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 5}
STREAM = {**BODY, "stream": True}


def ejections(it) -> list[int]:
    return [it.standing(r).num_ejections for r in range(len(it.replicas))]


def test_requests_that_every_engine_fails_cost_no_good_one():
    async def test() -> None:
        async with running(4) as it:
            for replica in it.replicas:
                replica.poison = "poison"
            good, bad = [], []
            for i in range(60):
                poisoned = i % 5 == 0
                body = {**STREAM, "prompt": "poison" if poisoned else f"prompt {i}"}
                (bad if poisoned else good).append(await it.post(body))
            assert {status for status, _, _ in good} == {200}
            assert {status for status, _, _ in bad} == {500}
            # the engine's own words, and no third engine was asked
            assert {body for _, body, _ in bad} == {b'{"error": {"message": "poison"}}'}
            sent = sum(b["prompt"] == "poison" for r in it.replicas for b in r.bodies)
            assert sent == 2 * len(bad)
            assert it.router.telemetry.retries_denied["request"] == len(bad)
            assert ejections(it) == [0, 0, 0, 0]
            assert it.idle()

    run(test)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [429, 503])
def test_a_full_replica_is_not_ill_and_another_is_asked(status, stream):
    async def test() -> None:
        async with running(2) as it:
            it.replicas[0].mode = status
            it.replicas[0].refusal = {"Retry-After": "5"}
            answers = [await it.post({**BODY, "stream": stream}) for _ in range(10)]
            assert {(s, h["X-Servegym-Replica"]) for s, _, h in answers} == {(200, "r1")}
            # it has said for how long it is full
            assert len(it.replicas[0].bodies) <= 1
            assert it.state.is_up(0)
            assert ejections(it) == [0, 0]
            it.replicas[0].mode = "ok"
            it.standing(0).busy_until_s = 0.0
            again = {(await it.post(BODY))[2]["X-Servegym-Replica"] for _ in range(6)}
            assert again == {"r0", "r1"}

    run(test)


@pytest.mark.parametrize(
    ("status", "refusal", "retry_after"),
    [(429, {"Retry-After": "17"}, "17"), (503, {}, "1"), (529, {"Retry-After": "3"}, "3")],
)
def test_a_full_fleet_says_so_in_its_own_words(status, refusal, retry_after):
    async def test() -> None:
        async with running(2) as it:
            for replica in it.replicas:
                replica.mode, replica.refusal = status, refusal
            for _ in range(8):
                got, body, headers = await it.post(STREAM, headers={"X-Request-Id": "mine"})
                assert (got, body) == (status, b'{"error": {"message": "no"}}')
                assert headers["Retry-After"] == retry_after
                assert headers["X-Request-Id"] == "mine"
            assert ejections(it) == [0, 0]
            outcome = "failed" if status == 529 else "refused"
            assert it.router.telemetry.outcomes == {outcome: 8}
            assert it.idle()

    run(test)


def test_a_refusal_without_words_gets_some():
    async def test() -> None:
        async with running(1) as it:
            it.replicas[0].mode, it.replicas[0].said = 503, b""
            status, body, headers = await it.post(STREAM)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert json.loads(body)["error"]["code"] == "upstream_failed"
            it.replicas[0].said = b"<html>busy</html>"
            assert (await it.post(STREAM))[:2] == (503, b"<html>busy</html>")

    run(test)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_is_wrong_with_a_request_says_nothing_of_the_replica(status):
    async def test() -> None:
        async with running(2) as it:
            standing = it.standing(0)
            it.replicas[0].mode = it.replicas[1].mode = status
            for _ in range(10):
                got, body, _ = await it.post(STREAM)
                assert (got, body) == (status, b'{"error": {"message": "no"}}')
            assert list(standing.outcomes) == []
            assert sum(len(replica.bodies) for replica in it.replicas) == 10
            assert ejections(it) == [0, 0]

    run(test)


def test_a_long_answer_that_is_not_streamed_is_neither_cut_nor_repeated():
    async def test() -> None:
        limits = {"first_byte_timeout_s": 0.05, "stall_timeout_s": 0.05}
        async with running(2, request=limits, health={"silent_after_s": 0.1}) as it:
            for replica in it.replicas:
                replica.gap_s = 0.1  # half a second in all
            answers = await asyncio.gather(*(it.post(BODY) for _ in range(6)))
            assert {status for status, _, _ in answers} == {200}
            assert sum(len(replica.bodies) for replica in it.replicas) == 6
            assert ejections(it) == [0, 0]
            assert sum(it.router.telemetry.upstream_failures.values()) == 0

    run(test, loop=VirtualTimeLoop)


def test_a_limit_for_whole_answers_is_there_for_who_wants_it():
    async def test() -> None:
        async with running(2, request={"answer_timeout_s": 0.1}) as it:
            for replica in it.replicas:
                replica.gap_s = 1.0
            status, body, _ = await it.post(BODY)
            assert (status, json.loads(body)["error"]["code"]) == (504, "upstream_timeout")
            assert sum(len(replica.bodies) for replica in it.replicas) == 1
            await until(it.idle)
            assert ejections(it) == [0, 0]

    run(test, loop=VirtualTimeLoop)


def test_a_busy_engine_that_is_late_with_one_stream_is_not_ejected():
    async def test() -> None:
        async with running(2, request={"first_byte_timeout_s": 1.0}) as it:
            slow, quick = it.replicas
            slow.script = [b": queued\n\n", 30.0]
            late = [asyncio.create_task(it.post(STREAM)) for _ in range(8)]
            await until(lambda: slow.running == 4)
            await asyncio.sleep(0.05)
            # meanwhile it has sent tokens of others
            it.standing(0).last_token_s = it.router.dispatcher.clock()
            answers = await asyncio.gather(*late)
            assert {(s, h["X-Servegym-Replica"]) for s, _, h in answers} == {(200, "r1")}
            assert it.router.telemetry.retries["timeout"] == 4
            assert ejections(it) == [0, 0]
            assert len(quick.bodies) == 8

    run(test, loop=VirtualTimeLoop)


def test_a_hung_engine_gets_one_stream_at_a_time_and_ever_more_seldom():
    async def test() -> None:
        limits = {"first_byte_timeout_s": 1.0, "stall_timeout_s": 1.5}
        health = {"silent_after_s": 0.5, "eject_s": 0.1, "max_eject_s": 1.0}
        async with running(2, request=limits, health=health) as it:
            hung = it.replicas[0]
            hung.script = [b'data: {"choices":[{"text":"x"}]}\n\n', 30.0]  # and a good /health
            stuck = [asyncio.create_task(it.post(STREAM)) for _ in range(4)]
            await until(lambda: it.standing(0).silent)
            hung.script = [30.0]  # from now on it takes requests and says nothing
            before = len(hung.bodies)
            for _ in range(10):
                assert (await it.post(STREAM))[0] == 200
                assert len(hung.bodies) == before or not it.standing(0).silent
            outcomes = await asyncio.gather(*stuck, return_exceptions=True)
            assert sum(isinstance(o, aiohttp.ClientPayloadError) for o in outcomes) == 2
            while it.standing(0).eject_s < 0.4:
                await asyncio.sleep(0.01)
                assert (await it.post(STREAM))[0] == 200
            assert len(hung.bodies) - before <= 4
            hung.script = None
            await until(lambda: it.standing(0).on_trial)
            shares = [(await it.post(STREAM))[2]["X-Servegym-Replica"] for _ in range(12)]
            assert shares.count("r0") >= 5
            assert it.standing(0).eject_s == 0.0
            await until(it.idle)

    run(test, loop=VirtualTimeLoop)


def test_a_stream_that_was_not_asked_for_leaves_nothing_in_the_books():
    async def test() -> None:
        async with running(1) as it:
            it.replicas[0].streams_always = True
            assert (await it.post(BODY))[0] == 200
            it.replicas[0].mode = "die"
            with pytest.raises(aiohttp.ClientPayloadError):
                await it.post(BODY)
            await until(it.idle)
            standing = it.standing(0)
            assert (standing.owing, standing.streams, standing.wholes) == (0, 0, 0)
            assert it.idle()

    run(test)


def test_comments_do_not_hide_a_stall():
    async def test() -> None:
        async with running(1, request={"stall_timeout_s": 0.2}) as it:
            token = b'data: {"choices":[{"text":"x"}]}\n\n'
            it.replicas[0].script = [token, *[b": still here\n\n", 0.05] * 100]
            with pytest.raises(aiohttp.ClientPayloadError):
                await it.post(STREAM)
            assert it.router.telemetry.upstream_failures["r0", "stall"] == 1

    run(test, loop=VirtualTimeLoop)


def test_a_stream_without_done_is_whole_if_its_choices_have_ended():
    async def test() -> None:
        async with running(2) as it:
            end = b'data: {"choices":[{"index":0,"text":"y","finish_reason":"stop"}]}\n\n'
            for replica in it.replicas:
                replica.script = [b'data:{"choices":[{"index":0,"text":"x"}]}\r\n\r\n', end]
            assert (await it.post(STREAM))[0] == 200
            for replica in it.replicas:
                replica.script = replica.script[:1]
            with pytest.raises(aiohttp.ClientPayloadError):
                await it.post(STREAM)
            outcomes = it.router.telemetry.outcomes
            assert (outcomes["finished"], outcomes["failed"]) == (1, 1)

    run(test)


def test_an_error_event_before_the_first_token_is_tried_elsewhere_unless_it_is_the_requests():
    async def test() -> None:
        async with running(2) as it:
            it.replicas[0].script = [b": hello\n\nevent: error\ndata: oops\n\n"]
            answers = [await it.post(STREAM) for _ in range(6)]
            assert {(s, h["X-Servegym-Replica"]) for s, _, h in answers} == {(200, "r1")}
            for replica in it.replicas:
                replica.script = [
                    b'data: {"error":{"message":"too long","code":400}}\n\ndata: [DONE]\n\n'
                ]
            sent = sum(len(replica.bodies) for replica in it.replicas)
            failed = it.router.telemetry.outcomes["failed"]
            with pytest.raises(aiohttp.ClientPayloadError):
                await it.post(STREAM)
            assert sum(len(replica.bodies) for replica in it.replicas) == sent + 1
            assert it.router.telemetry.outcomes["failed"] == failed + 1
            for replica in it.replicas:
                replica.script = [b'data: {"error":{"message":"no memory","code":507}}\n\n']
            status, body, _ = await it.post(STREAM)
            assert (status, json.loads(body)["error"]["message"]) == (507, "no memory")

    run(test)


def test_retries_have_a_budget():
    async def test() -> None:
        settings = {"retry_share": 0.0, "retry_reserve": 3}
        async with running(2, request=settings, health={"max_ejected_share": 0.0}) as it:
            it.replicas[0].mode = 500
            answers = [await it.post(STREAM) for _ in range(20)]
            failed = [a for a in answers if a[0] == 500]
            assert it.router.telemetry.retries == {"status_500": 3}
            assert len(failed) == it.router.telemetry.retries_denied["budget"] > 0
            assert ejections(it) != [0, 0]
            assert it.state.is_up(0)  # none is ever kept out

    run(test)


class TestChat:
    """vLLM announces the role with its first token, others when they take the request."""

    ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    SAYS = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
    REST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'

    async def ask(self, it):
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "m", "messages": messages, "stream": True}
        return await it.post(body, "/v1/chat/completions")

    def test_ttft_is_that_of_the_first_token(self, tmp_path):
        async def test() -> None:
            dispatch = {
                "runtime": {"policy": "least-outstanding"},
                "log": {"folder": str(tmp_path)},
            }
            async with running(1, dispatch=dispatch) as it:
                it.replicas[0].script = [
                    *(self.ROLE, 0.1, b": ping\n\n", 0.1, self.SAYS, 0.1, self.SAYS, self.REST),
                    b"data: [DONE]\n\n",
                ]
                task = asyncio.create_task(self.ask(it))
                await until(lambda: it.replicas[0].running == 1)
                await asyncio.sleep(0.1)
                assert it.state.replicas[3, 0] > 0  # the prompt is not computed yet
                status, body, _ = await task
                assert status == 200
                assert body.startswith(self.ROLE + b": ping\n\n" + self.SAYS)
                ttft = it.router.telemetry.latencies.total(lambda times: times.ttft)
                assert (ttft.count, ttft.total > 0.19) == (1, True)
                assert it.idle()
            (file,) = tmp_path.iterdir()
            (row,) = map(json.loads, file.read_text().splitlines())
            assert 0.19 < row["ttft_s"] < row["e2e_s"] - 0.09
            assert row["output_tokens"] == 2

        run(test, loop=VirtualTimeLoop)

    def test_until_then_another_replica_may_take_over(self):
        async def test() -> None:
            async with running(2, request={"first_byte_timeout_s": 0.5}) as it:
                it.replicas[0].script = [self.ROLE, 30.0]
                it.replicas[1].script = [self.ROLE, self.SAYS, self.REST]
                for _ in range(3):
                    status, body, headers = await self.ask(it)
                    assert (status, headers["X-Servegym-Replica"]) == (200, "r1")
                    assert body.count(self.ROLE) == 1

        run(test, loop=VirtualTimeLoop)


def eject(it, replica: int) -> None:
    """Let a replica fail three requests that others answer."""
    ejection = it.router._health.ejection
    for _ in range(3):
        attempt = ejection.begin(replica, stream=True)
        ejection.end(attempt)
        ejection.failed(attempt)
    assert it.standing(replica).num_ejections == 1


def test_a_share_of_the_fleet_and_the_last_with_a_model_are_never_kept_out():
    async def test() -> None:
        async with running(4, health={"eject_s": 60.0}) as it:
            for replica in (0, 1, 2):
                eject(it, replica)
            assert [it.state.is_up(r) for r in range(4)].count(False) == 2
            it.replicas[3].healthy = False  # of three that are up, one may be out
            await until(lambda: not it.state.is_up(3))
            assert [it.state.is_up(r) for r in range(3)].count(False) == 1
            answers = [await it.post(STREAM) for _ in range(6)]
            assert {status for status, _, _ in answers} == {200}
        async with running(3, health={"eject_s": 60.0}) as it:
            it.replicas[0].model = "rare"
            await it.router._health._read_models(0)
            eject(it, 0)
            assert it.state.is_up(0)
            assert (await it.post({**STREAM, "model": "rare"}))[0] == 200
            eject(it, 1)
            assert not it.state.is_up(1)

    run(test, loop=VirtualTimeLoop)


class TestPatience:
    def test_a_deadline_that_is_moved_on_is_none(self):
        async def test() -> None:
            clock = asyncio.get_running_loop().time
            expired: list[float] = []
            patience = Patience(Timers(), clock, 0.05, lambda: expired.append(clock()))
            for _ in range(6):
                patience.due_s = clock() + 0.05
                await asyncio.sleep(0.02)
            patience.end()
            await asyncio.sleep(0.1)
            assert expired == []

        run(test, loop=VirtualTimeLoop)

    def test_one_that_is_moved_nearer_is_kept_and_told_once(self):
        async def test() -> None:
            clock = asyncio.get_running_loop().time
            expired: list[float] = []
            patience = Patience(Timers(), clock, 0.05, lambda: expired.append(clock()))
            begin_s = clock()
            patience.due_s = begin_s + 1000.0
            await asyncio.sleep(0.01)
            patience.due_s = begin_s + 0.06
            await until(lambda: bool(expired))
            await asyncio.sleep(0.1)
            assert len(expired) == 1
            assert 0.06 <= expired[0] - begin_s < 5.0

        run(test, loop=VirtualTimeLoop)
