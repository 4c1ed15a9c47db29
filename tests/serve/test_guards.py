"""The circuit breaker opens after a few faults and closes after a row of good decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.serve.guards import BreakerConfig, Circuit, CircuitBreaker

CONFIG = BreakerConfig(
    window_decisions=10, open_faults=3, cooldown_s=10.0, max_cooldown_s=30.0, close_successes=2
)


def opened(at_s: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(CONFIG)
    for _ in range(3):
        breaker.record(True, at_s)
    return breaker


def test_opens_at_the_third_fault_of_ten():
    breaker = CircuitBreaker(CONFIG)
    for fault in (True, False, True, False):
        breaker.record(fault, 0.0)
    assert breaker.state(0.0) is Circuit.CLOSED
    breaker.record(True, 0.0)
    assert breaker.state(0.0) is Circuit.OPEN
    assert breaker.num_opened == 1


def test_old_faults_leave_the_window():
    breaker = CircuitBreaker(CONFIG)
    breaker.record(True, 0.0)
    breaker.record(True, 0.0)
    for _ in range(9):
        breaker.record(False, 0.0)
    breaker.record(True, 0.0)  # the first fault has left, the second is the oldest of ten
    assert breaker.state(0.0) is Circuit.CLOSED
    breaker.record(True, 0.0)
    assert breaker.state(0.0) is Circuit.CLOSED
    breaker.record(True, 0.0)
    assert breaker.state(0.0) is Circuit.OPEN


def test_goes_on_trial_after_the_cooldown_and_closes_after_two_good_decisions():
    breaker = opened()
    assert breaker.state(9.9) is Circuit.OPEN
    assert breaker.state(10.0) is Circuit.HALF_OPEN
    breaker.record(False, 10.0)
    assert breaker.state(10.0) is Circuit.HALF_OPEN
    breaker.record(False, 10.0)
    assert breaker.state(10.0) is Circuit.CLOSED


def test_a_fault_on_trial_opens_it_for_twice_as_long_up_to_the_longest():
    breaker = opened()
    now_s = 10.0
    for wait_s in (20.0, 30.0, 30.0):
        assert breaker.state(now_s) is Circuit.HALF_OPEN
        breaker.record(True, now_s)
        assert breaker.state(now_s + wait_s - 0.1) is Circuit.OPEN
        now_s += wait_s
    assert breaker.num_opened == 4


def test_closing_forgets_the_faults_and_the_long_cooldown():
    breaker = opened()
    breaker.state(10.0)
    breaker.record(True, 10.0)
    breaker.state(30.0)
    breaker.record(False, 30.0)
    breaker.record(False, 30.0)
    breaker.record(True, 31.0)
    breaker.record(True, 31.0)
    assert breaker.state(31.0) is Circuit.CLOSED
    breaker.record(True, 31.0)
    assert breaker.state(40.9) is Circuit.OPEN
    assert breaker.state(41.0) is Circuit.HALF_OPEN


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=200))
def test_never_closes_without_its_row_of_good_decisions(steps):
    breaker = CircuitBreaker(CONFIG)
    now_s, good = 0.0, 0
    before = breaker.state(now_s)
    for fault, wait_s in steps:
        now_s += wait_s
        state = breaker.state(now_s)
        if state is Circuit.OPEN:
            good = 0
            continue  # an open breaker's policy is not asked
        breaker.record(fault, now_s)
        good = 0 if fault else good + 1
        after = breaker.state(now_s)
        if state is Circuit.HALF_OPEN and after is Circuit.CLOSED:
            assert good >= CONFIG.close_successes
        if after is Circuit.OPEN:
            assert fault
        before = after
    assert before in Circuit


@pytest.mark.parametrize("name", ["window_decisions", "open_faults", "cooldown_s"])
def test_limits_must_be_above_zero(name):
    with pytest.raises(ValueError, match=name):
        BreakerConfig(**{name: 0})
