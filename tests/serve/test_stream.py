"""Reading along with answers: server-sent events by the standard, in whatever pieces they come."""

from __future__ import annotations

import json
import random

import pytest

from servegym.serve.router.stream import Reader


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def text(content: str, **more) -> bytes:
    return event(choices=[{"index": 0, "text": content, "finish_reason": None, **more}])


def chat(delta, finish_reason=None, index=0, **more) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return event(choices=[{**choice, **more}])


ROLE = chat({"role": "assistant", "content": ""})
END = chat({}, "stop")
DONE = b"data: [DONE]\n\n"


def read(stream: bytes, size: int | None = None) -> Reader:
    reader = Reader(is_stream=True)
    size = size or max(1, len(stream))
    counted = sum(reader.feed(stream[i : i + size]) for i in range(0, len(stream), size))
    counted += reader.close()
    assert counted == reader.num_tokens
    return reader


@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: s.replace(b"data: ", b"data:"),
        lambda s: s.replace(b"\n", b"\r\n"),
        lambda s: s.replace(b"\n", b"\r"),
        lambda s: b"\xef\xbb\xbf" + s,
        lambda s: s.replace(b"\n\n", b"\n: a comment\n\n"),
        lambda s: s.replace(b"\n\n", b"\nid: 7\nretry: 10\nunknown\n\n\n\n"),
        lambda s: s.replace(b"data", b": data: [DONE]\n\nevent: message\ndata"),
        lambda s: s.replace(b'{"choices"', b'{\ndata:"choices"'),
        lambda s: s[:-2],  # the last line ends with the stream
    ],
)
def test_one_stream_in_all_forms_that_the_standard_allows(change, size):
    stream = ROLE + chat({"content": "a"}) + chat({"content": "b"}) + END
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    reader = read(change(stream + event(choices=[], usage=usage) + DONE), size)
    assert (reader.begun, reader.done, reader.whole, reader.failed) == (True, True, True, False)
    assert reader.num_tokens == 2
    assert reader.usage() == (9, 3, None)
    assert reader.output_tokens() == 3


@pytest.mark.parametrize(
    "said",
    [
        b": ping\n\n",
        b":\n\n: data: {}\n\n",
        b"event: ping\n\n",
        b"\n\n\n",
        ROLE,
        chat({"role": "assistant"}),
        chat({"role": "assistant", "content": None, "reasoning_content": None}),
        event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 0}),
        text(""),
        b"data\n\n"[:-1],
    ],
)
def test_what_is_no_first_token(said):
    reader = Reader(is_stream=True)
    assert reader.feed(said) == 0
    assert not reader.begun
    assert reader.feed(text("x")) == 1
    assert reader.begun


@pytest.mark.parametrize(
    "said",
    [
        text("x"),
        text(" "),
        text("", token_ids=[5]),
        text("", logprobs={"tokens": [""]}),
        chat({"role": "assistant", "content": "x"}),
        chat({"reasoning_content": "hm"}),
        chat({"reasoning": "hm"}),
        chat({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}),
        chat({"refusal": "no"}),
        event(token={"text": "x"}),  # another dialect: whatever it is, it has said something
        b"data: plain text\n\n",
    ],
)
def test_what_is_a_first_token(said):
    reader = Reader(is_stream=True)
    assert reader.feed(said) == 1
    assert reader.begun


def test_an_answer_without_output_has_begun_when_it_ends():
    reader = read(ROLE + END + DONE)
    assert (reader.begun, reader.num_tokens, reader.whole) == (True, 0, True)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b'data: {"error": {"message": "out of memory"}}\n\n', 500),
        (b'data:{"error":{"message":"too long","code":400}}\n\n', 400),
        (b'data: {"object":"error","message":"x","code":503}\n\n', 503),
        (b'data: {"type": "error", "error": {"type": "overloaded_error"}}\n\n', 500),
        (b'event: error\ndata: {"message": "x", "status": 429}\n\n', 429),
        (b"event: error\r\ndata: it is broken\r\n\r\n", 500),
        (b'data: {"error": "gone", "error_type": "generation"}\n\n', 500),
        (b'data: {"error": {"code": true}}\n\n', 500),
    ],
)
@pytest.mark.parametrize("size", [1, None])
def test_an_error_is_no_success_whatever_its_shape(said, status, size):
    # vLLM ends a stream that has failed with [DONE], as if nothing had happened
    reader = read(text("a") + text("b") + said + DONE, size)
    assert (reader.failed, reader.whole, reader.error_status) == (True, False, status)


def test_no_error_is_no_error():
    stream = event(error=None, choices=[{"index": 0, "text": "a", "finish_reason": "stop"}])
    assert not read(stream + DONE).failed
    said = text('data: {"error": {"message": "x"}}\n\ndata: [DONE]')
    reader = read(text("a") + said)
    assert (reader.failed, reader.done) == (False, False)


def test_a_stream_is_whole_with_done_or_when_every_choice_has_ended():
    assert not read(text("a")).whole
    assert read(text("a") + DONE).whole
    assert read(chat({"content": "a"}) + END).whole
    two = chat({"content": "a"}) + chat({"content": "b"}, index=1) + END
    assert not read(two).whole
    assert read(two + chat({}, "length", index=1)).whole
    assert not read(b"").whole


def test_an_event_in_an_odd_place_of_a_stream_is_not_taken_for_the_usual_one():
    """The reader skips events that are like the last but for their text: not others."""
    usual = text("abc")
    reader = Reader(is_stream=True)
    for _ in range(3):
        assert reader.feed(usual) == 1
    for odd, count in (
        (usual.replace(b"abc", b'abc","x":"y'), 1),
        (usual.replace(b"abc", b"\\"), 1),  # no JSON
        (usual.replace(b"null", b'"stop"'), 1),
        (b": comment\n" + usual, 1),
        (usual + usual, 2),
        (usual[:20], 0),
        (usual[20:], 1),
        (b"event: error\n", 0),
    ):
        assert reader.feed(odd) == count
    reader.feed(usual)
    assert reader.failed


def test_events_and_lines_without_end_take_no_memory():
    reader = Reader(is_stream=True)
    for _ in range(64):
        reader.feed(b"data: " + b"x" * 100_000)
    assert sum(map(len, reader._line)) < 300_000
    reader.feed(b"\n")
    for _ in range(64):
        reader.feed(b"data: " + b"x" * 100_000 + b"\n")
    assert sum(map(len, reader._data)) < 300_000
    assert reader.feed(b"\n") == 1  # something was said
    assert reader.feed(text("a") + DONE) == 1
    assert reader.whole


class TestWholeAnswers:
    def read(self, body: bytes, size: int = 1000) -> Reader:
        reader = Reader(is_stream=False)
        for i in range(0, len(body), size):
            reader.feed(body[i : i + size])
        reader.close()
        return reader

    def test_usage_is_read_of_small_and_large_ones(self):
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        for length in (10, 1_000_000):
            said = 'x "prompt_tokens": 9 ' * (length // 20)
            body = json.dumps({"choices": [{"text": said}], "usage": usage}).encode()
            assert self.read(body).usage() == (7, 5, 3)

    def test_an_error_with_status_200_is_an_error(self):
        assert self.read(b'{"object": "error", "message": "x", "code": 400}').failed
        assert self.read(b'{"id": "x", "error": {"message": "x"}}').failed
        assert not self.read(b'{"id": "x", "error": null, "choices": []}').failed

    @pytest.mark.parametrize("count", ["1e999", "-1", '"5"', "true", "9" * 400, "9" * 5000, "1.5"])
    def test_counts_that_are_none_are_left_out(self, count):
        for pad in ("", "x" * 200_000):
            body = f'{{"pad":"{pad}","usage": {{"prompt_tokens": {count}}}}}'.encode()
            assert self.read(body).usage()[0] in (None, 1)  # the end of 1.5, read as text


def test_any_bytes_in_any_pieces_are_read_alike():
    rng = random.Random(0)
    parts = [
        *(b"data: ", b"data:", b"data", b"event: error", b"event:", b":", b" ", b"\n", b"\r\n"),
        *(b"\r", b"\n\n", b"[DONE]", b"\xef\xbb\xbf", b"\xff", b"{", b"}", b'"', b"\\", b"[" * 300),
        *(text("a"), ROLE, END, DONE, b'{"error":1}', b'{"choices":[{}]}', b'{"choices":[1]}'),
        *(b'{"choices":[{"delta":[],"index":"x"}]}', b'{"usage":{"prompt_tokens":1e400}}'),
    ]
    for _ in range(1500):
        stream = b"".join(rng.choices(parts, k=rng.randint(1, 12)))
        found = []
        for size in (1, rng.randint(2, 9), None):
            reader = read(stream, size)
            names = ("begun", "done", "failed", "whole", "num_tokens")
            found.append([getattr(reader, name) for name in names])
        assert found[0] == found[1] == found[2], stream
