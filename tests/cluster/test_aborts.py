"""Aborts in the compiled core, on an engine whose steps can be counted on fingers."""

from __future__ import annotations

import math

import pytest

from servegym.cluster.spec import ReplicaType
from servegym.cluster.state import EV_FINISH
from servegym.engines import EngineName
from servegym.serve.engine.core import EngineCore, Noise

from ..toys import token_grid  # noqa: TID252 - tests are no package


def make_core(
    blocks: int, seqs: int, *, caching: bool = True, engine: EngineName = "vllm"
) -> EngineCore:
    kind = ReplicaType("toy", token_grid(0.0, 1.0), blocks, 16, seqs, engine=engine)
    return EngineCore(
        kind,
        block_size=2,
        prefix_caching=caching,
        chunked_prefill=True,
        speed=1.0,
        noise=Noise(),
    )


def come(
    core: EngineCore, prompt: int, output: int, now_s: float, text: int, key: float = 0.0
) -> int:
    """Let a request arrive whose blocks are like those of all requests of the same text."""
    names = [100 * text + j for j in range((prompt + output - 1) // 2)]
    return core.come((prompt, output, 0, -1), names, key, now_s, now_s)


def due_s(core: EngineCore) -> float:
    return core.foresee(core.iteration)[1][-1]


def finish_times(core: EngineCore) -> dict[int, float]:
    ended = {}
    while core.foresee(core.iteration)[0]:
        for event in core.turn().events:
            if event.kind == EV_FINISH:
                ended[event.request] = event.time_s
    return ended


@pytest.mark.parametrize("caching", [True, False])
def test_abort_in_a_stretch_frees_blocks_at_once_and_shortens_the_steps_after_it(caching):
    core = make_core(20, 4, caching=caching)
    a, b = come(core, 2, 5, 0.0, 1), come(core, 2, 9, 0.0, 2)
    core.turn()  # both prompts: 4 tokens, 4 s
    core.turn()  # 2 tokens a step: at 6, 8, 10 and 12 s; then b has 4 more tokens to come
    assert due_s(core) == 12.0
    assert core.held_blocks(core.iteration) == 4  # 3 tokens each, in the first of these steps
    core.abort(a, 8.5)  # two steps have ended, the third takes 2 s all the same
    assert core.num_running == 1
    assert core.held_blocks(core.iteration) == 3  # b: 5 tokens
    assert due_s(core) == 10.0
    # b had 4 of its 9 tokens at 10 s; the others come one a second
    assert finish_times(core) == {b: 15.0}
    assert core.held_blocks(core.iteration) == 0


def test_abort_of_the_only_request_lets_its_step_end_and_the_engine_be_idle():
    core = make_core(20, 4)
    only = come(core, 3, 5, 0.0, 1)
    core.turn()
    core.abort(only, 1.0)  # in its prefill, which takes 3 s
    assert (core.num_running, core.held_blocks(core.iteration)) == (0, 0)
    assert due_s(core) == 3.0
    assert core.turn().computed == []
    assert core.foresee(core.iteration)[0] == 0
    only = come(core, 3, 5, 4.0, 2)
    core.turn()
    core.turn()
    core.abort(only, 8.5)  # decoding
    assert due_s(core) == 9.0
    core.turn()
    assert core.foresee(core.iteration)[0] == 0


def test_abort_of_the_head_of_the_queue_lets_those_behind_it_in_after_the_step():
    core = make_core(6, 4)
    a = come(core, 6, 6, 0.0, 1)
    core.turn()
    big, small = come(core, 8, 2, 1.0, 2), come(core, 2, 1, 1.0, 3)
    core.turn()  # at 6 s: a decodes, 7 tokens in 4 blocks; big needs 4 of 2
    assert core.num_waiting == 2
    assert due_s(core) == 11.0  # to the end of a: nothing lets big in before
    core.abort(big, 6.5)
    assert (core.num_waiting, due_s(core)) == (1, 7.0)
    # from 7 s on a step of one decode and two tokens of prompt
    assert finish_times(core) == {small: 10.0, a: 13.0}


@pytest.mark.parametrize("first", [True, False])
def test_abort_of_a_request_that_the_step_leaves_out_lets_the_other_go_on_after_it(first):
    core = make_core(6, 4, caching=False, engine="vllm-priority")
    z, a = come(core, 2, 5, 0.0, 1), come(core, 3, 5, 0.0, 2, key=5.0)
    core.turn()  # 5 tokens
    b, c = come(core, 2, 5, 1.0, 3), come(core, 2, 5, 1.0, 4)
    core.turn()  # at 5 s: two decodes, 4 tokens of prompts; then all 6 blocks are held
    # at 11 s z needs no block; a does, and as the least urgent gives way: b and c get no turn
    assert core.turn().skipped == [b, c]
    assert due_s(core) == 12.0
    gone, stays = (b, c) if first else (c, b)
    core.abort(gone, 11.5)
    assert core.held_blocks(core.iteration) == 3
    assert due_s(core) == 12.0
    # two at a time to 16 s, where z ends; one and a's 5 tokens to 22 s; both to 24 s; a to 25 s
    assert finish_times(core) == {z: 16.0, stays: 24.0, a: 25.0}
    assert core.held_blocks(core.iteration) == 0


def test_text_of_an_aborted_request_is_found_as_far_as_it_was_computed():
    core = make_core(20, 4)
    a = come(core, 4, 9, 0.0, 7)
    core.turn()
    core.turn()
    core.abort(a, 6.5)  # decoding since 4 s: 6 tokens computed, 3 blocks full
    b = come(core, 9, 1, 6.5, 7)
    ended = finish_times(core)
    # a's step ends at 7 s; of b's 9 tokens 6 are there
    assert ended == {b: 10.0}


def test_place_that_is_used_again_finds_no_text_of_the_request_before():
    core = make_core(20, 4)
    first = come(core, 8, 3, 0.0, 1)
    assert finish_times(core) == {first: 10.0}
    core.leave(first)
    again = come(core, 8, 3, 20.0, 2)
    assert again == first
    assert finish_times(core)[again] == math.nextafter(20.0, math.inf) + 10.0


def test_abort_of_what_has_ended_does_nothing():
    core = make_core(20, 4)
    one = come(core, 2, 1, 0.0, 1)
    finish_times(core)
    core.abort(one, 5.0)
    assert (core.num_running, core.num_waiting, core.held_blocks(0)) == (0, 0, 0)
    two = come(core, 2, 1, 6.0, 1)
    assert finish_times(core) == {two: math.nextafter(6.0, math.inf) + 2.0}
