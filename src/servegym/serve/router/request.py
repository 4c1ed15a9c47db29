"""Reading an OpenAI request as far as a router needs it; the rest is the engine's business."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from servegym.serve.requests.prompt import Prompt, chat_text
from servegym.serve.router.errors import RequestError
from servegym.serve.router.json_body import parse_json
from servegym.serve.vllm.hints import PREFIX
from servegym.typing import IntArray

_T = TypeVar("_T")
#: Engines read fields as pydantic does where it is lax, and so `16.0`, `"16"` and `"true"` are
#: numbers and truth values to them: they are to the router too.
_FLAG = TypeAdapter(bool)
_NUMBER = TypeAdapter(int)
_PROMPTS = TypeAdapter(list[int] | list[list[int]] | list[str])
#: No engine makes more tokens; larger limits are as good as none.
_MAX_TOKENS = 2**31
#: Of a prompt given as embeddings: two bytes for each of 4,096 numbers, and four letters of Base64
#: for three bytes. Its true length is known only to the engine, which reports it.
_EMBEDS_LETTERS_PER_TOKEN = 2 * 4096 * 4 / 3


class Asked(NamedTuple):
    """What a client asks for.

    Attributes:
        model: By name; empty if none is given.
        prompt: Text or token ids; of a list of prompts, all of them in one. Measured already if
            it is neither.
        max_tokens: What the client allows, `None` if it does not say.
        stream: Whether it wants a stream.
        slo_class: Name of the service level, if the body has one.
        session: Name of the session, if the body has one.
        fields: The body.
    """

    model: str
    prompt: str | IntArray | Prompt
    max_tokens: int | None
    stream: bool
    slo_class: str | None
    session: str | None
    fields: Mapping[str, object]


def read_request(
    body: bytes, *, chat: bool, slo_field: str | None = None, session_field: str | None = None
) -> Asked:
    """Read a completion or chat-completion request.

    Args:
        body: JSON.
        chat: Which of the two.
        slo_field: Field that names the service level.
        session_field: Field that names the session; one that is no text or number names none, as
            it is only for the log.

    Raises:
        RequestError: If it is no JSON object, or a field the router reads has the wrong type.
    """
    try:
        data = parse_json(body)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(data, dict):
        raise _wrong("the body must be a JSON object")
    model = data.get("model") or ""
    if not isinstance(model, str):
        raise _wrong("model must be a text")
    stream = data.get("stream")
    if not isinstance(stream, bool):
        stream = stream is not None and _read(_FLAG, stream, "stream must be true or false")
    slo_class = data.get(slo_field) if slo_field else None
    if slo_class is not None and not isinstance(slo_class, str):
        raise _wrong(f"{slo_field} must be a text")
    session = data.get(session_field) if session_field else None
    named = isinstance(session, str | int) and not isinstance(session, bool)
    prompt = _chat(data) if chat else _completion(data)
    return Asked(
        model,
        prompt,
        _max_tokens(data, chat),
        stream,
        slo_class,
        str(session) if named else None,
        data,
    )


def with_hints(fields: Mapping[str, object], hints: Mapping[str, float]) -> bytes:
    """Write a body anew, with what the router knows of the request for the engine's scheduler.

    Args:
        fields: The client's body; its own hints and its `priority` are left out.
        hints: By the names in `serve.vllm.hints`.
    """
    given = fields.get("vllm_xargs")
    others = {
        name: value
        for name, value in (given if isinstance(given, dict) else {}).items()
        if not str(name).startswith(PREFIX)
    }
    kept = {name: value for name, value in fields.items() if name != "priority"}
    return json.dumps({**kept, "vllm_xargs": {**others, **hints}}).encode()


def _wrong(message: str) -> RequestError:
    return RequestError(400, message, "invalid_request")


def _chat(data: Mapping[str, object]) -> str:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages must be a list with at least one message")
    if not all(isinstance(message, dict) for message in messages):
        raise _wrong("every message must be an object with role and content")
    return chat_text(messages, data.get("tools"))


def _completion(data: Mapping[str, object]) -> str | IntArray | Prompt:
    prompt = data.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if prompt is None and data.get("prompt_embeds"):
        return _embedded(data["prompt_embeds"])
    message = "prompt must be a text, a list of texts or lists of token ids"
    if not isinstance(prompt, list) or not prompt:
        raise _wrong(message)
    kinds = set(map(type, prompt))
    if kinds != {int} and kinds != {str}:
        prompt = _read(_PROMPTS, prompt, message)
    if isinstance(prompt[0], str):
        return "".join(prompt)
    if isinstance(prompt[0], list):
        prompt = [token for part in prompt for token in part]
    try:
        return np.array(prompt, np.int64)
    except OverflowError:
        raise _wrong(message) from None


def _embedded(embeds: object) -> Prompt:
    """Measure a prompt that is neither text nor tokens: roughly, and no prefix is known of it."""
    parts = embeds if isinstance(embeds, list) else [embeds]
    letters = sum(len(part) for part in parts if isinstance(part, str))
    tokens = max(1.0, round(letters / _EMBEDS_LETTERS_PER_TOKEN))
    return Prompt(tokens, np.empty(0, np.uint64), 1.0)


def _max_tokens(data: Mapping[str, object], chat: bool) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    value = next((data[name] for name in names if data.get(name) is not None), None)
    if value is None:
        return None
    message = "max_tokens must be a whole number of at least 0"
    number = value if type(value) is int else _read(_NUMBER, value, message)
    if number < 0:
        raise _wrong(message)
    return min(number, _MAX_TOKENS)


def _read(kind: TypeAdapter[_T], value: object, message: str) -> _T:
    try:
        return kind.validate_python(value)
    except ValidationError:
        raise _wrong(message) from None
