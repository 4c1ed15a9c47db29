"""Where bodies end, in whatever pieces they come."""

from __future__ import annotations

import random

import pytest

from servegym.serve.router.framing import (
    LAST_CHUNK,
    Chunked,
    FramingError,
    Sized,
    UntilClosed,
    chunk,
)


def feed(framing, data: bytes, sizes) -> tuple[bytes, bytes, bytes]:
    """Feed data in pieces; return all that is passed on, all of the body, and what is beyond."""
    framed = body = rest = b""
    at = 0
    while at < len(data) and not framing.ended:
        size = next(sizes)
        one, two, rest = framing.feed(data[at : at + size])
        framed, body, at = framed + one, body + two, at + size
    return framed, body, rest + data[at:]


def test_chunks_pass_as_they_come_and_their_body_is_read_in_any_pieces():
    rng = random.Random(0)
    for _ in range(2000):
        pieces = [rng.randbytes(rng.choice((1, 2, 17, 300))) for _ in range(rng.randint(0, 6))]
        parts = []
        for piece in pieces:
            digits = rng.choice(("%x", "%X", "0%x", "%x ;a=b", "%x;x")) % len(piece)
            parts.append(digits.encode() + b"\r\n" + piece + b"\r\n")
        passed = b"".join(parts)
        end = rng.choice((b"0\r\n\r\n", b"000;x\r\n\r\n", b"0\r\nA: b\r\nC: d\r\n\r\n"))
        after = rng.choice((b"", b"HTTP/1.1 200 OK", b"\r\n"))
        framing = Chunked()
        sizes = iter(lambda: rng.choice((1, 2, 3, 50, 1000)), 0)
        framed, body, rest = feed(framing, passed + end + after, sizes)
        assert framing.ended
        assert (framed, body, rest) == (passed, b"".join(pieces), after)
        assert framing.missing == 0


def test_what_is_missing_completes_what_was_passed_on():
    data = chunk(b"0123456789") + chunk(b"abc")
    assert len(data) > 20
    for cut in range(len(data)):
        framing = Chunked()
        framed, _, _ = framing.feed(data[:cut])
        line_end = b"\r\n"[2 - min(2, framing.missing) :]
        whole = framed + line_end.rjust(framing.missing, b"x") + LAST_CHUNK
        again = Chunked()
        again.feed(whole)
        assert again.ended


@pytest.mark.parametrize(
    "data",
    [
        *(b"zz\r\n", b"-5\r\n", b"0x5\r\nabcde\r\n", b"5_0\r\n", b"\r\n", b"5\nabcde\n"),
        *(b"5\r\nabcdef\r\n", b"1" * 16 + b"\r\n", b"5 x\r\n", b"5;" + b"a" * 2000),
        *(b"5\r\nabcde\rx", b" 5\r\nabcde\r\n"),
    ],
)
@pytest.mark.parametrize("size", [1, 10_000])
def test_what_is_no_chunk_is_refused(data, size):
    with pytest.raises(FramingError):
        feed(Chunked(), data, iter(lambda: size, 0))


def test_trailers_without_end_are_refused():
    def trailers():
        framing = Chunked()
        framing.feed(b"0\r\n")
        for _ in range(100):
            framing.feed(b"a: " + b"b" * 1000 + b"\r\n")

    with pytest.raises(FramingError, match="trailers"):
        trailers()


def test_a_body_of_known_length_ends_with_its_last_byte():
    framing = Sized(5)
    assert framing.feed(b"abc") == (b"abc", b"abc", b"")
    assert (framing.missing, framing.ended) == (2, False)
    assert framing.feed(b"dexy") == (b"de", b"de", b"xy")
    assert (framing.missing, framing.ended) == (0, True)
    assert Sized(0).ended


def test_a_body_without_length_ends_when_it_is_said_to():
    framing = UntilClosed()
    assert framing.feed(b"abc") == (b"abc", b"abc", b"")
    assert not framing.ended
