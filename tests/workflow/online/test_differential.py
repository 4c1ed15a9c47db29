"""The compiled online simulator does what the plain one does, stage by stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numba import njit

from servegym.workflow.online.kernels import next_event_s
from servegym.workflow.online.reference import ReferenceSimulator
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import DECISION, DONE

from ...random_blocks import blocks  # noqa: TID252 - tests are no package
from .strategies import choose, random_case


@njit
def upcoming_s(s, e):
    return next_event_s(s, e)  # which only compiled code can call


TIMES = ("ready_s", "start_s", "begin_s", "finish_s")


def play_reference(spec, episode, asks):
    sim = ReferenceSimulator(spec, episode, asks_when_ready=asks)
    seen = []

    def decide(s):
        startable = s.startable()
        seen.append((s.now_s, startable, [q.number for q in s.fresh]))
        return choose(len(seen), startable, math.isfinite(s.next_event_s()))

    sim.run(decide)
    return sim, seen


def play_compiled(spec, episode, asks):
    sim = Simulator(spec, [episode])
    sim.state.env["asks_when_ready"] = asks
    seen = []
    while sim.advance()[0] == DECISION:
        env = sim.state.env[0]
        startable = sim.startable().tolist()
        fresh = sim.state.fresh[0, : env["num_fresh"]].tolist()
        seen.append((float(env["now_s"]), startable, fresh))
        may_wait = math.isfinite(upcoming_s(sim.state, 0))
        sim.apply(np.array([choose(len(seen), startable, may_wait)]))
    assert sim.reasons[0] == DONE
    return sim, seen


def assert_equal(seed: int) -> None:
    spec, episode = random_case(seed)
    asks = bool(seed % 3 == 0)
    slow, slow_seen = play_reference(spec, episode, asks)
    fast, fast_seen = play_compiled(spec, episode, asks)
    assert [x[1:] for x in fast_seen] == [x[1:] for x in slow_seen]
    np.testing.assert_allclose(
        [x[0] for x in fast_seen], [x[0] for x in slow_seen], rtol=1e-9, atol=1e-12
    )
    for got, want in ((fast.stages(), slow.stage_outcomes()), (fast.jobs(), slow.job_outcomes())):
        for column in want.dtype.names:
            if column in TIMES:
                np.testing.assert_allclose(
                    got[column], want[column], rtol=1e-9, atol=1e-12, err_msg=column
                )
            else:
                np.testing.assert_array_equal(got[column], want[column], err_msg=column)
    env = fast.state.env[0]
    for name in ("area", "weighted_area", "good"):
        np.testing.assert_allclose(float(env[name]), getattr(slow, name), rtol=1e-9, atol=1e-12)
    for name in ("busy_s", "slot_s"):
        want = [getattr(device, name) for device in slow.devices]
        np.testing.assert_allclose(fast.devices()[name], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", blocks(10))
def test_compiled_and_plain_simulator_agree_on_random_jobs(block):
    for seed in range(40 * block, 40 * block + 40):
        assert_equal(seed)
