"""Reading a request as far as a router needs it; the rest is the engine's business."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import TypeAdapter

from servegym.serve.requests.prompt import Prompt, Size
from servegym.serve.router.errors import RequestError
from servegym.serve.router.forms import Form, wrong
from servegym.serve.router.json_body import parse_json
from servegym.serve.router.lax import read_lax
from servegym.serve.router.multipart import read_form
from servegym.serve.vllm.hints import PREFIX
from servegym.typing import IntArray

_FLAG = TypeAdapter(bool)
_NUMBER = TypeAdapter(int)
#: No engine makes more tokens; larger limits are as good as none.
_MAX_TOKENS = 2**31


class Asked(NamedTuple):
    """What a client asks for.

    Attributes:
        model: By name; empty if none is given.
        prompt: Text or token ids; of a list of prompts, all of them in one. Measured already, or
            only a length, if it is neither.
        max_tokens: What the client allows, `None` if it does not say; 1 where nothing is
            generated.
        stream: Whether it wants a stream.
        slo_class: Name of the service level, if the body has one.
        session: Name of the session, if the body has one.
        fields: The body.
    """

    model: str
    prompt: str | IntArray | Prompt | Size
    max_tokens: int | None
    stream: bool
    slo_class: str | None
    session: str | None
    fields: Mapping[str, object]


def read_request(
    body: bytes,
    form: Form,
    *,
    content_type: str = "",
    slo_field: str | None = None,
    session_field: str | None = None,
) -> Asked:
    """Read the body of a request.

    Args:
        body: JSON, or a form with a file.
        form: How it is read.
        content_type: Of the body; matters only where it is a form.
        slo_field: Field that names the service level.
        session_field: Field that names the session; one that is no text or number names none, as
            it is only for the log.

    Raises:
        RequestError: If it is not what it must be, or a field the router reads has the wrong type.
    """
    data = read_form(body, content_type) if form.multipart else _document(body)
    model = data.get("model") or ""
    if not isinstance(model, str):
        raise wrong("model must be a text")
    stream = data.get("stream")
    if not isinstance(stream, bool):
        stream = stream is not None and read_lax(_FLAG, stream, "stream must be true or false")
    slo_class = data.get(slo_field) if slo_field else None
    if slo_class is not None and not isinstance(slo_class, str):
        raise wrong(f"{slo_field} must be a text")
    session = data.get(session_field) if session_field else None
    named = isinstance(session, str | int) and not isinstance(session, bool)
    try:
        prompt = form.prompt(data)
    except RecursionError:
        raise wrong("the body is nested too deeply") from None
    return Asked(
        model,
        prompt,
        _max_tokens(data, form.limits) if form.generates else 1,
        stream,
        slo_class,
        str(session) if named else None,
        data,
    )


def _document(body: bytes) -> dict[str, object]:
    try:
        data = parse_json(body)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(data, dict):
        raise wrong("the body must be a JSON object")
    return data


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


def _max_tokens(data: Mapping[str, object], names: tuple[str, ...]) -> int | None:
    name = next((name for name in names if data.get(name) is not None), None)
    if name is None:
        return None
    value = data[name]
    message = f"{name} must be a whole number of at least 0"
    number = value if type(value) is int else read_lax(_NUMBER, value, message)
    if number < 0:
        raise wrong(message)
    return min(number, _MAX_TOKENS)
