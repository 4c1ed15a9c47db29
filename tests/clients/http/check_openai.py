"""OpenAI's own client: chats and completions, streams, errors, retries, models."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import openai
import pytest

from .served import KEY, LIMITED_KEY, MODEL

TALK = [{"role": "user", "content": "tell me a story"}]


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=served.base_url, api_key=KEY, max_retries=0, timeout=30)


def test_a_chat_and_its_stream_say_the_same(client):
    whole = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=20)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=TALK,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 20
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_streaming_helper_gathers_the_same(client):
    # the helper takes an answer that its limit has cut for an error
    ask = {"model": MODEL, "messages": TALK, "extra_body": {"output_tokens": 20}}
    whole = client.chat.completions.create(**ask)
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("prompt", ["once upon a time", ["once upon a time"], [1, 2, 3], [[1, 2]]])
def test_a_completion_and_its_stream_say_the_same(client, prompt):
    ask = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**ask)
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text


def test_images_and_unset_options_are_taken(client):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 300_000}}
    talk = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}]
    said = client.chat.completions.create(
        model=MODEL,
        messages=talk,
        max_completion_tokens=5,
        stream=None,
        seed=None,
        stop=None,
        n=1,
        temperature=0.3,
        top_p=0.9,
        user="me",
    )
    assert 1000 < said.usage.prompt_tokens < 1100


def test_headers_tell_the_request_and_who_answered(client):
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=TALK, max_tokens=2, extra_headers={"X-Request-Id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.headers["x-servegym-replica"]
    assert raw.parse()._request_id == "mine-7"


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_errors_are_of_the_clients_own_kinds_and_eject_no_one(client, served):
    def chat(**settings):
        client.chat.completions.create(**{"model": MODEL, "messages": TALK, **settings})

    for settings, kind, said in (
        ({"max_tokens": 10**9}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": int("9" * 400)}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": "hello"}, openai.BadRequestError, "messages"),
        ({"model": "other"}, openai.NotFoundError, "other"),
    ):
        with pytest.raises(kind, match=said) as refused:
            chat(**settings)
        assert refused.value.request_id, settings
    for key in ("sk-wrong-0123456789", "short"):
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=key).models.list()
        assert refused.value.request_id
        assert key not in str(refused.value.body)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    assert all(replica["ejections"] == 0 for replica in served.state()["replicas"])


def test_a_busy_tenant_is_told_when_to_come_again_and_the_client_does(client):
    mine = client.with_options(api_key=LIMITED_KEY)
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    stream = mine.completions.create(**ask, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        mine.completions.create(**ask)
    assert float(refused.value.response.headers["retry-after"]) > 0
    threading.Timer(0.5, stream.close).start()
    said = mine.with_options(max_retries=8).completions.create(model=MODEL, prompt="x")
    assert said.choices[0].text


def test_a_fleet_that_takes_nothing_is_said_to_be_unavailable(client, served):
    served.fault("drain")
    time.sleep(1.0)
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model=MODEL, prompt="x")
    assert refused.value.status_code == 503
    assert float(refused.value.response.headers["retry-after"]) > 0
    assert refused.value.body["message"]
    threading.Timer(0.5, served.fault, ["recover"]).start()
    again = client.with_options(max_retries=8).completions.create(model=MODEL, prompt="x")
    assert again.choices[0].text


def test_one_failed_replica_is_nobodys_error(client, served):
    served.fault("fail", replicas=[1])
    for i in range(12):
        said = client.completions.create(model=MODEL, prompt=f"{i}", max_tokens=3)
        assert said.choices[0].text


def test_a_client_out_of_patience_leaves_nothing_behind(client, served):
    served.fault("hang")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model=MODEL, messages=TALK)
    served.fault("recover")
    served.until_idle()


def test_a_stream_that_is_closed_is_aborted(client, served):
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**ask, stream=True) as stream:
        next(iter(stream))
    served.until_idle()


def test_no_event_comes_before_the_first_token(client, served):
    served.fault("slow", value=20.0)
    time.sleep(0.2)
    begin_s = time.monotonic()
    talk = [{"role": "user", "content": "x " * 4000}]
    stream = iter(
        client.chat.completions.create(model=MODEL, messages=talk, max_tokens=5, stream=True)
    )
    next(stream)
    role_s = time.monotonic() - begin_s
    while not next(stream).choices[0].delta.content:
        pass
    token_s = time.monotonic() - begin_s
    assert role_s > 0.7 * token_s > 0.05
    for _ in stream:
        pass


def test_many_at_once(served):
    async def test():
        limits = httpx.Limits(max_connections=200)
        async with openai.AsyncOpenAI(
            base_url=served.base_url,
            api_key=KEY,
            max_retries=0,
            http_client=httpx.AsyncClient(limits=limits, timeout=60),
        ) as client:

            async def one(i):
                ask = {"model": MODEL, "prompt": f"request {i}", "max_tokens": 30}
                whole = await client.completions.create(**ask)
                parts = []
                async for chunk in await client.completions.create(**ask, stream=True):
                    parts.append(chunk.choices[0].text)
                assert "".join(parts) == whole.choices[0].text
                return whole.system_fingerprint

            assert len(set(await asyncio.gather(*map(one, range(100))))) > 1

    asyncio.run(test())
