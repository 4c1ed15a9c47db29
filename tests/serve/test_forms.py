"""The endpoints beside completions: what is read of their bodies, and how they are passed on."""

from __future__ import annotations

import json

import aiohttp
import pytest

from servegym.serve.requests.prompt import PrefixConfig, PromptReader, Size
from servegym.serve.router.errors import RequestError
from servegym.serve.router.forms import (
    CHAT,
    COMPLETION,
    FORMS,
    MESSAGES,
    POOLING,
    RERANK,
    RESPONSES,
    SCORE,
    SOUND,
    SPEECH,
    TOKENS,
)
from servegym.serve.router.request import read_request

from .running import run, running
from .test_stream import event, read

CHAT_PATH = "/v1/chat/completions"
BROKEN = "the replica failed in the middle of the answer"
TOOL = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]}
PICTURE = {"type": "image", "source": {"type": "base64", "data": "A" * 10_000}}


def asked(form, **fields):
    return read_request(json.dumps(fields).encode(), form)


def tokens(form, **fields) -> float:
    return PromptReader(PrefixConfig()).read(asked(form, **fields).prompt).tokens


def test_a_conversation_costs_the_same_in_all_words():
    talk = [{"role": "user", "content": "Why is the sky blue?"}]
    chat = asked(CHAT, messages=[{"role": "system", "content": "Be short."}, *talk]).prompt
    assert asked(MESSAGES, system="Be short.", messages=talk).prompt == chat
    assert asked(RESPONSES, instructions="Be short.", input=talk).prompt == chat
    assert (
        asked(RESPONSES, input="Why is the sky blue?").prompt == asked(CHAT, messages=talk).prompt
    )


def test_later_turns_of_a_conversation_begin_as_the_earlier_ones():
    first = [{"role": "user", "content": [{"type": "text", "text": "And the weather?"}, PICTURE]}]
    later = [
        *first,
        {"role": "assistant", "content": [TOOL]},
        {"role": "user", "content": [RESULT]},
    ]
    before, after = (asked(MESSAGES, messages=talk).prompt for talk in (first, later))
    assert after.startswith(before)
    assert '"city":"Bern"' in after
    assert after.endswith("sun")
    assert before.count("\x04") == after.count("\x04") == 1  # the picture, and no tool, is a medium
    call = {"type": "function_call", "name": "weather", "arguments": "{}", "call_id": "c"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, call]
    before, after = (asked(RESPONSES, input=given).prompt for given in (items[:1], items))
    assert after.startswith(before)
    assert '"name":"weather"' in after


@pytest.mark.parametrize(
    ("form", "limit"),
    [(COMPLETION, "max_tokens"), (MESSAGES, "max_tokens"), (RESPONSES, "max_output_tokens")],
)
def test_each_has_its_own_limit(form, limit):
    talk = [{"role": "user", "content": "hi"}]
    body = {"prompt": "hi", "messages": talk, "input": "hi"}
    assert asked(form, **body, **{limit: 7}).max_tokens == 7
    assert asked(form, **body).max_tokens is None


def test_what_generates_nothing_has_an_answer_of_one_token():
    body = {"input": "hi", "query": "a", "documents": ["b"], "text_1": "a", "text_2": "b"}
    for form in (POOLING, RERANK, SCORE, TOKENS):
        assert asked(form, **body, max_tokens=100).max_tokens == 1


def test_the_length_of_what_is_not_generated_is_that_of_all_its_texts():
    # four bytes a token; a document is read together with the query, each side with the other
    assert tokens(POOLING, input="x" * 40) == 10
    assert tokens(POOLING, input=["x" * 40, "y" * 80]) == 30
    assert tokens(POOLING, input=[1, 2, 3]) == 3
    assert tokens(POOLING, input=[[1, 2, 3], [4]]) == 4
    documents = ["y" * 80, {"text": "z" * 40}]
    assert tokens(RERANK, query="x" * 40, documents=documents) == 2 * 10 + 20 + 10
    assert tokens(SCORE, text_1="x" * 40, text_2=["y" * 80, "z" * 40]) == 2 * 10 + 20 + 10
    assert tokens(SCORE, text_1=["x" * 40] * 2, text_2=["y" * 80, "z" * 40]) == 2 * 10 + 30
    assert tokens(TOKENS, prompt="x" * 40_000) == 1  # no model computes anything
    assert tokens(SPEECH, input="x" * 40) == 10
    talk = [{"role": "user", "content": "x" * 400}]
    assert tokens(POOLING, messages=talk) == tokens(CHAT, messages=talk)


def test_many_documents_beside_a_long_query_take_no_memory():
    prompt = asked(RERANK, query="x" * 1_000_000, documents=["y"] * 100_000).prompt
    assert prompt == Size(100_000_000_000 + 100_000)


@pytest.mark.parametrize(
    ("form", "fields", "words"),
    [
        (MESSAGES, {"messages": []}, "messages must be a list with at least one"),
        (MESSAGES, {"messages": ["hi"]}, "every message must be an object"),
        (RESPONSES, {}, "input must be a text or a list of items"),
        (RESPONSES, {"input": ["hi"]}, "input must be a text or a list of items"),
        (RESPONSES, {"input": "hi", "max_output_tokens": -1}, "max_output_tokens must be a whole"),
        (POOLING, {"input": []}, "input must be a text, a list of texts or"),
        (SPEECH, {"input": ["hi"]}, "input must be a text"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(form, fields, words):
    with pytest.raises(RequestError, match=words):
        asked(form, **fields)


def test_what_is_nested_too_deeply_is_refused(monkeypatch):
    def deep(text: bytes) -> dict:
        block: object = "x"
        for _ in range(5000):  # which not every parser of JSON refuses
            block = [{"type": "tool_result", "content": block}]
        return {"messages": [{"role": "user", "content": block}]}

    monkeypatch.setattr("servegym.serve.router.request.parse_json", deep)
    with pytest.raises(RequestError, match="nested too deeply"):
        read_request(b"", MESSAGES)


def form_data(**fields) -> tuple[bytes, str]:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = (
        'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'
    )
    sound = f"--b\r\n{head}\r\n\r\n".encode() + b"\x00\r\n\xff" * 8000 + b"\r\n"
    return b"".join([*parts, sound, b"--b--\r\n"]), "multipart/form-data; boundary=b"


def test_a_form_with_a_file_is_read():
    body, kind = form_data(model="whisper", stream="true", language="de")
    found = read_request(body, SOUND, content_type=kind)
    assert (found.model, found.stream, found.fields["language"]) == ("whisper", True, "de")
    assert found.fields["file"] == 32_000
    assert found.prompt == Size(0, 100)  # 320 bytes a token
    with pytest.raises(RequestError, match="must be multipart/form-data"):
        read_request(b"{}", SOUND, content_type="application/json")
    with pytest.raises(RequestError, match="does not end as its boundary says"):
        read_request(body[:-9], SOUND, content_type=kind)


def typed(kind: str, **fields) -> bytes:
    return f"event: {kind}\n".encode() + event(type=kind, **fields)


RESPONSE = [
    typed("response.created", response={"id": "r", "usage": None}, sequence_number=0),
    typed("response.in_progress", response={"id": "r"}, sequence_number=1),
    typed("response.output_item.added", item={"type": "message"}),
    typed("response.output_text.delta", delta="Good"),
    typed("response.output_text.delta", delta="bye"),
    typed("response.output_text.done", text="Goodbye"),
    typed(
        "response.completed",
        response={
            "usage": {
                "input_tokens": 9,
                "input_tokens_details": {"cached_tokens": 4},
                "output_tokens": 3,
            }
        },
    ),
]
MESSAGE = [
    typed("message_start", message={"usage": {"input_tokens": 5, "cache_read_input_tokens": 4}}),
    typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    typed("ping"),
    typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "Good"}),
    typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "bye"}),
    typed("content_block_stop", index=0),
    typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}),
    typed("message_stop"),
]
TRANSCRIPT = [
    typed("transcript.text.delta", delta="Good"),
    typed("transcript.text.delta", delta="bye"),
    typed("transcript.text.done", text="Goodbye", usage={"input_tokens": 9, "output_tokens": 3}),
]


@pytest.mark.parametrize("stream", [RESPONSE, MESSAGE, TRANSCRIPT])
@pytest.mark.parametrize("size", [1, 7, None])
def test_streams_that_name_their_events_are_understood(stream, size):
    reader = read(b"".join(stream), size)
    assert (reader.begun, reader.done, reader.whole, reader.failed) == (True, True, True, False)
    assert reader.num_tokens == 2
    prompt, completion, cached = reader.usage()
    assert (prompt, completion) == (9, 3)
    assert cached == (None if stream is TRANSCRIPT else 4)


@pytest.mark.parametrize("stream", [RESPONSE, MESSAGE, TRANSCRIPT])
def test_such_a_stream_begins_with_its_first_delta_and_is_whole_with_its_last_event(stream):
    first = next(i for i, piece in enumerate(stream) if b"delta" in piece)
    assert not read(b"".join(stream[:first])).begun
    assert read(b"".join(stream[: first + 1])).begun
    assert not read(b"".join(stream[:-1])).whole


def test_a_response_that_fails_has_failed_and_one_that_is_cut_short_is_whole():
    error = {"code": "server_error", "message": "no memory"}
    reader = read(RESPONSE[0] + typed("response.failed", response={"error": error}))
    assert (reader.failed, reader.begun, reader.error) == (True, False, {"error": error})
    assert read(b"".join(RESPONSE[:5]) + typed("response.incomplete", response={})).whole
    assert read(typed("error", error={"type": "overloaded_error", "message": "x"})).failed


def test_all_endpoints_are_passed_on_and_their_books_close():
    talk = [{"role": "user", "content": "hi"}]
    body = {"model": "m", "prompt": "hi", "messages": talk, "input": "hi", "query": "a"}
    body |= {"documents": ["b"], "text_1": "a", "text_2": ["b"], "tokens": [1]}
    usage = {"prompt_tokens": 3, "total_tokens": 3}

    async def test():
        async with running(2) as it:
            for replica in it.replicas:
                replica.document = {"data": [1], "usage": usage}
            passed = [path for path, form in FORMS.items() if not form.multipart]
            assert len(passed) == 16
            for path in passed:
                status, _, _ = await it.post(body, path)
                assert (path, status) == (path, 200)
            others = [path for replica in it.replicas for path, _ in replica.others]
            assert sorted(others) == sorted(set(passed) - {"/v1/completions", CHAT_PATH})
            assert all(json.loads(b) == body for r in it.replicas for _, b in r.others)
            _, page = await it.get("/metrics")
            assert 'requests_total{endpoint="/v1/embeddings",status="200"} 1' in page
            assert (await it.post({**body, "model": "other"}, "/v1/embeddings"))[0] == 404
            assert (await it.post({}, "/v1/images/generations"))[0] == 404
            assert it.idle()

    run(test)


def test_a_form_reaches_the_replica_as_it_came():
    body, kind = form_data(model="m")

    async def test():
        async with running(1) as it:
            it.replicas[0].document = {"text": "hello"}
            url = f"{it.url}/v1/audio/transcriptions"
            async with it.client.post(url, data=body, headers={"Content-Type": kind}) as response:
                assert (response.status, await response.json()) == (200, {"text": "hello"})
            assert it.replicas[0].others == [("/v1/audio/transcriptions", body)]
            assert it.replicas[0].headers[-1]["Content-Type"] == kind
            form = aiohttp.FormData({"model": "other"})
            form.add_field("file", b"sound", filename="a.wav")
            async with it.client.post(url, data=form) as response:
                assert (await response.json())["error"]["code"] == "model_not_found"
            assert it.idle()

    run(test)


@pytest.mark.parametrize(
    ("path", "stream"), [("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE)]
)
def test_a_stream_is_passed_on_and_booked(path, stream, tmp_path):
    body = {"input": "hi", "messages": [{"role": "user", "content": "hi"}], "stream": True}

    async def test():
        log = {"log": {"folder": str(tmp_path)}}
        async with running(1, dispatch={"runtime": {"policy": "round-robin"}, **log}) as it:
            it.replicas[0].script = stream
            status, answer, _ = await it.post(body, path)
            assert (status, answer) == (200, b"".join(stream))
            assert it.router.telemetry.outcomes == {"finished": 1}
            assert it.router.telemetry.latencies.total(lambda times: times.ttft).count == 1
            assert it.idle()
        (file,) = tmp_path.iterdir()
        row = json.loads(file.read_text())
        assert (row["prompt_tokens"], row["output_tokens"], row["cached_tokens"]) == (9, 3, 4)

    run(test)


async def rest(response, got: bytearray) -> None:
    async for piece in response.content.iter_any():
        got += piece


@pytest.mark.parametrize(
    ("path", "stream", "wanted"),
    [
        (
            "/v1/responses",
            RESPONSE,
            {"type": "error", "code": "broken", "message": BROKEN, "param": None},
        ),
        (
            "/v1/messages",
            MESSAGE,
            {"type": "error", "error": {"type": "api_error", "message": BROKEN}},
        ),
    ],
)
def test_a_stream_that_breaks_says_so_in_its_own_words(path, stream, wanted):
    body = {"input": "hi", "messages": [{"role": "user", "content": "hi"}], "stream": True}

    async def test():
        async with running(1) as it:
            it.replicas[0].script = stream[:-2]
            got = bytearray()
            async with it.client.post(it.url + path, json=body) as response:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await rest(response, got)
            kind, _, data = bytes(got).rstrip(b"\n").rpartition(b"\n\n")[2].partition(b"\n")
            assert kind == b"event: error"
            assert json.loads(data.removeprefix(b"data: ")) == wanted

    run(test)


def test_a_stream_without_a_first_token_goes_to_another_replica():
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}

    async def test():
        async with running(2) as it:
            overloaded = typed("error", error={"type": "overloaded_error", "message": "x"})
            scripts = iter([[*MESSAGE[:3], overloaded], MESSAGE])
            for replica, script in zip(it.replicas, scripts, strict=True):
                replica.script = script
            answers = [await it.post(body, "/v1/messages") for _ in range(2)]
            assert [answer for _, answer, _ in answers] == [b"".join(MESSAGE)] * 2
            assert it.router.telemetry.retries["error_event"] >= 1

    run(test)


def test_clients_of_anthropics_api_get_its_errors_and_may_give_its_key(tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("alice: a-key-that-is-long-enough\n")
    keys.chmod(0o600)
    body = {"messages": [{"role": "user", "content": "hi"}]}

    async def test():
        async with running(1, auth={"keys_file": str(keys)}) as it:
            it.replicas[0].document = {"type": "message", "usage": {"output_tokens": 1}}
            status, said, _ = await it.post(body, "/v1/messages")
            assert (status, json.loads(said)["type"]) == (401, "error")
            assert json.loads(said)["error"]["type"] == "authentication_error"
            headers = {"x-api-key": "a-key-that-is-long-enough", "anthropic-version": "2023-06-01"}
            status, _, _ = await it.post(body, "/v1/messages", headers=headers)
            assert status == 200
            assert "x-api-key" not in it.replicas[0].headers[-1]
            assert it.replicas[0].headers[-1]["anthropic-version"] == "2023-06-01"
            status, said, _ = await it.post({}, "/v1/messages", headers=headers)
            error = json.loads(said)["error"]
            assert (status, error["type"]) == (400, "invalid_request_error")
            assert error["message"].startswith("messages must be a list")

    run(test)
