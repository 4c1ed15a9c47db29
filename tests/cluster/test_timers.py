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
    ARRIVAL,
    DECISION,
    DONE,
    DOWN,
    FAULT,
    NEVER,
    NOBODY,
    PREEMPT,
    TICK,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.cluster.timers import remove_timer, set_timer
from servegym.errors import InvalidAction

from .strategies import choose, random_case
from .test_toys import replica_type, toy_cluster, toy_episode

CAPACITY = 40
FIELDS = ("time_s", "kind", "order", "subject")


@kernel
def set_one(s, time_s, kind, order, subject):
    set_timer(s, 0, time_s, kind, order, subject)


@kernel
def remove_one(s, place):
    remove_timer(s, 0, place)


@pytest.fixture(scope="module")
def state():
    return Simulator(toy_cluster(), [toy_episode([(1.0, 1, 1)] * (CAPACITY - 2))]).state


#: A timer to set, by time and kind; or which of those that are set to remove, None: the first due.
actions = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(FAULT, ARRIVAL))
    | st.none()
    | st.integers(0, CAPACITY),
    max_size=3 * CAPACITY,
)


@settings(max_examples=300, deadline=None)
@given(actions)
def test_timers_come_out_by_time_then_kind_then_order_whichever_are_removed(state, steps):
    state.env["num_timers"] = 0
    state.request["timer_pos"] = -1
    inside: list[tuple[float, int, int, int]] = []
    unused = list(range(CAPACITY - 2))  # requests without a timer
    for order, step in enumerate(steps):
        if isinstance(step, tuple) and unused:
            inside.append((*step, order, unused.pop()))
            set_one(state, *inside[-1])
        elif inside and not isinstance(step, tuple):
            inside.sort()
            of_requests = [one for one in inside if one[1] > TICK]
            gone = inside[0]
            if step is not None and of_requests:
                gone = of_requests[step % len(of_requests)]
            place = 0 if gone == inside[0] else int(state.request[0, gone[3]]["timer_pos"])
            remove_one(state, place)
            inside.remove(gone)
            unused.append(gone[3])
        timers = state.timer[0, : state.env[0]["num_timers"]]
        listed = [tuple(one[name].item() for name in FIELDS) for one in timers]
        assert sorted(listed) == sorted(inside)
        assert not listed or listed[0] == min(inside)
        places = {one[3]: i for i, one in enumerate(listed) if one[1] > TICK}
        for request in range(CAPACITY - 2):
            assert state.request[0, request]["timer_pos"] == places.get(request, -1)


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
