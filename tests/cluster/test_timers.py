"""The heap of timers, and who is asked for what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.cluster.jit import kernel
from servegym.cluster.kernels import may_answer
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    ADMIT,
    ALWAYS,
    DECISION,
    DONE,
    DOWN,
    NEVER,
    NOBODY,
    PREEMPT,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.cluster.timers import drop_first_timer, set_timer
from servegym.errors import InvalidAction

from .strategies import choose, random_case
from .test_toys import replica_type, toy_cluster, toy_episode

CAPACITY = 40


@kernel
def set_one(s, time_s, kind, order, subject):
    set_timer(s, 0, time_s, kind, order, subject)


@kernel
def drop_one(s):
    drop_first_timer(s, 0)


@pytest.fixture(scope="module")
def state():
    return Simulator(toy_cluster(), [toy_episode([(1.0, 1, 1)] * (CAPACITY - 2))]).state


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.none() | st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4)),
        max_size=CAPACITY,
    )
)
def test_timers_come_out_by_time_then_kind_then_order(state, steps):
    state.env["num_timers"] = 0
    inside: list[tuple[float, int, int, int]] = []
    for order, step in enumerate(steps):
        if step is not None:
            inside.append((*step, order, 1000 + order))
            set_one(state, *inside[-1])
        elif inside:
            first = state.timer[0, 0]
            assert min(inside) == tuple(
                first[name].item() for name in ("time_s", "kind", "order", "subject")
            )
            inside.remove(min(inside))
            drop_one(state)
        assert state.env[0]["num_timers"] == len(inside)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_shown_as_allowed_is_what_is_allowed(seed):
    # capacities differ by type, lengths by request, and replicas fail and recover
    spec, episode = random_case(seed)
    sim = Simulator(spec, [episode], max_replicas=6)
    visits: dict[int, int] = {}
    while sim.advance()[0] == DECISION:
        request = int(sim.state.env[0]["deciding"])
        shown = sim.state.allowed[0].tolist()
        need = episode.table.prompt_tokens[request] + episode.table.output_tokens[request] - 1
        mine = [False] * 6 + [spec.allow_hold, spec.allow_reject]
        for r, kind in enumerate(episode.type_idx.tolist()):
            capacity = spec.types[kind].capacity_tokens(spec.block_size)
            mine[r] = sim.state.replica[0, r]["mode"] != DOWN and need <= capacity
        assert shown == mine
        taken = [may_answer(sim.params, sim.state, 0, action) for action in range(-3, 11)]
        assert taken == [False] * 3 + mine + [False] * 3
        assert sum(shown[:6]) == sim.state.env[0]["num_allowed"] > 0
        visits[request] = visits.get(request, -1) + 1
        sim.apply(np.array([choose(request, visits[request], shown)]))
    assert visits


def test_a_dispatch_that_is_not_asked_for_goes_where_fewest_run_and_wait():
    # two on each of two replicas; waiting ones count four times, the first of equals is taken
    spec = toy_cluster()
    episode = toy_episode([(0.0, 10, 5)] * 4, type_idx=[0, 0])
    sim = Simulator(spec, [episode], asks=Asks(dispatch=NEVER))
    assert sim.advance()[0] == DONE
    assert sim.outcomes()["replica"].tolist() == [0, 1, 0, 1]


def picking(**asks: int) -> Simulator:
    """An engine with two sequence slots and four requests."""
    spec = toy_cluster(replace(replica_type(seqs=2), engine="vllm-priority"))
    episode = toy_episode([(0.0, 10, 3)] * 4)
    return Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER, **asks))


def test_a_pick_must_be_one_of_those_that_wait_there():
    sim = picking(admit=WHERE_IT_MATTERS, preempt=WHERE_IT_MATTERS)
    assert sim.advance()[0] == DECISION
    env = sim.state.env[0]
    assert (env["decision"], env["deciding"], env["asking"]) == (ADMIT, -1, 0)
    for wrong in (7, -1, NOBODY):
        with pytest.raises(InvalidAction, match=r"choose one of \[0, 1, 2, 3\] \(requests"):
            sim.apply(np.array([wrong]))
    sim.apply(np.array([2]))
    assert sim.advance()[0] == DECISION
    with pytest.raises(InvalidAction, match=r"choose one of \[0, 1, 3\]"):
        sim.apply(np.array([2]))
    sim.apply(np.array([3]))
    while sim.advance()[0] == DECISION:
        sim.apply(np.array([0]))
    assert np.argsort(sim.outcomes()["scheduled_s"], kind="stable").tolist() == [2, 3, 0, 1]


def test_nobody_is_an_answer_only_where_it_is_allowed_and_somebody_runs():
    sim = picking(admit=ALWAYS, preempt=WHERE_IT_MATTERS)
    assert sim.advance()[0] == DECISION
    with pytest.raises(InvalidAction):
        sim.apply(np.array([NOBODY]))
    sim.apply(np.array([0]))
    assert sim.advance()[0] == DECISION
    sim.apply(np.array([NOBODY]))
    assert sim.advance()[0] == DECISION
    assert sim.state.env[0]["now_s"] > 1.0
    assert sim.state.env[0]["decision"] != PREEMPT
