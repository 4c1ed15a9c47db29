"""Heads of messages: what is read, what is refused, and that others read it alike."""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParserPy

from servegym.serve.router.head import (
    HeadError,
    may_begin_request,
    read_request_head,
    read_response_head,
    write_response_head,
)

GOOD = b"POST /v1/completions?a=%2F&b HTTP/1.1\r\nHost: x\r\nX-A:  b \r\nContent-Length: 5\r\n\r\n"


def test_a_request_is_read_as_it_came():
    head = read_request_head(GOOD)
    assert head[:4] == ("POST", "/v1/completions", "a=%2F&b", 1)
    assert head.fields.pairs == [("Host", "x"), ("X-A", "b"), ("Content-Length", "5")]
    assert (head.length, head.keeps_alive) == (5, True)
    assert head.fields.get("x-a") == "b"


def test_a_proxys_form_of_the_target_is_understood():
    head = read_request_head(GOOD.replace(b" /", b" http://x:1/"))
    assert (head.path, head.query) == ("/v1/completions", "a=%2F&b")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"HTTP/1.1", b"HTTP/2.0", "request line"),
        (b"HTTP/1.1", b"HTTP/1.2", "version"),
        (b" HTTP/1.1", b"", "request line"),  # as of HTTP/0.9
        (b"POST ", b"PO ST ", "method"),
        (b"POST ", b"POST\t", "method"),
        (b"POST ", b"FROB ", "method"),
        (b"POST ", b"post ", "method"),
        (b"POST ", b"POST  ", "request line"),
        (b"POST ", b" POST ", "method"),
        (b"POST ", b"\r\nPOST ", "request line"),
        (b" HTTP/1.1", b"  HTTP/1.1", "request line"),
        (b" HTTP/1.1", b" HTTP/1.1 ", "version"),
        (b"POST /v1/completions?a=%2F&b HTTP/1.1", b"OPTIONS /x RTSP/1.0", "request line"),
        (b"POST /v1/completions?a=%2F&b HTTP/1.1", b"SOURCE /x ICE/1.0", "request line"),
        (b"POST /v1/completions?a=%2F&b HTTP/1.1", b"CONNECT x:1 HTTP/1.1", "request line"),
        (b"POST /v1/completions?a=%2F&b", b"OPTIONS *", "request line"),
        (b"POST /v1/completions?a=%2F&b HTTP/1.1", b"PRI * HTTP/2.0", "HTTP/2"),
        (b" /v1", b" ftp://x/v1", "request line"),
        (b" /v1", b" http://me@x/v1", "request line"),
        (b" /v1/completions", b" http://x", "request line"),
        (b" /v1/completions", b" http://x:99999/v1", "request line"),
        (b" /v1", b" v1", "url"),
        (b" /v1", b" /\xffv1", "url"),
        (b" /v1", b" /\x00v1", "url"),
        (b"\r\n", b"\n", "empty line"),
        (b"HTTP/1.1\r\n", b"HTTP/1.1\n", "CRLF"),
        (b"5\r\n", b"5\n", "empty line"),
        (b"X-A:", b"X-A :", "header token"),
        (b"X-A: ", b" X-A: ", "whitespace"),  # a folded line
        (b"Host: x\r\n", b" Host: x\r\n", "space after start"),
        (b"X-A", b"X\x00A", "header token"),
        (b"X-A", b"X\xffA", "header token"),
        (b"X-A", b"", "header token"),
        (b" b ", b" b\x00", "header value"),
        (b" b ", b" b\x7f", "header value"),
        (b" b ", b" b\rc: d", "header value"),
        (b" b ", b" b\nc: d", "header value"),
        (b"  b ", b"\r\n b", "header value"),
        (b"Host: x\r\n", b"", "Host"),
        (b"Host: x\r\n", b"Host: x\r\nHost: y\r\n", "Host"),
        (b": 5", b": +5", "Content-Length"),
        (b": 5", b": 5, 5", "Content-Length"),
        (b": 5", b": 5_0", "Content-Length"),
        (b": 5", b": 5 5", "Content-Length"),
        (b": 5", b": ", "Content-Length"),
        (b": 5", b": " + b"9" * 30, "Content-Length"),
        (b"X-A:  b", b"Content-Length: 6", "Content-Length"),
        (b"X-A:  b", b"content-length: 5", "Content-Length"),
        (b"X-A:  b", b"Transfer-Encoding: chunked", "Transfer-Encoding"),
        (b"5\r\n", b"5\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding"),
        (b"X-A: ", b"A: b\r\n" * 200 + b"X-A: ", "more than 128"),
        (b"5\r\n\r\n", b"5\r\n\r\nabcde", "empty line"),
        (b"5\r\n\r\n", b"5\r\n", "empty line"),
    ],
)
def test_what_is_doubtful_is_refused(old, new, why):
    assert GOOD.count(old)
    with pytest.raises(HeadError, match=why):
        read_request_head(GOOD.replace(old, new))


@pytest.mark.parametrize("coding", ["gzip", "chunked, chunked", "gzip, chunked", "identity", ""])
def test_no_other_transfer_encoding_than_chunked(coding):
    sized = GOOD.replace(b"Content-Length: 5", f"Transfer-Encoding: {coding}".encode())
    with pytest.raises(HeadError, match="Transfer-Encoding"):
        read_request_head(sized)


def test_chunks_are_read_but_not_in_http_1_0():
    chunked = GOOD.replace(b"Content-Length: 5", b"Transfer-Encoding: Chunked")
    assert read_request_head(chunked).length is None
    with pytest.raises(HeadError, match=r"chunks in HTTP/1\.0"):
        read_request_head(chunked.replace(b"HTTP/1.1", b"HTTP/1.0"))


def test_an_offer_to_change_the_protocol_is_let_pass():
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nX-A:"
    head = read_request_head(GOOD.replace(b"X-A:", offer))
    assert head.fields.get("upgrade") == "h2c"
    assert (head.fields.get("x-a"), head.length, head.keeps_alive) == ("b", 5, True)


def test_empty_values_and_bytes_of_any_charset_are_kept():
    head = read_request_head(GOOD.replace(b"X-A:  b ", b"X-E:\r\nX-F: \t\r\nX-A: \xc3\xa4\xff"))
    assert head.fields.pairs[1:4] == [("X-E", ""), ("X-F", ""), ("X-A", "ä\udcff")]


def test_what_is_said_of_a_refused_head_holds_nothing_of_it():
    said = []
    for at in range(len(GOOD)):
        for sent in (b"sEcReT", b"\x00sEcReT", b" sEcReT: ", b"\r\nsEcReT", b"://sEcReT:x/"):
            try:
                read_request_head(GOOD[:at] + sent + GOOD[at:])
            except HeadError as error:
                said.append("".join(traceback.format_exception(error)))
    assert len(said) > 200
    assert not any("sEcReT" in text for text in said)
    assert max(len(text.splitlines()[-1]) for text in said) < 120


def compare(rng: random.Random, parts: list[bytes], loop: asyncio.AbstractEventLoop) -> int:
    """Read changed requests with both; return how many the router's reader takes."""
    lines = GOOD.split(b"\r\n")[:-2]
    taken = 0
    for _ in range(5000):
        tried = list(lines)
        for _ in range(rng.randint(1, 2)):
            i = rng.randrange(len(tried))
            at = rng.randint(0, len(tried[i]))
            until = min(len(tried[i]), at + rng.choice((0, 0, 1, 3, 20)))
            tried[i] = (
                tried[i][:at]
                + b"".join(rng.choices(parts, k=rng.randint(0, 2)))
                + (tried[i][until:])
            )
        head = b"\r\n".join(tried) + b"\r\n\r\n"
        if head.find(b"\r\n\r\n") + 4 != len(head):
            continue
        try:
            mine = read_request_head(head)
        except HeadError:
            continue
        taken += 1
        assert may_begin_request(head)
        parser = HttpRequestParserPy(BaseProtocol(loop), loop, 2**16)
        ((theirs, payload),), _, _ = parser.feed_data(head)
        assert theirs.method == mine.method
        assert theirs.path.partition("?")[2] == mine.query
        assert theirs.chunked == (mine.length is None), head
        assert theirs.should_close is not mine.keeps_alive or mine.minor == 0, head
        pairs = [(n.decode(), v.decode("utf-8", "surrogateescape")) for n, v in theirs.raw_headers]
        assert [(n, v.strip(" \t")) for n, v in pairs] == mine.fields.pairs
        assert payload.is_eof() == (mine.length == 0), head
    return taken


def test_whatever_is_read_another_parser_reads_alike():
    """Of heads that two readers understand in two ways, one hides a request from the other.

    aiohttp's parser in Python shares no code with llhttp.
    """
    rng = random.Random(0)
    parts = [
        *(b"POST", b"GET", b" ", b"/v1/x", b"?q", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r"),
        *(b"Host", b"Content-Length", b"Transfer-Encoding", b"X-A", b":", b"chunked", b"5", b"05"),
        *(b"\t", b"\x00", b"\x7f", b"\xc3\xa4", b"\xff", b",", b'"', b"gzip", b"+5", b"Connection"),
        *(b"close", b"keep-alive", b"Host: x\r\n", b"X-A: b\r\n", b"Content-Length: 5\r\n"),
    ]
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        taken = compare(rng, parts, loop)
    assert taken > 500


@pytest.mark.parametrize(
    ("data", "may"),
    [
        (b"", True),
        (b"PO", True),
        (b"POST /v1/x HT", True),
        (b"POST /v1/x HTTP/1.1\r\nHos", True),
        (b"\x16\x03\x01\x02", False),
        (b"\x00" * 10, False),
        (b"{}", False),
        (b"x" * 100, False),
        (b"POST /v1/x HTTP/3.1\r\n", False),
        (b"POST /v1/x HTTP/2.0\r\n", False),
        (b"POST /v1/x\r\n", False),
        (b"OPTIONS /x RTSP/1.0\r\nHos", False),
    ],
)
def test_what_cannot_become_a_request_is_not_waited_for(data, may):
    assert may_begin_request(data) is may


class TestResponses:
    def read(self, *lines: bytes):
        return read_response_head(b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", b""]))

    def test_how_its_body_ends(self):
        head = self.read(b"Transfer-Encoding: chunked")
        assert (head.chunked, head.length, head.keeps_alive) == (True, None, True)
        head = self.read(b"Content-Length: 12")
        assert (head.chunked, head.length, head.keeps_alive) == (False, 12, True)
        head = self.read()
        assert (head.chunked, head.length, head.keeps_alive) == (False, None, False)
        assert not self.read(b"Content-Length: 12", b"connection: Foo, Close").keeps_alive

    def test_some_have_no_body_whatever_they_say(self):
        for status in (b"204 No Content", b"100 Continue", b"304 x"):
            text = b"HTTP/1.1 " + status + b"\r\nContent-Length: 9\r\n\r\n"
            assert read_response_head(text).length == 0

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            (b"HTTP/1.1 20 OK", "status"),
            (b"HTTP/1.1 2000 OK", "status"),
            (b"HTTP/1.1 099 OK", "status line"),
            (b"HTTP/1.1 600 OK", "status line"),
            (b"HTTP/1.1  200 OK", "status"),
            (b"HTTP/2.0 200 OK", "status line"),
            (b"HTTP/1.2 200 OK", "version"),
            (b"RTSP/1.0 200 OK", "status line"),
            (b"\r\nHTTP/1.1 200 OK", "status line"),
            (b"HTTP/1.1 200 O\rK", "LF"),
            (b"HTTP/1.1 200 O\nK", "CR"),
            (b"200", "HTTP"),
            (b"SSH-2.0", "HTTP"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5", "Content-Length"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", "Transfer"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked", "other than chunked"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked", "other than chunked"),
            (b"HTTP/1.1 200 OK\r\nA: b\r\n c", "whitespace"),
            (b"HTTP/1.1 200 OK" + b"\r\nA: b" * 129, "more than 128"),
        ],
    )
    def test_what_is_none(self, line, why):
        with pytest.raises(HeadError, match=why):
            read_response_head(line + b"\r\n\r\n")

    def test_a_change_of_the_protocol_is_read(self):
        head = read_response_head(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        assert (head.status, head.length) == (101, 0)

    def test_what_is_written_can_be_read(self):
        pairs = [("X-A", "b"), ("X-B", "ä\udcff")]
        head = read_response_head(write_response_head(299, pairs))
        assert (head.status, head.fields.pairs) == (299, pairs)
