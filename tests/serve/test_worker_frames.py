"""Bytes between workers and the decider, and the order in which they are taken."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.serve.requests.prompt import PrefixConfig, PromptReader
from servegym.serve.requests.recent_ends import MAX_NEW_BLOCKS
from servegym.serve.router.placement import Arrival
from servegym.serve.router.workers import decider
from servegym.serve.router.workers.frames import (
    Kind,
    Packet,
    pack,
    pack_arrival,
    read_packets,
    token_record,
    token_records,
    unpack,
    unpack_arrival,
    write_frame,
    write_packet,
)

from .running import run

CONFIG = PrefixConfig(block_tokens=4, bytes_per_token=4)


@given(
    st.lists(st.lists(st.binary(max_size=30), min_size=1, max_size=4), min_size=1, max_size=4),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_packets_are_whole_however_they_are_cut(bodies, data):
    packets = [
        Packet(float(i), [(Kind.COUNT, k, body) for k, body in enumerate(one)])
        for i, one in enumerate(bodies)
    ]
    sent = b"".join(
        write_packet(p.written_s, [write_frame(*frame) for frame in p.frames]) for p in packets
    )
    cut = data.draw(st.integers(0, len(sent)))
    first, rest = read_packets(sent[:cut])
    second, rest = read_packets(rest + sent[cut:])
    assert first + second == packets
    assert rest == b""


def test_a_packet_has_the_size_that_its_docstring_says():
    assert len(write_packet(1.0, [write_frame(Kind.LEAVE, 7)])) == 12 + 9
    records = token_record(3, 2, 1.5) + token_record(4, 1, 1.75)
    assert len(records) == 2 * 16
    assert list(token_records(records)) == [(3, 2, 1.5), (4, 1, 1.75)]
    assert unpack(pack("a", 1, None)) == ("a", 1, None)


def arrival(prompt) -> Arrival:
    return Arrival(prompt, "m", 100, True, "chat", None, 12.5, True)


def test_an_arrival_comes_as_it_was_sent():
    sent = arrival(PromptReader(CONFIG).read("a story of a ship that is lost at sea"))
    got = unpack_arrival(pack_arrival(sent, content=True))
    assert got[1:] == sent[1:]
    assert len(sent.prompt.keys) == 2  # 37 bytes in blocks of 16
    for mine, theirs in zip(got.prompt, sent.prompt, strict=True):
        assert np.array_equal(mine, theirs)


def test_of_the_content_only_what_is_looked_at_goes_along():
    sent = arrival(PromptReader(CONFIG).read("0123456789abcdef" * (MAX_NEW_BLOCKS + 500) + "rest"))
    without = pack_arrival(sent, content=False)
    body = pack_arrival(sent, content=True)
    assert len(body) - len(without) < 16 * MAX_NEW_BLOCKS + 100
    got = unpack_arrival(body).prompt
    assert len(got.content) == len(sent.prompt.content)
    assert np.array_equal(got.content[500 * 16 :], sent.prompt.content[500 * 16 :])
    assert len(unpack_arrival(without).prompt.content) == 0


class TestLengthsAreGuessedWhereTheyAreLearnt:
    def test_of_a_text(self):
        learnt, other = PromptReader(CONFIG), PromptReader(CONFIG)
        text = "x" * 400
        for _ in range(200):
            learnt.learn(learnt.read(text), 200)  # two bytes a token
        expected = learnt.read(text)
        got = learnt.measured(other.read(text))
        assert (got.tokens, got.block_tokens) == (expected.tokens, expected.block_tokens)
        assert 190 <= got.tokens <= 200
        assert other.read(text).tokens == 100

    def test_of_an_image_in_a_text(self):
        learnt, other = PromptReader(CONFIG), PromptReader(CONFIG)
        text = "look: \x04" + "0f" * 16 + "\x05 what is it?"
        for _ in range(100):
            learnt.learn(learnt.read(text), 300)
        expected = learnt.read(text)
        got = learnt.measured(other.read(text))
        assert got.tokens == expected.tokens == 300
        assert got.media_tokens == expected.media_tokens
        assert np.isclose(got.block_tokens, expected.block_tokens, rtol=1e-12)

    def test_tokens_that_were_counted_stay(self):
        learnt = PromptReader(CONFIG)
        learnt.learn(learnt.read("x" * 400), 200)
        prompt = PromptReader(CONFIG).read(list(range(30)))
        assert learnt.measured(prompt) is prompt
        assert prompt.tokens == 30


class _Desk:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.counted: list[tuple[str, int]] = []

    def count(self, endpoint: str, status: int, times: int) -> None:
        self.counted.append((endpoint, times))


def said(written_s: float, name: str) -> bytes:
    return write_packet(written_s, [write_frame(Kind.COUNT, 0, pack({(name, 200): 3}))])


def test_what_was_said_first_is_taken_first_whoever_said_it(monkeypatch, tmp_path):
    """The second worker's end of an answer, before the first one's next request."""

    async def test() -> None:
        desk = _Desk()
        it = decider.Decider(desk, None)
        it.listen(tmp_path / "decider")
        workers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for worker in workers:
            worker.connect(str(tmp_path / "decider"))
        async with asyncio.timeout(5):
            while len(it._workers) < 2:
                await asyncio.sleep(0.001)
        monkeypatch.setattr(decider.time, "monotonic", lambda: 10.0)
        workers[0].send(said(3.0, "next request") + said(11.0, "written since the look began"))
        workers[1].send(said(2.0, "end of the answer") + said(10.5, "too"))
        it._look()
        assert desk.counted == [("end of the answer", 3), ("next request", 3)]
        monkeypatch.setattr(decider.time, "monotonic", lambda: 12.0)
        async with asyncio.timeout(5):
            while len(desk.counted) < 4:
                await asyncio.sleep(0.001)
        assert [name for name, _ in desk.counted[2:]] == ["too", "written since the look began"]
        for worker in workers:
            worker.close()
        it.stop()

    run(test)
