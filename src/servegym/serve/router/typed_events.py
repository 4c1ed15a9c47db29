"""What events say that name their type: of responses, of Anthropic's messages, of transcripts.

Events of completions have no type; `stream` reads them. (OpenAI, "Responses streaming events";
Anthropic, "Streaming Messages"; OpenAI, "Transcription streaming events".)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

#: Whose words a stream is in; errors that the router adds to it are in the same.
Dialect = Literal["openai", "responses", "anthropic"]


class Meaning(NamedTuple):
    """What an event says.

    Attributes:
        dialect: Whose words these are.
        is_output: It has output: text, a part of a tool's arguments, of thinking, or of sound.
        ends: The answer is complete with it.
        usage: What it says of lengths.
        error: Why the answer has failed, if it has.
    """

    dialect: Dialect
    is_output: bool = False
    ends: bool = False
    usage: object = None
    error: dict[str, Any] | None = None


def meaning(event: dict[str, Any]) -> Meaning | None:
    """Return what an event says; `None` if its type is none of those known here."""
    kind = event.get("type")
    if not isinstance(kind, str):
        return None
    if kind.startswith("response."):
        return _of_response(kind, event)
    if kind.startswith("transcript."):
        ends = kind == "transcript.text.done"
        return Meaning("openai", kind.endswith(".delta"), ends, event.get("usage"))
    if kind == "message_start":
        return Meaning("anthropic", usage=_within(event, "message").get("usage"))
    if kind == "content_block_delta":
        return Meaning("anthropic", is_output=True)
    if kind == "message_delta":
        return Meaning("anthropic", usage=event.get("usage"))
    if kind == "message_stop":
        return Meaning("anthropic", ends=True)
    if kind in ("content_block_start", "content_block_stop", "ping"):
        return Meaning("anthropic")
    return None


def _of_response(kind: str, event: dict[str, Any]) -> Meaning:
    response = _within(event, "response")
    if kind == "response.failed":
        error = response.get("error")
        said = error if isinstance(error, dict) else {"message": "the response has failed"}
        return Meaning("responses", usage=response.get("usage"), error={"error": said})
    if kind in ("response.completed", "response.incomplete"):
        return Meaning("responses", ends=True, usage=response.get("usage"))
    return Meaning("responses", is_output=kind.endswith(".delta"))


def _within(event: dict[str, Any], name: str) -> dict[str, Any]:
    found = event.get(name)
    return found if isinstance(found, dict) else {}
