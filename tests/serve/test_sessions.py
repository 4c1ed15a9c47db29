"""What follows what, as the router writes it into its log."""

from __future__ import annotations

import asyncio

import pytest

from servegym.serve.decision_log import read_rows

from .running import VirtualTimeLoop, run, running, until

STREAM = {"model": "m", "stream": True, "max_tokens": 5}
HELLO = "Tell me a story of a ship that is lost, and of the whale that finds it at last. "


def followed(folder) -> dict[str, tuple[str, str] | None]:
    rows = {row["key"]: row["follows"] for row in read_rows(folder)}
    return {key: one and (one["key"], one["by"]) for key, one in rows.items()}


def play(folder, asks, **request) -> dict[str, tuple[str, str] | None]:
    """Send (id, body, headers) one after the other and return whom each followed."""

    async def test() -> None:
        dispatch = {
            "runtime": {"policy": "least-outstanding"},
            "log": {"folder": str(folder)},
        }
        async with running(2, dispatch=dispatch, request=request) as it:
            for key, body, headers in asks:
                named = {"x-request-id": key, **headers}
                status, _, _ = await it.post({**STREAM, **body}, headers=named)
                assert status == 200

    run(test)
    return followed(folder)


def test_a_header_names_the_session(tmp_path):
    one, other = {"x-session-id": "1"}, {"X-Session-Id": "2"}
    asks = [
        ("a", {"prompt": "x"}, one),
        ("b", {"prompt": "x"}, other),
        ("c", {"prompt": "y"}, one),
        ("d", {"prompt": "z"}, other),
        ("e", {"prompt": "x"}, {"x-session-id": ""}),
    ]
    assert play(tmp_path, asks) == {
        "a": None,
        "b": None,
        "c": ("a", "session"),
        "d": ("b", "session"),
        "e": None,
    }


def test_another_header_or_a_field_may_name_it(tmp_path):
    asks = [
        ("a", {"prompt": "x"}, {"x-chat": "1"}),
        ("b", {"prompt": "x", "prompt_cache_key": "1"}, {}),
        ("c", {"prompt": "x", "prompt_cache_key": 1}, {"x-session-id": "9"}),
        ("d", {"prompt": "x", "prompt_cache_key": ["of no use"]}, {}),
    ]
    settings = {"session_header": "x-chat", "session_field": "prompt_cache_key"}
    assert play(tmp_path, asks, **settings) == {
        "a": None,
        "b": ("a", "session"),
        "c": ("b", "session"),
        "d": None,
    }


def test_without_a_name_the_prompt_tells(tmp_path):
    asks = [
        ("a", {"prompt": HELLO}, {}),
        ("b", {"prompt": HELLO + "Once, a ship ... And then?"}, {}),
        ("c", {"prompt": "Tell me something else that has nothing to do with it." * 3}, {}),
    ]
    assert play(tmp_path, asks, session_header=None) == {
        "a": None,
        "b": ("a", "prefix"),
        "c": None,
    }


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_a_stream_has_been_answered_when_it_says_so(tmp_path, pause_s):
    """Clients may go on at `[DONE]`, before the engine has closed the stream."""

    async def test() -> None:
        dispatch = {"log": {"folder": str(tmp_path)}}
        async with running(2, dispatch=dispatch) as it:
            event = b'data: {"choices": [{"index": 0, "text": "t"}]}\n\n'
            for replica in it.replicas:
                replica.script = [event, b"data: [DONE]\n\n", pause_s]
            body, url = {**STREAM, "prompt": "x"}, it.url + "/v1/completions"
            headers = {"x-session-id": "s", "x-request-id": "a"}
            async with it.client.post(url, json=body, headers=headers) as response:
                async for line in response.content:
                    if b"[DONE]" in line:
                        break
                await it.post(body, headers={**headers, "x-request-id": "b"})
                await response.read()
            await until(it.idle)

    run(test)
    assert followed(tmp_path) == {"a": None, "b": ("a", "session")}


def test_what_broke_off_is_not_followed(tmp_path):
    async def test() -> None:
        dispatch = {"log": {"folder": str(tmp_path)}}
        async with running(1, dispatch=dispatch) as it:
            it.replicas[0].mode = "die"
            headers = {"x-session-id": "s"}
            with pytest.raises(Exception, match=r"payload|closed|disconnected"):
                await it.post({**STREAM, "prompt": "x"}, headers={**headers, "x-request-id": "a"})
            it.replicas[0].mode = "ok"
            await asyncio.sleep(0.1)
            await it.post({**STREAM, "prompt": "x"}, headers={**headers, "x-request-id": "b"})

    run(test, loop=VirtualTimeLoop)
    assert followed(tmp_path) == {"a": None, "b": None}
