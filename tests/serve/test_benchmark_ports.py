"""Ports of benchmarks: two that run at once must not get each other's answers."""

from __future__ import annotations

import random
import runpy
import secrets
import socket
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "fleet_processes.py"


@pytest.fixture
def draw():
    """What draws ports as a benchmark does that looks, by its seed, at the same ones first."""
    modules = []

    def drawn(count: int, seed: int) -> list[int]:
        modules.append(runpy.run_path(str(PATH)))
        random.seed(seed)
        return modules[-1]["free_ports"](count)

    yield drawn
    for module in modules:  # a process keeps its ports until it ends
        for mark in module["_marks"]:
            mark.close()


def test_two_benchmarks_that_look_at_the_same_ports_get_others(draw):
    seed = secrets.randbits(32)
    first, second = draw(5, seed), draw(5, seed)
    assert first == list(range(first[0], first[0] + 5))
    assert len(second) == 5
    assert not set(first) & set(second)


def test_a_port_that_somebody_listens_at_is_not_taken(draw):
    seed = secrets.randbits(32)
    random.seed(seed)
    looked_at = random.randrange(10_000, 32_768 - 1)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", looked_at))
        other.listen()
        assert draw(1, seed) != [looked_at]
    assert draw(1, seed) == [looked_at]
