"""What a request's tokens are: how many, which KV blocks they fill, what the answer says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

#: Characters that stand for one token of text, of prompts and of answers alike.
CHARS_PER_TOKEN = 4
#: Of these, the hexadecimal digits of an answer's token; a space follows.
_DIGITS = CHARS_PER_TOKEN - 1


def request_digest(prompt: str | Sequence[int], seed: int | None) -> bytes:
    """Name a request by what it asks; equal requests get equal answers on every replica."""
    text = prompt if isinstance(prompt, str) else ",".join(map(str, prompt))
    kind = "text" if isinstance(prompt, str) else "ids"
    return hashlib.blake2b(
        f"{kind} {seed} {text}".encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


def answer_text(digest: bytes, num_tokens: int) -> str:
    """Return an answer of `CHARS_PER_TOKEN` characters a token.

    A shorter answer of the same request is the beginning of a longer one. Neighbouring tokens
    are unrelated, so a token that is lost, repeated or of another request shows.
    """
    digits = hashlib.shake_128(digest).hexdigest((num_tokens * _DIGITS + 1) // 2)
    return "".join(f"{digits[i : i + _DIGITS]} " for i in range(0, num_tokens * _DIGITS, _DIGITS))


class Content:
    """The tokens of one request, as far as the prefix cache can see them.

    Args:
        prompt: Text, or token ids.
        answer: The answer to come, see `answer_text`.
        block_size: Tokens in a KV block.

    Attributes:
        prompt_tokens: Tokens of the prompt, at least 1.
    """

    __slots__ = ("_chain", "_slice", "prompt_tokens")

    def __init__(self, prompt: str | Sequence[int], answer: str, block_size: int) -> None:
        self._chain: list[int] = []
        self._slice: Callable[[int], object]
        if isinstance(prompt, str):
            self.prompt_tokens = max(1, -(-len(prompt) // CHARS_PER_TOKEN))
            text, width = prompt + answer, block_size * CHARS_PER_TOKEN
            self._slice = lambda j: text[j * width : (j + 1) * width]
        else:
            self.prompt_tokens = max(1, len(prompt))
            ids = [*prompt, *(int(word, 16) for word in answer.split())]
            self._slice = lambda j: tuple(ids[j * block_size : (j + 1) * block_size])

    def identity(self, block: int) -> int:
        """Name the whole text up to the end of KV block `block`; equal texts have equal names."""
        chain = self._chain
        while len(chain) <= block:
            before = chain[-1] if chain else 0
            chain.append(hash((before, self._slice(len(chain)))))
        return chain[block]
