"""Tokens, answers and block identities."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from servegym.serve.engine.content import CHARS_PER_TOKEN, Content, answer_text, request_digest

TEXT = st.text(alphabet="ab", max_size=60)


@given(st.integers(0, 300), st.integers(0, 300))
def test_shorter_answer_is_the_beginning_of_a_longer_one(a, b):
    digest = request_digest("hello", None)
    short, long = sorted((a, b))
    text = answer_text(digest, long)
    assert len(text) == long * CHARS_PER_TOKEN
    assert text.startswith(answer_text(digest, short))


def test_answers_of_different_requests_differ_and_of_equal_ones_do_not():
    digests = [
        request_digest("1,2", None),
        request_digest([1, 2], None),
        request_digest("1,2", 3),
        request_digest("1,2 ", None),
    ]
    assert len({answer_text(d, 8) for d in digests}) == 4
    assert request_digest("1,2", 3) == request_digest("1,2", 3)


@given(TEXT, TEXT, st.integers(1, 4))
def test_blocks_are_the_same_exactly_while_the_text_is(a, b, block_size):
    width = block_size * CHARS_PER_TOKEN
    one, two = Content(a, "", block_size), Content(b, "", block_size)
    for j in range(min(len(a), len(b)) // width):
        same = a[: (j + 1) * width] == b[: (j + 1) * width]
        assert (one.identity(j) == two.identity(j)) == same


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_blocks_of_token_ids_are_the_same_exactly_while_the_ids_are(a, b):
    one, two = Content(a, "", 4), Content(b, "", 4)
    for j in range(min(len(a), len(b)) // 4):
        same = a[: (j + 1) * 4] == b[: (j + 1) * 4]
        assert (one.identity(j) == two.identity(j)) == same


def test_answer_is_found_in_the_next_turn_that_repeats_it():
    answer = answer_text(b"x", 16)
    first = Content("a" * 64, answer, 4)
    second = Content("a" * 64 + answer + "b" * 64, "", 4)
    assert first.prompt_tokens == 16
    assert [first.identity(j) for j in range(8)] == [second.identity(j) for j in range(8)]
    ids = [int(word, 16) for word in answer.split()]
    first, second = Content([1] * 16, answer, 4), Content([1] * 16 + ids, "", 4)
    assert [first.identity(j) for j in range(8)] == [second.identity(j) for j in range(8)]
