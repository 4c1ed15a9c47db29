"""Which leading blocks of a prompt each replica has probably cached."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import config

from servegym.cluster.jit import fixed, inlined, kernel
from servegym.typing import FloatArray, IntArray, UInt64Array

#: Bytes hashed at once where no tokens are known, as a multiple of 8.
WORD_BYTES = 8


@inlined
def _mix(x: Any) -> Any:
    """Scramble a word, one to one (splitmix64; Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _name(words: UInt64Array, block_words: int, places: UInt64Array, keys: UInt64Array) -> None:
    """Fill in the keys of all blocks, in one pass.

    A block's content is a sum over its words, each mixed with its place; a key is a sum over all
    blocks so far, each mixed with its position: so their order counts.
    """
    total = np.uint64(0)
    for b in range(len(keys)):
        content = np.uint64(0)
        for w in range(block_words):
            content += _mix(words[b * block_words + w] ^ places[w])
        total += _mix(_mix(content) ^ _mix(np.uint64(b)))
        keys[b] = _mix(total)


@functools.lru_cache(maxsize=16)
def _places(block_words: int) -> UInt64Array:
    """Return what the places of a block's words are mixed to, `uint64[block_words]`."""
    places: UInt64Array = _mix(np.arange(block_words, dtype=np.uint64))
    return places


def block_keys(words: UInt64Array, block_words: int) -> UInt64Array:
    """Name every whole block of a text together with all that comes before it.

    Equal keys mean equal prefixes, up to collisions of 64 bits. The keys are the same on every
    machine.

    Args:
        words: The text, contiguous, `uint64[n]`.
        block_words: Words in a block.

    Returns:
        `uint64[n // block_words]`.
    """
    keys = np.empty(len(words) // block_words, np.uint64)
    places = _places(block_words)
    name = fixed(_name, keys, 1, keys, keys)  # types are always these
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        with np.errstate(over="ignore"):
            name(words, block_words, places, keys)
    else:
        name(words, block_words, places, keys)
    return keys


def token_keys(token_ids: Sequence[int] | IntArray, block_tokens: int) -> UInt64Array:
    """Name the blocks of a tokenised prompt; see `block_keys`."""
    return block_keys(np.ascontiguousarray(token_ids, np.int64).view(np.uint64), block_tokens)


def text_keys(text: bytes, block_bytes: int) -> UInt64Array:
    """Name the blocks of a text of unknown tokens; see `block_keys`.

    Args:
        text: The prompt.
        block_bytes: Bytes in a block, a multiple of 8.
    """
    whole = len(text) // WORD_BYTES * WORD_BYTES
    words = np.frombuffer(text, np.dtype("<u8"), whole // WORD_BYTES)
    return block_keys(words.astype(np.uint64, copy=False), block_bytes // WORD_BYTES)


class PrefixIndex:
    """Blocks by replica, the least recently used forgotten first.

    Within one prompt the first blocks count as used last, as in an engine's cache: what stays of
    a prompt is always its beginning, and a search for the last known block can halve.

    Args:
        capacity_blocks: Blocks that each replica remembers, `[R]`; `resize` and `grow` change that.
    """

    def __init__(self, capacity_blocks: Sequence[int]) -> None:
        self._capacity = [max(0, int(size)) for size in capacity_blocks]
        self._known: list[OrderedDict[int, None]] = [OrderedDict() for _ in self._capacity]

    def grow(self) -> None:
        """Make a place for one more replica, which remembers nothing."""
        self._capacity.append(0)
        self._known.append(OrderedDict())

    def leading_blocks(self, keys: UInt64Array) -> FloatArray:
        """Count the leading blocks of a prompt that each replica knows.

        Args:
            keys: Of the prompt.

        Returns:
            `float64[R]`.
        """
        names = keys.tolist()
        counts = np.zeros(len(self._known))
        if not names:
            return counts
        first = names[0]
        for r, known in enumerate(self._known):
            if first not in known:
                continue
            low, high = 1, len(names)  # names[low - 1] is known, names[high:] are not
            while low < high:
                middle = (low + high + 1) // 2
                if names[middle - 1] in known:
                    low = middle
                else:
                    high = middle - 1
            counts[r] = low
        return counts

    def add(self, replica: int, keys: UInt64Array) -> None:
        """A replica has computed a prompt."""
        known, capacity = self._known[replica], self._capacity[replica]
        for key in reversed(keys[:capacity].tolist()):
            known[key] = None
            known.move_to_end(key)
        while len(known) > capacity:
            known.popitem(last=False)

    def resize(self, replica: int, capacity_blocks: int) -> None:
        """A replica remembers so many blocks from now on."""
        self._capacity[replica] = max(0, capacity_blocks)

    def capacity(self, replica: int) -> int:
        """Blocks that a replica remembers."""
        return self._capacity[replica]

    def clear(self, replica: int) -> None:
        """A replica has lost its cache."""
        self._known[replica].clear()

    def sizes(self) -> list[int]:
        """Blocks known of each replica."""
        return [len(known) for known in self._known]
