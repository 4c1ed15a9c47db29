"""What a router can know of a prompt before any engine has seen it: its length and its prefixes."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.errors import ConfigError
from servegym.serve.requests.prefix_index import WORD_BYTES, text_keys, token_keys
from servegym.typing import UInt8Array, UInt64Array

#: Weight of the newest prompt in the average of bytes per token, and of tokens per medium.
_RATIO_WEIGHT = 0.02
_MEDIUM_WEIGHT = 0.1
_MAX_MEDIUM_TOKENS = 100_000.0
_MAX_PROMPT_TOKENS = 2**31
#: Stands in a conversation's text for what is no text: `chat_text` writes it.
_MEDIUM = re.compile("\x04([0-9a-f]{32})\x05")
#: Of more media than this in one prompt, the rest take no room in the prefix.
_MAX_STAND_INS = 64
#: Of a prompt that nobody looks into any more.
_NO_CONTENT: UInt8Array = np.zeros(0, np.uint8)
_NO_KEYS: UInt64Array = np.zeros(0, np.uint64)
#: Keys of the parts of a message that hold text.
_TEXT_KEYS = ("text", "refusal", "thinking")


class PrefixConfig(BaseModel):
    """How prompts are cut into blocks.

    Attributes:
        block_tokens: The engine's block size.
        bytes_per_token: Where no tokens are known: of a block, and the first guess of lengths.
        media_tokens: First guess of what an image, or another part of a message that is no text,
            counts for, however many bytes it has; learned from the lengths that engines report.
        tokenizer: A `tokenizer.json`, read by the `tokenizers` package; without it bytes stand
            for tokens.
        share_of_cache: Share of a replica's KV cache that prefixes are remembered of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    block_tokens: int = Field(16, ge=1)
    bytes_per_token: int = Field(4, ge=1)
    media_tokens: int = Field(1000, ge=0, le=100_000)
    tokenizer: Path | None = None
    share_of_cache: float = Field(1.0, ge=0, le=1)


class Prompt(NamedTuple):
    """How long a prompt is, and the names of its blocks.

    Attributes:
        tokens: Its length, exact if it was tokenised, at least 1.
        keys: Name of each whole block with all before it, `uint64[n]`.
        block_tokens: Tokens in such a block, on average.
        num_bytes: Length of the text; 0 if it came as tokens.
        num_media: Images and other parts that are no text.
        media_tokens: What of `tokens` they were taken to count for.
        content: What the keys are of, the bytes of the text or of the tokens.
        block_bytes: Bytes of `content` in a block.
    """

    tokens: float
    keys: UInt64Array
    block_tokens: float
    num_bytes: int = 0
    num_media: int = 0
    media_tokens: float = 0.0
    content: UInt8Array = _NO_CONTENT
    block_bytes: int = 0

    def kept_for(self, model: str) -> Prompt:
        """Return it as it is kept while it is in progress.

        It is without its content, which may be megabytes long, and the names of its blocks are
        those of no other model's.
        """
        keys = self.keys ^ _salt(model) if model and len(self.keys) else self.keys
        return Prompt(self.tokens, keys, *self[2:6])  # a third of the time of _replace


@functools.lru_cache(maxsize=1024)
def _salt(model: str) -> np.uint64:
    digest = hashlib.blake2b(model.encode("utf-8", "replace"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


class Size(NamedTuple):
    """A prompt of which only the length is known, such as many texts that are read one by one.

    Attributes:
        num_bytes: Of its texts.
        num_tokens: Beside them.
    """

    num_bytes: int
    num_tokens: int = 0


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Tokenizer(Protocol):
    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> _Encoding: ...


class PromptReader:
    """Measures the length of prompts and names their blocks.

    Without a tokenizer the length in tokens is guessed from the bytes, and the guess learns from
    the lengths that engines report. What is no text counts by the piece: the model makes as many
    tokens of an image as its processor says, and base64 tells nothing about that.

    Args:
        config: How.

    Raises:
        ConfigError: If the tokenizer cannot be read.
    """

    def __init__(self, config: PrefixConfig) -> None:
        self.config = config
        self._tokenizer = _read_tokenizer(config.tokenizer) if config.tokenizer else None
        words = max(1, round(config.block_tokens * config.bytes_per_token / WORD_BYTES))
        self._block_bytes = words * WORD_BYTES
        self._bytes_per_token = float(config.bytes_per_token)
        self._media_tokens = float(config.media_tokens)
        token_keys([0], 1)  # compiled now: no request is to wait for it

    def read(self, prompt: str | Sequence[int] | Size) -> Prompt:
        """Measure a prompt: a text (see `chat_text`), token ids, or what is known of its length."""
        if isinstance(prompt, Size):
            tokens = round(prompt.num_bytes / self._bytes_per_token) + prompt.num_tokens
            return Prompt(max(1.0, tokens), _NO_KEYS, 1.0)
        if not isinstance(prompt, str):
            return self._tokens(prompt)
        pieces = _MEDIUM.split(prompt) if "\x04" in prompt else [prompt]  # text, medium, text, …
        return self._tokenized(pieces) if self._tokenizer is not None else self._guessed(pieces)

    def measured(self, prompt: Prompt) -> Prompt:
        """Return a prompt that another reader has read with the length that this one takes it for.

        The names of its blocks are the same whoever reads it; guesses of lengths are learnt.
        """
        if prompt.num_media:
            media_tokens = prompt.num_media * self._media_tokens
            text_tokens: float = round(prompt.tokens - prompt.media_tokens)
            if prompt.num_bytes:
                text_tokens = prompt.num_bytes / self._bytes_per_token
            tokens = max(1.0, round(text_tokens + media_tokens))
            block_tokens = prompt.block_tokens * (tokens / prompt.tokens)
        elif prompt.num_bytes:
            media_tokens = 0.0
            tokens = max(1.0, round(prompt.num_bytes / self._bytes_per_token))
            block_tokens = self._block_bytes / self._bytes_per_token
        else:
            return prompt  # its tokens were counted
        num_bytes, num_media = prompt.num_bytes, prompt.num_media
        return Prompt(
            tokens, prompt.keys, block_tokens, num_bytes, num_media, media_tokens, *prompt[6:]
        )

    def learn(self, prompt: Prompt, tokens: int) -> None:
        """An engine has said how many tokens a prompt has."""
        if tokens <= 0:
            return
        tokens = min(tokens, _MAX_PROMPT_TOKENS)  # whatever an engine says
        if prompt.num_media > 0:  # says nothing about texts
            text_tokens = prompt.tokens - prompt.media_tokens
            each = max(0.0, (tokens - text_tokens) / prompt.num_media)
            each = min(each, _MAX_MEDIUM_TOKENS)
            self._media_tokens += _MEDIUM_WEIGHT * (each - self._media_tokens)
        elif prompt.num_bytes > 0:
            ratio = min(16.0, max(0.5, prompt.num_bytes / tokens))
            self._bytes_per_token += _RATIO_WEIGHT * (ratio - self._bytes_per_token)

    def _guessed(self, pieces: list[str]) -> Prompt:
        texts = [piece.encode("utf-8", "replace") for piece in pieces]  # lone surrogates are JSON
        num_bytes, num_media = sum(map(len, texts[::2])), len(texts) // 2
        media_tokens = num_media * self._media_tokens
        tokens = max(1.0, round(num_bytes / self._bytes_per_token + media_tokens))
        block_tokens, content = self._block_bytes / self._bytes_per_token, texts[0]
        if num_media:
            size = self.config.media_tokens * self.config.bytes_per_token
            for i in range(1, len(texts), 2):
                room = size if i < 2 * _MAX_STAND_INS else len(texts[i])
                texts[i] = texts[i].ljust(room, texts[i][:1])
            content = b"".join(texts)
            block_tokens = tokens * self._block_bytes / len(content)
        keys = text_keys(content, self._block_bytes)
        return Prompt(
            tokens,
            keys,
            block_tokens,
            num_bytes,
            num_media,
            media_tokens,
            np.frombuffer(content, np.uint8),
            self._block_bytes,
        )

    def _tokenized(self, pieces: list[str]) -> Prompt:
        assert self._tokenizer is not None
        num_media = len(pieces) // 2
        media_tokens = num_media * self._media_tokens
        ids: list[int] = []
        num_stand_ins = 0
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                ids += self._tokenizer.encode(piece).ids
            else:
                room = self.config.media_tokens if i < 2 * _MAX_STAND_INS else 1
                ids += [-1 - int(piece[:15], 16)] * room
                num_stand_ins += room
        tokens = max(1.0, round(len(ids) - num_stand_ins + media_tokens))
        size = self.config.block_tokens
        block_tokens = tokens * size / len(ids) if num_media and ids else size
        known = np.array(ids, np.int64)
        keys = token_keys(known, size)
        content = known.view(np.uint8)
        return Prompt(
            tokens, keys, block_tokens, 0, num_media, media_tokens, content, size * WORD_BYTES
        )

    def _tokens(self, ids: Sequence[int]) -> Prompt:
        size = self.config.block_tokens
        try:
            known = np.ascontiguousarray(ids, np.int64)
        except OverflowError:  # JSON has numbers of any length; the engine will refuse them
            known = np.asarray([token % 2**63 for token in ids], np.int64)
        return Prompt(
            max(1.0, len(ids)),
            token_keys(known, size),
            size,
            content=known.view(np.uint8),
            block_bytes=size * WORD_BYTES,
        )


def chat_text(messages: Sequence[object], tools: object = None) -> str:
    """Write a conversation as one text whose beginning is that of every later turn.

    It is not the engine's chat template, but equal beginnings stay equal. For an image, or another
    part that is no text, stands its digest, which `PromptReader` knows.

    Args:
        messages: Of a chat completion.
        tools: Its tools, which templates put first.
    """
    parts = [json.dumps(tools, separators=(",", ":"))] if tools else []
    for message in messages:
        if not isinstance(message, Mapping):
            continue
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(map(_part, content))
        calls = message.get("tool_calls")
        parts.append(f"\x02{message.get('role')}\x03{content if content is not None else ''}")
        if calls:
            parts.append(json.dumps(calls, separators=(",", ":")))
    return "".join(parts)


def _part(part: object) -> str:
    """Return a part's text, or what stands for it: equal media have equal names."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        for key in _TEXT_KEYS:
            if isinstance(text := part.get(key), str):
                return text
    name = json.dumps(part, separators=(",", ":")).encode()
    return f"\x04{hashlib.blake2b(name, digest_size=16).hexdigest()}\x05"


def _read_tokenizer(path: Path) -> _Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "a tokenizer needs the tokenizers package: pip install tokenizers"
        ) from error
    try:
        found: _Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ConfigError(f"{path} is no tokenizer.json: {error}") from error
    return found
