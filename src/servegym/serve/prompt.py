"""What a router can know of a prompt before any engine has seen it: its length and its prefixes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.errors import ConfigError
from servegym.serve.prefix_index import WORD_BYTES, text_keys, token_keys
from servegym.typing import UInt64Array

#: Weight of the newest prompt in the average of bytes per token.
_RATIO_WEIGHT = 0.02


class PrefixConfig(BaseModel):
    """How prompts are cut into blocks.

    Attributes:
        block_tokens: The engine's block size.
        bytes_per_token: Where no tokens are known: of a block, and the first guess of lengths.
        tokenizer: A `tokenizer.json`, read by the `tokenizers` package; without it bytes stand
            for tokens.
        share_of_cache: Share of a replica's KV cache that prefixes are remembered of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    block_tokens: int = Field(16, ge=1)
    bytes_per_token: int = Field(4, ge=1)
    tokenizer: Path | None = None
    share_of_cache: float = Field(1.0, ge=0, le=1)


class Prompt(NamedTuple):
    """A prompt, measured.

    Attributes:
        tokens: Its length, exact if it was tokenised, at least 1.
        keys: Name of each whole block with all before it, `uint64[n]`.
        block_tokens: Tokens in such a block, on average.
        num_bytes: Length of the text; 0 if it came as tokens.
    """

    tokens: float
    keys: UInt64Array
    block_tokens: float
    num_bytes: int = 0


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Tokenizer(Protocol):
    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> _Encoding: ...


class PromptReader:
    """Measures prompts.

    Without a tokenizer the length in tokens is guessed from the bytes, and the guess learns from
    the lengths that engines report.

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

    def read(self, prompt: str | Sequence[int]) -> Prompt:
        """Measure a prompt, a text or token ids."""
        if not isinstance(prompt, str):
            return self._tokens(prompt)
        if self._tokenizer is not None:
            return self._tokens(self._tokenizer.encode(prompt).ids)
        text = prompt.encode("utf-8", "replace")  # lone surrogates are valid JSON
        return Prompt(
            max(1.0, round(len(text) / self._bytes_per_token)),
            text_keys(text, self._block_bytes),
            self._block_bytes / self._bytes_per_token,
            len(text),
        )

    def learn(self, prompt: Prompt, tokens: int) -> None:
        """An engine has said how many tokens a prompt has."""
        if prompt.num_bytes > 0 and tokens > 0:
            ratio = min(16.0, max(0.5, prompt.num_bytes / tokens))
            self._bytes_per_token += _RATIO_WEIGHT * (ratio - self._bytes_per_token)

    def _tokens(self, ids: Sequence[int]) -> Prompt:
        size = self.config.block_tokens
        return Prompt(max(1.0, len(ids)), token_keys(np.asarray(ids, np.int64), size), size)


def chat_text(messages: Sequence[object], tools: object = None) -> str:
    """Write a conversation as one text whose beginning is that of every later turn.

    It is not the engine's chat template, but equal beginnings stay equal.

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
            texts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
            content = "".join(
                text if isinstance(text, str) else json.dumps(part, separators=(",", ":"))
                for text, part in zip(texts, content, strict=True)
            )
        calls = message.get("tool_calls")
        parts.append(f"\x02{message.get('role')}\x03{content if content is not None else ''}")
        if calls:
            parts.append(json.dumps(calls, separators=(",", ":")))
    return "".join(parts)


def _read_tokenizer(path: Path) -> _Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "a tokenizer needs the tokenizers package: pip install 'servegym[tokenizers]'"
        ) from error
    try:
        found: _Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ConfigError(f"{path} is no tokenizer.json: {error}") from error
    return found
