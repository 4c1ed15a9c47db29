"""Events that are known by their shape: what is taken for one is one, byte by byte."""

from __future__ import annotations

import random

import pytest

from servegym.serve.router.framing import Chunked, chunk
from servegym.serve.router.shape import shape_of


def event(text: bytes = b" word") -> bytes:
    choice = b'{"index":0,"text":"%b","logprobs":null,"finish_reason":null}' % text
    return b'data: {"id":"cmpl-7","choices":[%b]}\n\n' % choice


def test_chunk_of_a_known_shape_fits_whatever_its_length():
    shape = shape_of(event())
    assert shape is not None
    lengths = [n for n in range(400) if shape.fits_chunk(chunk(event(b"x" * n)))]
    assert lengths == list(range(400))  # past 0x100 a first line has a digit more


@pytest.mark.parametrize(
    "data",
    [
        b"",
        event(),  # bare
        b"0" + chunk(event()),
        chunk(event()).replace(b"\r\n", b";a=b\r\n", 1),
        chunk(event())[:-1],
        chunk(event()) + b"\r\n",
        chunk(event()) * 2,
        chunk(event() * 2),
        chunk(event(b'","error":"')),
        chunk(event(b"a\\")),  # the quote behind it is of the text
        chunk(event().replace(b"cmpl-7", b"cmpl-8")),
        chunk(event().replace(b'reason":null', b'reason":"stop"')),
        b"%x\r\n%b\r\n" % (len(event()) + 1, event()),
        b"%x\r\n%b\r\n" % (len(event()) - 1, event()),
        b"%X\r\n%b\r\n" % (len(event(b"x" * 81)), event(b"x" * 81)),  # AF: chunk writes af
    ],
)
def test_what_is_not_just_one_chunk_with_one_event_does_not_fit(data):
    shape = shape_of(event())
    assert shape is not None
    assert not shape.fits_chunk(data)


def test_length_that_no_chunk_has_does_not_fit():
    # a chunk of 0xf bytes takes 20 with its lines, one of 0x10 bytes 22
    shape = shape_of(event())
    assert shape is not None
    assert (len(chunk(b"x" * 15)), len(chunk(b"x" * 16))) == (20, 22)
    assert not shape.fits_chunk(b"x" * 21)


@pytest.mark.parametrize(
    "piece",
    [
        event()[:-1],
        event().replace(b"\n\n", b"\r\n\r\n"),
        event() * 2,
        event().replace(b"null}", b'"stop"}'),
        event().replace(b'"text"', b'"usage":{},"text"'),
        event().replace(b'"index"', b'"text":"b","index"'),
        event(b"a\\nb"),
    ],
)
def test_event_that_is_more_than_one_text_has_no_shape(piece):
    assert shape_of(piece) is None


def test_whatever_fits_is_one_whole_chunk_with_one_event_of_the_shape():
    rng, shape = random.Random(3), shape_of(event())
    assert shape is not None
    fitted = 0
    for _ in range(20_000):
        data = bytearray(chunk(event(rng.choice([b"", b"a", b"x" * 90, b"\\u00e4 b"]))))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice([b"", b'"', b"\\", b"\r\n", b"0", b"f"])
        if shape.fits_chunk(bytes(data)):
            fitted += 1
            framing = Chunked()
            passed, body, rest = framing.feed(bytes(data))
            assert (passed, rest, framing.is_between) == (bytes(data), b"", True)
            assert shape.fits(body)
    assert 5_000 < fitted < 15_000
