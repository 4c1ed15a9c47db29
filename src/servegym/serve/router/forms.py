"""How the bodies of the endpoints say what is asked: the prompt, and how much may be answered.

A prompt is read as far as its cost and its prefix need it; whether the rest is right the engine
finds out. Fields are those that vLLM's server and the APIs of OpenAI and Anthropic have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from servegym.serve.requests.prompt import Prompt, Size, chat_text
from servegym.serve.router.errors import RequestError
from servegym.serve.router.lax import read_lax
from servegym.serve.router.typed_events import Dialect
from servegym.typing import IntArray

_Body = Mapping[str, object]
#: Text or token ids; what is measured already; or a length of which no prefix is known.
Asked = str | IntArray | Prompt | Size

_PROMPTS = TypeAdapter(list[int] | list[list[int]] | list[str])
#: Of a prompt given as embeddings: two bytes for each of 4,096 numbers, and four letters of Base64
#: for three bytes. Its true length is known only to the engine, which reports it.
_EMBEDS_LETTERS_PER_TOKEN = 2 * 4096 * 4 / 3
#: Whisper's encoder makes 1,500 positions of 30 seconds (Radford et al. 2022, section 2.2), and a
#: second of sound has 16,000 bytes at 128 kbit/s: a guess, which formats differ from tenfold.
_SOUND_BYTES_PER_TOKEN = 16_000 / 50
#: Blocks of Anthropic's messages that hold text, and that are media.
_TEXT_BLOCKS = ("text", "thinking")
_MEDIA_BLOCKS = ("image", "document", "input_image", "input_file", "input_audio")


class Form(NamedTuple):
    """How one kind of body is read.

    Attributes:
        prompt: Reads the prompt out of the fields.
        limits: Names of the fields that say how long the answer may be, the first that is given.
        generates: Whether the answer is made token by token; else the prompt is all there is to
            compute.
        takes_hints: Whether engines read `vllm_xargs` there.
        multipart: Whether it is a form with a file, not JSON.
        dialect: Whose words errors are in.
    """

    prompt: Callable[[_Body], Asked]
    limits: tuple[str, ...] = ()
    generates: bool = True
    takes_hints: bool = False
    multipart: bool = False
    dialect: Dialect = "openai"


def wrong(message: str) -> RequestError:
    """Make the error of a body that says not what it must."""
    return RequestError(400, message, "invalid_request")


def _completion(data: _Body) -> Asked:
    prompt = data.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if prompt is None and data.get("prompt_embeds"):
        return _embedded(data["prompt_embeds"])
    message = "prompt must be a text, a list of texts or lists of token ids"
    if not isinstance(prompt, list) or not prompt:
        raise wrong(message)
    kinds = set(map(type, prompt))
    if kinds != {int} and kinds != {str}:
        prompt = read_lax(_PROMPTS, prompt, message)
    if isinstance(prompt[0], str):
        return "".join(prompt)
    if isinstance(prompt[0], list):
        prompt = [token for part in prompt for token in part]
    try:
        return np.array(prompt, np.int64)
    except OverflowError:
        raise wrong(message) from None


def _embedded(embeds: object) -> Prompt:
    """Measure a prompt that is neither text nor tokens: roughly, and no prefix is known of it."""
    parts = embeds if isinstance(embeds, list) else [embeds]
    letters = sum(len(part) for part in parts if isinstance(part, str))
    tokens = max(1.0, round(letters / _EMBEDS_LETTERS_PER_TOKEN))
    return Prompt(tokens, np.empty(0, np.uint64), 1.0)


def _chat(data: _Body) -> str:
    return chat_text(_messages_of(data), data.get("tools"))


def _messages_of(data: _Body) -> list[Mapping[str, object]]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages must be a list with at least one message")
    if not all(isinstance(message, dict) for message in messages):
        raise wrong("every message must be an object with role and content")
    return messages


def _anthropic(data: _Body) -> str:
    """Read Anthropic's messages: the system's text is beside them, and content is in blocks."""
    messages = [{**message, "content": _blocks(message)} for message in _messages_of(data)]
    if system := data.get("system"):
        messages.insert(0, {"role": "system", "content": system})
    return chat_text(messages, data.get("tools"))


def _blocks(message: Mapping[str, object]) -> object:
    content = message.get("content")
    if not isinstance(content, list):
        return content
    parts: list[object] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            within = _blocks(block)
            parts += within if isinstance(within, list) else [str(within or "")]
        elif kind in _TEXT_BLOCKS or kind in _MEDIA_BLOCKS or not isinstance(block, dict):
            parts.append(block)
        else:  # a call of a tool, and whatever comes: they are written out
            parts.append(json.dumps(block, separators=(",", ":")))
    return parts


def _responses(data: _Body) -> str:
    """Read OpenAI's responses: items, of which messages are one kind."""
    given = data.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    message = "input must be a text or a list of items"
    if not isinstance(given, list) or not given:
        raise wrong(message)
    items: list[Mapping[str, object]] = []
    for item in given:
        if not isinstance(item, dict):
            raise wrong(message)
        if "content" in item:
            items.append(item)
        else:  # calls of tools and what they gave
            text = json.dumps(item, separators=(",", ":"))
            items.append({"role": item.get("type"), "content": text})
    if instructions := data.get("instructions"):
        items.insert(0, {"role": "system", "content": instructions})
    return chat_text(items, data.get("tools"))


def _pooled(data: _Body) -> Asked:
    """Read what is to be embedded: one text or several, as tokens or not, or a conversation."""
    if "messages" in data:
        return _chat(data)
    given = data.get("input")
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and isinstance(given[0], int):
        return _completion({"prompt": given})
    if not isinstance(given, list) or not given:
        raise wrong("input must be a text, a list of texts or lists of token ids")
    tokens = sum(len(part) for part in given if isinstance(part, list))
    return Size(_num_bytes(given), tokens)


def _reranked(data: _Body) -> Size:
    """Read a query and documents, each of which is read together with the query."""
    documents = data.get("documents")
    if not isinstance(documents, list):
        documents = [documents]
    query = _num_bytes([data.get("query")])
    return Size(query * len(documents) + _num_bytes(documents))


def _scored(data: _Body) -> Size:
    """Read pairs of texts; one beside several is read with each."""
    sides = []
    for names in (("text_1", "queries"), ("text_2", "documents", "items")):
        side = next((data[name] for name in names if name in data), None)
        sides.append(side if isinstance(side, list) else [side])
    num_pairs = max(map(len, sides))
    sizes = (_num_bytes(side) * (num_pairs if len(side) == 1 else 1) for side in sides)
    return Size(sum(sizes))


def _num_bytes(parts: Iterable[object]) -> int:
    """Return how much text there is: in UTF-8, nearly."""
    total = 0
    for part in parts:
        text = part.get("text") or part.get("content") if isinstance(part, dict) else part
        if isinstance(text, str):
            total += len(text.encode("utf-8", "replace"))
        elif isinstance(text, list) and text is not part:
            total += _num_bytes(text)
    return total


def _spoken(data: _Body) -> Asked:
    """Read a text that is to be said."""
    given = data.get("input")
    if not isinstance(given, str):
        raise wrong("input must be a text")
    return given


def _heard(data: _Body) -> Size:
    """Read how much sound there is."""
    given = data.get("file")
    return Size(0, round(given / _SOUND_BYTES_PER_TOKEN) if isinstance(given, int) else 0)


def _nothing(data: _Body) -> Size:
    """Read nothing: no model computes anything for it."""
    return Size(0)


COMPLETION = Form(_completion, ("max_tokens",), takes_hints=True)
CHAT = Form(_chat, ("max_completion_tokens", "max_tokens"), takes_hints=True)
MESSAGES = Form(_anthropic, ("max_tokens",), dialect="anthropic")
RESPONSES = Form(_responses, ("max_output_tokens",))
POOLING = Form(_pooled, generates=False)
RERANK = Form(_reranked, generates=False)
SCORE = Form(_scored, generates=False)
TOKENS = Form(_nothing, generates=False)
MESSAGE_TOKENS = TOKENS._replace(dialect="anthropic")
SPEECH = Form(_spoken)
SOUND = Form(_heard, multipart=True)

#: The endpoints that are passed to a replica, and how their bodies are read.
FORMS: Mapping[str, Form] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGE_TOKENS,
    "/v1/embeddings": POOLING,
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK,
    "/rerank": RERANK,
    "/v1/score": SCORE,
    "/score": SCORE,
    "/pooling": POOLING,
    "/classify": POOLING,
    "/tokenize": TOKENS,
    "/detokenize": TOKENS,
    "/v1/audio/speech": SPEECH,
    "/v1/audio/transcriptions": SOUND,
    "/v1/audio/translations": SOUND,
}
