"""Requests of a gateway that llm-d's sidecar lets another replica prefill."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from servegym.errors import ConfigError
from servegym.policy.contract import NUM_HOLDING
from servegym.serve.picker.config import PickerConfig, check_endpoint
from servegym.serve.router.replica import ReplicaConfig

from ..running import RATES, run, until  # noqa: TID252 - tests are no package
from .gateway import DESTINATION, body_of, event, picking

ROLES = ("prefill", "decode", "decode")
PREFILLER = "x-prefiller-host-port"
DONE = b"data: [DONE]\n\n"


def said(answer) -> tuple[dict[str, str], list[str]]:
    """Headers that the picker sets, and those that it takes out."""
    mutation = answer.request_headers.response.header_mutation
    names = {one.header.key: one.header.raw_value.decode() for one in mutation.set_headers}
    return names, list(mutation.remove_headers)


def play(test, **settings):
    async def with_picker():
        async with picking(roles=ROLES, **settings) as gateway:
            await test(gateway)

    run(with_picker, loop=asyncio.new_event_loop)


async def placed(gateway, body: bytes, **headers):
    stream = gateway.stream()
    await stream.request_headers(**headers)
    await stream.body("request", body, ends=True)
    names, removed = said(await stream.answer())
    await stream.answer()  # the body
    return stream, names, removed


def test_the_destination_decodes_and_a_header_names_who_prefills():
    async def test(gateway):
        source, *targets = gateway.endpoints
        body = body_of("x" * 4000, stream=True)
        lie = {"x_prefiller_host_port": "10.0.0.1:1"}
        stream, names, removed = await placed(gateway, body, **lie)
        assert names.keys() == {DESTINATION, PREFILLER}  # which overwrites what a client says
        assert names[PREFILLER] == source
        assert names[DESTINATION] in targets
        assert removed == ["accept-encoding"]
        at = gateway.endpoints.index(names[DESTINATION])
        assert gateway.outstanding()[0] == gateway.outstanding()[at] == 1
        assert gateway.state.replicas[3].tolist() == [1000.0, 0.0, 0.0]  # at four bytes a token
        await stream.response_headers()
        await stream.answer()
        await stream.body("response", event("a"), ends=False)
        await stream.answer()
        assert gateway.outstanding()[0] == 0  # with the first token its KV has come
        assert not gateway.state.replicas[NUM_HOLDING].any()
        await stream.body("response", event("", "stop") + DONE, ends=True)
        await stream.done()
        await until(gateway.idle)

    play(test, fallbacks=0)


def test_retries_of_the_gateway_go_to_replicas_that_decode():
    async def test(gateway):
        stream, names, _ = await placed(gateway, body_of("x" * 400, stream=True))
        assert sorted(names[DESTINATION].split(",")) == sorted(gateway.endpoints[1:])
        stream.cancel()
        await until(gateway.idle)

    play(test, fallbacks=2)


def test_what_cannot_be_divided_is_sent_whole_and_names_nobody():
    async def test(gateway):
        stream, names, removed = await placed(gateway, body_of("hello", n=2))
        assert names.keys() == {DESTINATION}
        assert names[DESTINATION] in gateway.endpoints[1:]
        assert removed == ["accept-encoding", PREFILLER]
        stream.cancel()
        await until(gateway.idle)

    play(test)


def test_roles_are_refused_where_no_answers_are_seen():
    replica = {"name": "p", "url": "http://127.0.0.1:1", "rates": RATES, "role": "prefill"}
    sentence = "p has the role prefill, but where a gateway sends no bodies of answers nobody knows"
    with pytest.raises(ValidationError, match=sentence):
        PickerConfig.model_validate({"replicas": [replica], "response": "headers"})
    found = ReplicaConfig.model_validate(replica)
    check_endpoint(found)
    with pytest.raises(ConfigError, match=sentence):
        check_endpoint(found, response="none")
