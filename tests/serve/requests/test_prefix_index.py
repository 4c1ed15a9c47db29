"""Block keys name prefixes; the index knows what each replica has computed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from servegym.serve.requests.prefix_index import PrefixIndex, text_keys, token_keys

TOKENS = st.lists(st.integers(0, 2**31), max_size=100)


@given(TOKENS, TOKENS, st.integers(1, 16))
def test_keys_are_equal_exactly_as_far_as_the_texts_are(first, second, block):
    a, b = token_keys(first, block), token_keys(second, block)
    assert len(a) == len(first) // block
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    equal = [x == y for x, y in zip(a.tolist(), b.tolist(), strict=False)]
    assert equal == [(i + 1) * block <= same for i in range(len(equal))]


def mix(x: int) -> int:
    """The mixing of the keys in Python's own numbers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(st.binary(max_size=600), st.integers(1, 9))
def test_keys_are_those_of_the_plain_definition(text, block_words):
    words = [int.from_bytes(text[i : i + 8], "little") for i in range(0, len(text) // 8 * 8, 8)]
    wanted, total = [], 0
    for b in range(len(words) // block_words):
        block = words[b * block_words : (b + 1) * block_words]
        content = mix(sum(mix(word ^ mix(w)) for w, word in enumerate(block)) % 2**64)
        total = (total + mix(content ^ mix(b))) % 2**64
        wanted.append(mix(total))
    assert text_keys(text, 8 * block_words).tolist() == wanted
    assert token_keys(np.array(words, np.uint64).view(np.int64), block_words).tolist() == wanted


def test_the_order_of_blocks_counts():
    one, two = [1] * 4, [2] * 4
    assert token_keys(one + two, 4)[1] != token_keys(two + one, 4)[1]
    assert len(set(token_keys(one * 50, 4).tolist())) == 50


def test_keys_are_the_same_everywhere():
    assert token_keys([1, 2, 3, 4], 2).tolist() == [14001984914459278643, 6103901538595944906]
    assert (
        text_keys(b"servegym" * 4, 16).tolist() == text_keys(b"servegym" * 4 + b"more", 16).tolist()
    )


def test_text_is_cut_into_blocks_of_bytes():
    assert len(text_keys(b"x" * 127, 64)) == 1
    assert len(text_keys(b"x" * 128, 64)) == 2
    assert text_keys(b"a" * 64 + b"b" * 64, 64)[0] == text_keys(b"a" * 100, 64)[0]
    assert len(text_keys(b"", 64)) == 0


def test_counts_leading_blocks_only():
    index = PrefixIndex([100, 100, 100])
    long = token_keys(range(40), 4)
    index.add(0, long)
    index.add(1, long[:3])
    assert index.leading_blocks(long).tolist() == [10, 3, 0]
    other = token_keys([*range(8), *range(100, 132)], 4)
    assert index.leading_blocks(other).tolist() == [2, 2, 0]
    assert index.leading_blocks(long[:0]).tolist() == [0, 0, 0]
    index.clear(0)
    assert index.leading_blocks(long).tolist() == [0, 3, 0]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), max_size=60),
    st.integers(0, 12),
)
def test_never_knows_more_than_fits_and_what_it_knows_is_closed_under_prefixes(prompts, capacity):
    texts = [token_keys(np.arange(12) + 1000 * i, 1) for i in range(5)]
    index = PrefixIndex([capacity])
    for text, length in prompts:
        index.add(0, texts[text][:length])
        assert index.sizes()[0] <= capacity
        latest = min(length, capacity)
        assert index.leading_blocks(texts[text])[0] >= latest
    for text in texts:  # the halving search finds what a walk finds
        walk = 0
        while walk < 12 and index.leading_blocks(text[walk : walk + 1])[0]:
            walk += 1
        assert index.leading_blocks(text)[0] == walk


def test_the_least_recently_used_goes_first_and_its_end_before_its_beginning():
    index = PrefixIndex([6])
    first, second, third = (token_keys(np.arange(3) + 10 * i, 1) for i in range(3))
    index.add(0, first)
    index.add(0, second)
    index.add(0, first)
    index.add(0, third[:2])
    assert [index.leading_blocks(k)[0] for k in (first, second, third)] == [3, 1, 2]
