"""LiteLLM in front of the router, as of any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import threading
import time

import litellm
import pytest

from .served import KEY, LIMITED_KEY, MODEL

TALK = [{"role": "user", "content": "tell me a story"}]


@pytest.fixture
def how(served):
    litellm.telemetry = False
    return {"model": f"openai/{MODEL}", "api_base": served.base_url, "api_key": KEY}


def test_a_chat_and_its_stream_say_the_same(how):
    whole = litellm.completion(**how, messages=TALK, max_tokens=20)
    assert 0 < whole.usage.completion_tokens <= 20
    chunks = list(
        litellm.completion(
            **how,
            messages=TALK,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    built = litellm.stream_chunk_builder(chunks, messages=TALK)
    assert built.choices[0].message.content == text
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_a_text_completion(how):
    ask = {**how, "model": f"text-completion-openai/{MODEL}"}
    said = litellm.text_completion(**ask, prompt="once upon", max_tokens=5)
    parts = list(litellm.text_completion(**ask, prompt="once upon", max_tokens=5, stream=True))
    assert "".join(p.choices[0].text or "" for p in parts) == said.choices[0].text


def test_asynchronous_calls(how):
    async def test():
        said = await asyncio.gather(
            *(
                litellm.acompletion(
                    **how, messages=[{"role": "user", "content": f"{i}"}], max_tokens=4
                )
                for i in range(20)
            )
        )
        assert all(one.choices[0].message.content for one in said)

    asyncio.run(test())


def test_errors_are_of_litellms_own_kinds(how, served):
    for settings, kind in (
        ({"api_key": "sk-wrong-0123456789"}, litellm.AuthenticationError),
        ({"model": "openai/other"}, litellm.NotFoundError),
        ({"max_tokens": 10**9}, litellm.BadRequestError),
    ):
        with pytest.raises(kind):
            litellm.completion(**{**how, **settings}, messages=TALK, max_retries=0)
    served.fault("drain")
    time.sleep(1.0)
    with pytest.raises((litellm.ServiceUnavailableError, litellm.InternalServerError)):
        litellm.completion(**how, messages=TALK, max_retries=0)
    threading.Timer(0.5, served.fault, ["recover"]).start()
    assert litellm.completion(**how, messages=TALK, max_tokens=3, num_retries=6).choices


def test_its_router_waits_out_a_limit(how):
    deployment = {"model_name": "m", "litellm_params": {**how, "api_key": LIMITED_KEY}}
    router = litellm.Router(model_list=[deployment], num_retries=8, retry_after=1)

    async def test():
        said = await asyncio.gather(
            *(router.acompletion(model="m", messages=TALK, max_tokens=30) for _ in range(3))
        )
        assert all(one.choices[0].message.content for one in said)

    asyncio.run(test())
