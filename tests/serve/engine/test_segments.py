"""Rows of block names: closed up when they are used up, and never another request's."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.serve.engine.core import EngineCore, Noise

from ...cluster.strategies import random_grid  # noqa: TID252


@pytest.fixture
def core() -> EngineCore:
    kind = ReplicaType("small", random_grid(np.random.default_rng(0)), 400, 64, 4)
    return EngineCore(
        kind, block_size=4, prefix_caching=True, chunked_prefill=True, speed=1.0, noise=Noise()
    )


def rows_of(core: EngineCore, place: int) -> list[tuple[int, int]]:
    request = core._state.request[0, place]
    return core._state.segment[0, request["segment_first"] : request["segment_stop"]].tolist()


def test_each_request_keeps_its_names_while_others_come_and_go(core):
    rng = np.random.default_rng(1)
    inside: dict[int, list[tuple[int, int]]] = {}
    for i in range(2000):
        if inside and rng.random() < 0.48:
            place = int(rng.choice(list(inside)))
            core.abort(place, 0.0)
            del inside[place]
        prompt = int(rng.integers(1, 60))
        names = [1000 * i + j for j in range(prompt // 4)]
        place = core.come((prompt, 1, 0, -1), names, 0.0, float(i), 0.0)
        assert place not in inside
        # what content names is below 0, and block j is named `first_name + j`
        inside[place] = [(-1 - name - j, 4 * (j + 1)) for j, name in enumerate(names)]
        if i % 100 == 99:
            assert {p: rows_of(core, p) for p in inside} == inside
    assert len(inside) > 500  # there was room for 64 at first
    assert core.num_waiting == len(inside)


def test_rows_of_those_that_left_are_used_again(core):
    for i in range(5000):
        place = core.come((40, 1, 0, -1), list(range(10)), 0.0, float(i), 0.0)
        core.abort(place, 0.0)
    assert core._state.segment.shape[1] <= 40
    assert core._state.request.shape[1] == 64


def test_all_that_there_is_of_requests_grows_with_them(core):
    before = {name: array.shape for name, array in core._state._asdict().items()}
    num_places = before["request"][1]
    for i in range(num_places + 1):
        core.come((5, 1, 0, -1), [i], 0.0, float(i), 0.0)
    grown = {n for n, array in core._state._asdict().items() if array.shape != before[n]}
    assert core._state.request.shape[1] == 2 * num_places
    # no other array has as many rows as there were places for requests, and stayed so
    tied = {n for n, shape in before.items() if len(shape) > 1 and shape[1] >= num_places}
    assert tied - {"itl_count"} <= grown
