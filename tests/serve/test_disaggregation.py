"""Requests that one replica prefills and another decodes, through the router."""

from __future__ import annotations

import asyncio
import functools
import json

import pytest

from servegym.errors import ConfigError
from servegym.policy.contract import ARRIVING_TOKENS, NUM_HOLDING
from servegym.serve.discovery.config import TemplateConfig
from servegym.serve.discovery.found import Found, described
from servegym.serve.router.config import parse_config
from servegym.serve.router.disaggregation import is_divisible
from servegym.serve.router.forms import CHAT, COMPLETION, POOLING
from servegym.serve.router.placement import Arrival

from .running import RATES, VirtualTimeLoop, run, until

PARAMS = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_block_ids": [1, 2]}
ASK = {"model": "m", "prompt": "x" * 400, "stream": True, "max_tokens": 5, "min_tokens": 2}
PAIR = ("prefill", "decode")


async def told(router, body=ASK, **settings):
    """Status, text and headers of an answer."""
    status, answer, headers = await router.post(body, **settings)
    return status, answer.decode(), headers


def test_nixl_prefills_for_one_token_and_hands_its_params_to_who_decodes(start):
    async def test():
        async with start(roles=PAIR) as router:
            source, target = router.replicas
            source.params = PARAMS
            status, answer, headers = await told(
                router, {**ASK, "stream_options": {"include_usage": True}}
            )
            assert status == 200
            assert answer.count("data: {") == 6  # five tokens and the usage, once
            assert answer.count('prompt_tokens"') == 1
            assert headers["X-Servegym-Replica"] == "r1"
            [asked] = source.bodies
            assert (asked["max_tokens"], asked["stream"]) == (1, False)
            assert asked["kv_transfer_params"] == {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "remote_engine_id": None,
                "remote_block_ids": None,
                "remote_host": None,
                "remote_port": None,
            }
            assert "min_tokens" not in asked
            assert "stream_options" not in asked
            [decoded] = target.bodies
            assert decoded["kv_transfer_params"] == PARAMS
            assert (decoded["max_tokens"], decoded["min_tokens"], decoded["stream"]) == (5, 2, True)
            names = {heads["X-Request-Id"] for heads in (*source.headers, *target.headers)}
            assert len(names) == 1
            await until(router.idle)
            assert router.router.telemetry.prefills == {("r0", "ok"): 1}
            assert router.router.telemetry.tenant_tokens["default", "prompt"] == 7

    run(test)


def test_a_chat_limits_its_completion_tokens_too_and_is_divided_unstreamed(start):
    async def test():
        async with start(roles=PAIR) as router:
            source, target = router.replicas
            source.params = PARAMS
            body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9}
            status, answer, _ = await told(router, body, path="/v1/chat/completions")
            assert (status, json.loads(answer)["usage"]["completion_tokens"]) == (200, 5)
            assert source.bodies[0]["max_completion_tokens"] == 1
            assert target.bodies[0]["max_completion_tokens"] == 9
            await until(router.idle)

    run(test)


def test_counters_follow_a_request_from_its_prefill_to_its_first_token(start):
    async def test():
        async with start(roles=PAIR, dispatch={"runtime": {"policy": "splitwise+splitwise"}}) as r:
            source, target = r.replicas
            source.gap_s, target.mode, source.params = 0.02, "headers", PARAMS
            asking = asyncio.create_task(told(r))
            await until(lambda: bool(source.bodies))
            assert [r.state.outstanding(slot) for slot in (0, 1)] == [1, 0]
            await until(lambda: bool(target.bodies))
            assert [r.state.outstanding(slot) for slot in (0, 1)] == [0, 1]
            assert r.state.replicas[NUM_HOLDING].tolist() == [1.0, 1.0]
            assert r.state.replicas[ARRIVING_TOKENS, 1] > 50
            assert r.state.replicas[3].tolist() == [0.0, 0.0]  # nothing is left to prefill
            asking.cancel()  # the client leaves
            await until(lambda: target.cancelled == 1)
            await until(r.idle)
            assert r.state.replicas[NUM_HOLDING].tolist() == [0.0, 0.0]
            assert r.state.replicas[ARRIVING_TOKENS].tolist() == [0.0, 0.0]

    run(test, loop=VirtualTimeLoop)


def test_a_client_that_leaves_ends_its_prefill(start):
    async def test():
        async with start(roles=PAIR) as router:
            router.replicas[0].mode = "hang"
            asking = asyncio.create_task(told(router))
            await until(lambda: bool(router.replicas[0].bodies))
            asking.cancel()
            await until(lambda: router.replicas[0].cancelled == 1)
            await until(router.idle)
            assert not router.replicas[1].bodies

    run(test)


@pytest.mark.parametrize("fault", [500, "die_first", "hang"])
def test_a_prefill_that_fails_goes_to_another_replica(start, fault):
    async def test():
        split = {"prefill_timeout_s": 0.3}
        async with start(roles=("prefill", "prefill", "decode"), disaggregation=split) as router:
            for replica in router.replicas[:2]:
                replica.params = PARAMS
            router.replicas[0].mode = fault
            for _ in range(2):  # one of them comes to the faulty one first
                status, _, headers = await told(router, {**ASK, "stream": False})
                assert (status, headers["X-Servegym-Replica"]) == (200, "r2")
            assert router.router.telemetry.prefills["r0", "failed"] >= 1
            assert router.router.telemetry.prefills["r1", "ok"] == 2
            await until(router.idle)

    run(test, loop=VirtualTimeLoop)


def test_a_request_whose_only_prefill_replica_fails_it_is_decoded_whole(start):
    async def test():
        async with start(roles=PAIR) as router:
            source, target = router.replicas
            source.mode = 500
            status, _, _ = await told(router)
            assert status == 200
            assert target.bodies == [ASK]  # as it came
            await until(router.idle)

    run(test)


@pytest.mark.parametrize(("protocol", "expected"), [("nixl", 200), ("sglang", 502)])
def test_a_request_whose_prefill_fails_often_enough_is_decoded_whole(start, protocol, expected):
    async def test():
        settings = {"request": {"max_retries": 1}, "disaggregation": {"protocol": protocol}}
        async with start(roles=("prefill",) * 4 + ("decode",), **settings) as router:
            *sources, target = router.replicas
            target.script = [0.2, b'data: {"choices": [{"text": "t"}]}\n\n', b"data: [DONE]\n\n"]
            for source in sources:
                source.mode = "die_first"
            status, _, _ = await told(router)
            assert status == expected
            assert sum(len(source.bodies) for source in sources) == 2
            assert ("bootstrap_room" in target.bodies[0]) == (protocol == "sglang")
            await until(router.idle)

    run(test, loop=VirtualTimeLoop)


def test_a_decode_that_fails_begins_anew_with_its_prefill(start):
    async def test():
        async with start(roles=("prefill", "decode", "decode")) as router:
            source, *targets = router.replicas
            source.params = PARAMS
            failed = []

            async def fail_once(answer, http, body):
                if not failed:
                    failed.append(body)
                    http.transport.abort()
                return await answer(http, body)

            for target in targets:
                target._answer = functools.partial(fail_once, target._answer)
            status, answer, _ = await told(router)
            assert len(failed) == 1
            assert (status, answer.count("data: {")) == (200, 5)
            assert len(source.bodies) == 2
            assert len(targets[0].bodies) == len(targets[1].bodies) == 1
            await until(router.idle)

    run(test)


def test_without_a_prefill_replica_decoders_prefill_themselves_but_for_sglang(start):
    async def test(protocol, expected):
        settings = {"disaggregation": {"protocol": protocol}, "request": {"max_hold_s": 0.1}}
        async with start(roles=PAIR, **settings) as router:
            router.replicas[0].healthy = False
            await until(lambda: not router.state.is_up(0))
            status, answer, headers = await told(router)
            assert status == expected
            if status == 503:
                message = json.loads(answer)["error"]["message"]
                assert message == "no replica that prefills takes requests now: come again later"
                assert headers["Retry-After"] == "1"
            else:
                assert router.replicas[1].bodies == [ASK]
            await until(router.idle)

    run(lambda: test("nixl", 200), loop=VirtualTimeLoop)
    run(lambda: test("sidecar", 200), loop=VirtualTimeLoop)
    run(lambda: test("sglang", 503), loop=VirtualTimeLoop)


def test_without_a_replica_that_decodes_there_is_one_clear_sentence(start):
    async def test():
        async with start(roles=PAIR, request={"max_hold_s": 0.1}) as router:
            router.replicas[1].healthy = False
            await until(lambda: not router.state.is_up(1))
            status, answer, _ = await told(router)
            message = json.loads(answer)["error"]["message"]
            assert status == 503
            assert message == "no replica that decodes takes requests now: come again later"
            assert not router.replicas[0].bodies

    run(test, loop=VirtualTimeLoop)


def test_what_is_prefilled_waits_for_a_replica_that_decodes(start):
    async def test():
        async with start(roles=PAIR) as router:
            source, target = router.replicas
            source.mode, source.params = "hang", PARAMS
            asking = asyncio.create_task(told(router))
            await until(lambda: bool(source.bodies))
            await router.operate("/drain", {"replica": "r1"})
            source.go_on.set()
            await until(lambda: router.router.telemetry.prefills == {("r0", "ok"): 1})
            await asyncio.sleep(0.15)  # it is decided about again
            assert not target.bodies
            await router.operate("/undrain", {"replica": "r1"})
            status, answer, headers = await asking
            assert (status, answer.count("data: {")) == (200, 5)
            assert headers["X-Servegym-Replica"] == "r1"
            await until(router.idle)

    run(test)


def test_what_cannot_be_divided_goes_to_who_does_all_of_it(start):
    async def test():
        async with start(roles=("prefill", "decode", "mixed")) as router:
            status, _, headers = await told(router, {**ASK, "n": 2})
            assert (status, headers["X-Servegym-Replica"]) == (200, "r2")
            status, _, headers = await told(router, {"input": "text"}, path="/v1/embeddings")
            assert (status, headers["X-Servegym-Replica"]) == (200, "r2")
            assert not router.replicas[0].bodies

    run(test)


def test_a_wrong_request_is_answered_in_the_words_of_who_prefills(start):
    async def test():
        async with start(roles=PAIR) as router:
            router.replicas[0].mode = 400
            status, answer, _ = await told(router)
            assert (status, answer) == (400, '{"error": {"message": "no"}}')
            assert not router.replicas[1].bodies
            await until(router.idle)

    run(test)


def test_sglang_asks_both_at_once_under_one_number(start):
    async def test():
        settings = {"disaggregation": {"protocol": "sglang"}}
        async with start(roles=PAIR, **settings) as router:
            source, target = router.replicas
            for _ in range(2):
                status, answer, headers = await told(router)
                assert (status, answer.count("data: {")) == (200, 5)
                assert headers["X-Servegym-Replica"] == "r1"
            assert source.bodies == target.bodies
            rooms = [body["bootstrap_room"] for body in source.bodies]
            assert rooms[0] != rooms[1]
            assert all(0 <= room < 2**63 for room in rooms)
            assert source.bodies[0]["bootstrap_host"] == "127.0.0.1"
            assert source.bodies[0]["bootstrap_port"] == 8998
            await until(router.idle)
            assert router.router.telemetry.prefills == {("r0", "ok"): 2}

    run(test)


def test_sglang_lets_go_of_who_decodes_if_the_prefill_fails(start):
    async def test():
        settings = {"disaggregation": {"protocol": "sglang"}}
        async with start(roles=("prefill", "prefill", "decode"), **settings) as router:
            faulty, _, target = router.replicas
            faulty.mode = 500
            token = b'data: {"choices": [{"text": "t"}]}\n\n'
            target.script = [0.1, token, b"data: [DONE]\n\n"]
            for _ in range(2):  # one of them comes to the faulty one first
                status, answer, _ = await told(router)
                assert (status, answer.count("data: {")) == (200, 1)
            assert router.router.telemetry.prefills["r0", "failed"] >= 1
            await until(lambda: target.cancelled == len(faulty.bodies))
            await until(router.idle)

    run(test)


def test_llm_ds_sidecar_is_told_who_prefills_and_clients_cannot_say_so(start):
    async def test():
        settings = {
            "disaggregation": {"protocol": "sidecar"},
            "request": {"forward_headers": ["x-*"]},
        }
        async with start(roles=PAIR, **settings) as router:
            source, target = router.replicas
            lie = {"x-prefiller-host-port": "10.0.0.1:1"}
            status, _, _ = await told(router, headers=lie)
            assert status == 200
            place = f"127.0.0.1:{source.port}"
            assert target.headers[0].getall("x-prefiller-host-port") == [place]
            assert target.bodies == [ASK]
            assert not source.bodies
            await until(router.idle)

    run(test)


@pytest.mark.parametrize(
    ("form", "fields", "expected"),
    [
        (COMPLETION, {"prompt": "a"}, True),
        (COMPLETION, {"prompt": [1, 2]}, True),
        (COMPLETION, {"prompt": ["a", "b"]}, False),
        (COMPLETION, {"prompt": [[1], [2]]}, False),
        (COMPLETION, {"prompt": "a", "n": 2}, False),
        (COMPLETION, {"prompt": "a", "echo": True}, False),
        (COMPLETION, {"prompt_embeds": "a"}, False),
        (CHAT, {"messages": [], "n": 1}, True),
        (CHAT, {"messages": [], "prompt_logprobs": 0}, False),
        (POOLING, {"input": "a"}, False),
    ],
)
def test_is_divisible_means_one_prompt_and_one_answer(form, fields, expected):
    assert is_divisible(form, fields) is expected


@pytest.mark.parametrize(
    ("role", "protocol", "sentence"),
    [
        ("prefill", "nixl", "all replicas have the role prefill"),
        ("decode", "sglang", "all replicas have the role decode, and SGLang's cannot prefill"),
    ],
)
def test_a_fleet_that_can_do_no_request_is_refused(role, protocol, sentence):
    replica = {"name": "r", "url": "http://127.0.0.1:1", "rates": RATES, "role": role}
    data = {"replicas": [replica], "disaggregation": {"protocol": protocol}}
    with pytest.raises(ConfigError, match=sentence):
        parse_config(data, "test")
    template = {"rates": RATES, "role": "decode"}
    found = {"dns": [{"name": "d", "port": 1}], "templates": [template]}
    assert parse_config({**data, "discover": found}, "test").discover.templates[0].role == "decode"


def test_a_replica_that_is_found_has_the_role_of_its_template():
    template = TemplateConfig(names="p-*", rates=RATES, role="prefill", bootstrap_port=9000)
    found = [Found("p-0", "10.0.0.1", 8000), Found("d-0", "10.0.0.2", 8000)]
    [p], complaints = described(found, [template])
    assert (p.role, p.bootstrap_port) == ("prefill", 9000)
    assert complaints == ["no template fits d-0: it is left out"]


def test_a_replica_whose_role_changes_leaves_and_another_comes(start):
    async def test():
        async with start(roles=("mixed", "decode"), request={"max_hold_s": 0.1}) as router:
            fleet, first = router.router.fleet, router.replicas[0]
            other = fleet["r0"].replica.model_copy(update={"role": "prefill"})
            await fleet.sync("replicas", [other, fleet["r1"].replica])
            await until(lambda: router.state.is_up(fleet["r0"].slot))
            first.params = PARAMS
            status, _, headers = await told(router)
            assert (status, headers["X-Servegym-Replica"]) == (200, "r1")
            assert len(first.bodies) == 1
            status, page = await router.get("/metrics")
            assert 'servegym_router_prefills_total{replica="r0",result="ok"} 1' in page
            await until(router.idle)

    run(test)


def test_decisions_of_both_kinds_are_explained(start):
    async def test():
        async with start(roles=("prefill", "decode", "decode")) as router:
            router.replicas[0].params = PARAMS
            desk = router.router._desk
            placement = desk.enter("default", "key")
            prompt = router.router.dispatcher.reader.read("a prompt")
            placement.arrive(
                Arrival(prompt, "m", 5, True, None, None, 0.0, traced=True, divisible=True)
            )
            seat = await placement.place()
            assert (seat.name, seat.apart.step) == ("r0", "prefill")
            seat = await placement.prefilled(None)
            assert (seat.name in ("r1", "r2"), seat.apart.name) == (True, "r0")
            dispatch, placing = placement.explained()
            assert (dispatch.about, dispatch.action) == ("dispatch", "r0")
            assert (placing.about, placing.action) == ("placement", seat.name)
            assert placing.candidates == ("r1", "r2")
            placement.leave()
            assert router.idle()

    run(test)
