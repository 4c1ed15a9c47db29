"""Reading an OpenAI request as far as a router needs it; the rest is the engine's business."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from servegym.serve.prompt import chat_text
from servegym.serve.router.errors import RequestError
from servegym.serve.vllm.hints import PREFIX


class Asked(NamedTuple):
    """What a client asks for.

    Attributes:
        model: By name; empty if none is given.
        prompt: Text or token ids; of a list of prompts, all of them in one.
        max_tokens: What the client allows, `None` if it does not say.
        stream: Whether it wants a stream.
        slo_class: Name of the service level, if the body has one.
        fields: The body.
    """

    model: str
    prompt: str | list[int]
    max_tokens: int | None
    stream: bool
    slo_class: str | None
    fields: Mapping[str, object]


def read_request(body: bytes, *, chat: bool, slo_field: str | None = None) -> Asked:
    """Read a completion or chat-completion request.

    Args:
        body: JSON.
        chat: Which of the two.
        slo_field: Field that names the service level.

    Raises:
        RequestError: If it is no JSON object, or a field the router reads has the wrong type.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(data, dict):
        raise _wrong("the body must be a JSON object")
    model, stream = data.get("model") or "", data.get("stream") or False
    if not isinstance(model, str):
        raise _wrong("model must be a text")
    if not isinstance(stream, bool):
        raise _wrong("stream must be true or false")
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    max_tokens = next((data[name] for name in names if data.get(name) is not None), None)
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
        raise _wrong("max_tokens must be a whole number of at least 0")
    slo_class = data.get(slo_field) if slo_field else None
    if slo_class is not None and not isinstance(slo_class, str):
        raise _wrong(f"{slo_field} must be a text")
    prompt = _chat(data) if chat else _completion(data)
    return Asked(model, prompt, max_tokens, stream, slo_class, data)


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


def _completion(data: Mapping[str, object]) -> str | list[int]:
    prompt = data.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return "".join(prompt)
        flat = prompt
        if all(isinstance(part, list) for part in prompt):
            flat = [token for part in prompt for token in part]
        if all(type(token) is int and -(2**63) <= token < 2**63 for token in flat):
            return flat
    raise _wrong("prompt must be a text, a list of texts or lists of token ids")
