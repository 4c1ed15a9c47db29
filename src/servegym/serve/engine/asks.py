"""What clients ask for: the bodies of OpenAI's completions and chat completions."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servegym.errors import WorkloadError
from servegym.serve.engine.content import CHARS_PER_TOKEN

#: Tokens of an answer where a completion names no limit, as OpenAI has it.
DEFAULT_COMPLETION_TOKENS = 16

#: Larger counts of tokens are no one's.
MAX_TOKENS = 2**31 - 1
#: What an image, or another part of a message that is no text, counts for.
MEDIUM_TOKENS = 1000
_Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
_Long = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_TokenId = Annotated[int, Field(ge=0, lt=2**63)]


class _Body(BaseModel):
    # clients send sampling parameters that mean nothing here
    model_config = ConfigDict(frozen=True, extra="ignore")


class StreamOptions(_Body):
    """What a stream contains besides text."""

    include_usage: bool | None = False


class _Ask(_Body):
    model: str | None = None
    max_tokens: _Count | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = False
    seed: _Long | None = None
    priority: _Long | None = 0
    n: Literal[1] | None = 1
    output_tokens: _Count | None = None  # ours: where the answer ends by itself
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def keeps_kv(self) -> bool:
        """Whether the KV of its prompt is to be kept for another replica."""
        return bool((self.kv_transfer_params or {}).get("do_remote_decode"))

    @property
    def fetches_kv(self) -> bool:
        """Whether the KV of its prompt is to be fetched from another replica."""
        return bool((self.kv_transfer_params or {}).get("do_remote_prefill"))

    @property
    def include_usage(self) -> bool:
        """Whether the last event of a stream tells the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Completion(_Ask):
    """Body of `/v1/completions`; one prompt, as text or token ids."""

    prompt: (
        str
        | list[_TokenId]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[list[_TokenId]], Field(min_length=1, max_length=1)]
    )

    @property
    def text(self) -> str | list[int]:
        """The prompt as text or tokens; of several the first."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0] if self.prompt else 0
        return self.prompt if isinstance(first, int) else first  # type: ignore[return-value]

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class _Text(_Body):
    type: Literal["text"]
    text: str

    @property
    def content(self) -> str:
        return self.text


class _Medium(BaseModel):
    """An image or the like: a stretch of tokens of its own, the same for the same content."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: Literal["image_url", "image_embeds", "input_audio", "audio_url", "video_url", "file"]

    @property
    def content(self) -> str:
        name = json.dumps(self.model_extra, sort_keys=True, default=str).encode()
        size = MEDIUM_TOKENS * CHARS_PER_TOKEN
        return hashlib.shake_128(name).hexdigest(size // 2)


_Part = Annotated[_Text | _Medium, Field(discriminator="type")]


class _Message(_Body):
    role: str
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.content for part in self.content)
        return self.content or ""


class Chat(_Ask):
    """What is asked for at `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: _Count | None = None

    @property
    def text(self) -> str:
        """The conversation as one text; an answer appended to it begins the next turn's."""
        turns = "".join(f"<|{m.role}|>\n{m.text}\n" for m in self.messages)
        return f"{turns}<|assistant|>\n"

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None is all that fit."""
        return self.max_completion_tokens or self.max_tokens


class Answer(NamedTuple):
    """How long an answer gets, and why it ends there: `stop` by itself, `length` at its limit."""

    tokens: int
    finish_reason: str


def parse(kind: type[Completion] | type[Chat], body: bytes) -> Completion | Chat:
    """Read the body of a request.

    Raises:
        WorkloadError: If it is not JSON, or not what is asked for here.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
        place = ".".join(map(str, first["loc"]))
        raise WorkloadError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def answer(ask: Completion | Chat, natural_tokens: int, room_tokens: int) -> Answer:
    """Say how long the answer gets.

    Args:
        ask: What was asked.
        natural_tokens: Length of the answer if nothing cuts it.
        room_tokens: What fits beside the prompt.

    Raises:
        WorkloadError: If `max_tokens` does not fit.
    """
    limit = ask.limit if ask.limit is not None else room_tokens
    if limit > room_tokens or room_tokens < 1:
        raise WorkloadError(
            f"{limit} output tokens were asked for, but beside this prompt there is room for "
            f"{max(room_tokens, 0)}: shorten the prompt or lower max_tokens"
        )
    if ask.ignore_eos or natural_tokens > limit:
        return Answer(limit, "length")
    return Answer(natural_tokens, "stop")
