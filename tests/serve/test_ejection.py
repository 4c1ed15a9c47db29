"""Who is left alone for what became of requests, and who is not: the rules, without a network."""

from __future__ import annotations

import random

import pytest

from servegym.serve.router.config import HealthConfig
from servegym.serve.router.ejection import Ejection
from servegym.serve.router.retry_budget import RetryBudget


class Fleet:
    """Replicas whose requests a test plays."""

    def __init__(self, num_replicas: int = 4, **config):
        self.now_s = 100.0
        self.up = list(range(num_replicas))
        self.ejection = Ejection(
            HealthConfig(**config),
            [f"r{i}" for i in range(num_replicas)],
            lambda: self.now_s,
            lambda replica: self.up,
            lambda: None,
        )
        for replica in range(num_replicas):
            self.ejection.add(replica)

    def good(self, replica: int, stream: bool = True) -> None:
        attempt = self.ejection.begin(replica, stream=stream)
        self.ejection.first_token(attempt)
        self.ejection.whole(attempt)
        self.ejection.end(attempt)

    def bad(self, replica: int) -> None:
        """Fail a request that another replica answers."""
        attempt = self.ejection.begin(replica, stream=True)
        self.ejection.end(attempt)
        self.ejection.failed(attempt)

    def later(self, seconds: float) -> None:
        self.now_s += seconds
        self.ejection.look()

    def out(self) -> set[int]:
        return set(self.ejection.out(self.now_s))

    def __getitem__(self, replica: int):
        return self.ejection.standings[replica]


def test_one_replica_that_fails_what_others_answer_is_out():
    fleet = Fleet()
    for _ in range(3):
        for replica in (1, 2, 3):
            fleet.good(replica)
        assert fleet.out() == set()
        fleet.bad(0)
    assert fleet.out() == {0}


def test_a_fleet_that_fails_alike_keeps_all_its_replicas():
    rng = random.Random(0)
    fleet = Fleet()
    for _ in range(2000):
        replica = rng.randrange(4)
        (fleet.bad if rng.random() < 0.6 else fleet.good)(replica)
        fleet.later(0.01)
    assert sum(fleet[r].num_ejections for r in range(4)) <= 20  # chance, not a rule
    steady = Fleet()
    for i in range(2000):
        (steady.bad if i // 4 % 2 else steady.good)(i % 4)
        steady.later(0.01)
    assert all(steady[r].num_ejections == 0 for r in range(4))


def test_a_few_failures_among_many_good_answers_are_no_reason():
    fleet = Fleet()
    for i in range(400):
        (fleet.bad if i % 10 == 0 else fleet.good)(0)
        for replica in (1, 2, 3):
            fleet.good(replica)
    assert fleet[0].num_ejections == 0


def test_old_failures_are_forgotten():
    fleet = Fleet(window_s=10.0)
    for _ in range(10):
        fleet.bad(0)
        fleet.later(6.0)
    assert fleet[0].num_ejections == 0


def test_two_of_four_may_be_out_and_one_of_two_and_none_of_one():
    for num_replicas, most in ((1, 0), (2, 1), (3, 1), (4, 2), (8, 4)):
        fleet = Fleet(num_replicas)
        assert sum(fleet.ejection.may_be_out(k, num_replicas) for k in range(9)) == most
    assert not Fleet(4, max_ejected_share=0.0).ejection.may_be_out(0, 4)


class TestTrial:
    def ejected(self) -> Fleet:
        fleet = Fleet(eject_s=5.0, max_eject_s=30.0)
        for _ in range(3):
            fleet.bad(0)
        assert fleet.out() == {0}
        return fleet

    def test_one_request_at_a_time_until_one_succeeds(self):
        fleet = self.ejected()
        fleet.later(4.9)
        assert fleet.out() == {0}
        fleet.later(0.2)
        assert fleet.out() == set()
        first = fleet.ejection.begin(0, stream=True)
        assert first.is_trial
        assert fleet.out() == {0}
        fleet.ejection.end(first)  # its client has left: nothing is known
        assert fleet.out() == set()
        second = fleet.ejection.begin(0, stream=True)
        fleet.ejection.first_token(second)
        assert fleet.out() == set()
        third = fleet.ejection.begin(0, stream=True)
        assert not third.is_trial

    def test_each_failure_doubles_the_wait_and_a_whole_answer_ends_that(self):
        fleet = self.ejected()
        waits = []
        for _ in range(5):
            waits.append(fleet[0].eject_s)
            fleet.later(fleet[0].eject_s + 0.1)
            fleet.bad(0)
        assert waits == [5.0, 10.0, 20.0, 30.0, 30.0]
        fleet.later(31.0)
        fleet.good(0)
        fleet.bad(0)  # one failure is none again
        assert fleet.out() == set()

    def test_what_was_sent_before_says_nothing_of_the_time_after(self):
        fleet = Fleet(eject_s=5.0)
        old = [fleet.ejection.begin(0, stream=True) for _ in range(6)]
        for attempt in old[:3]:
            fleet.ejection.failed(attempt)
        assert fleet[0].num_ejections == 1
        fleet.later(5.1)
        for attempt in old[3:]:
            fleet.ejection.failed(attempt)
            fleet.ejection.end(attempt)
        assert fleet[0].num_ejections == 1


class TestSilence:
    def test_a_replica_that_owes_tokens_and_sends_none_is_out_until_it_does(self):
        fleet = Fleet(silent_after_s=10.0)
        attempt = fleet.ejection.begin(0, stream=True)
        fleet.ejection.first_token(attempt)
        attempt.waits(fleet.now_s)
        fleet.later(9.0)
        assert fleet.out() == set()
        fleet.later(1.0)
        assert fleet.out() == {0}
        fleet.later(100.0)
        assert fleet.out() == {0}  # however long: it still owes
        attempt.has_got(fleet.now_s)
        fleet.later(0.1)
        assert fleet.out() == set()
        assert not fleet[0].on_trial

    def test_when_its_streams_are_gone_it_is_tried_with_one(self):
        fleet = Fleet(silent_after_s=10.0, eject_s=5.0)
        attempt = fleet.ejection.begin(0, stream=True)
        fleet.later(10.0)
        assert fleet.out() == {0}
        fleet.ejection.end(attempt)
        fleet.later(5.0)
        assert fleet[0].on_trial
        assert fleet.ejection.passed_over(stream=False) == [0]  # no one would notice
        assert fleet.ejection.passed_over(stream=True) == []

    def test_a_slow_client_is_not_a_silent_replica(self):
        fleet = Fleet(silent_after_s=10.0)
        attempt = fleet.ejection.begin(0, stream=True)
        fleet.ejection.first_token(attempt)  # and now the client takes nothing
        fleet.later(50.0)
        assert fleet.out() == set()
        attempt.waits(fleet.now_s)
        fleet.later(9.0)
        assert fleet.out() == set()
        fleet.later(1.0)
        assert fleet.out() == {0}

    def test_long_answers_that_are_not_streamed_are_no_silence(self):
        fleet = Fleet(silent_after_s=10.0)
        whole = fleet.ejection.begin(0, stream=False)
        fleet.later(1000.0)
        assert fleet.out() == set()
        queued = fleet.ejection.begin(0, stream=True)  # waits behind it
        fleet.later(100.0)
        assert fleet.out() == set()
        for attempt in (whole, queued):
            fleet.ejection.end(attempt)
        assert (fleet[0].streams, fleet[0].owing, fleet[0].wholes) == (0, 0, 0)


def test_a_full_replica_is_passed_over_for_as_long_as_it_says():
    fleet = Fleet(max_busy_s=10.0)
    for said_s, left_s in ((None, 1.0), (3.0, 3.0), (3600.0, 10.0)):
        fleet.ejection.busy(2, said_s)
        fleet.now_s += left_s - 0.01
        assert fleet.ejection.passed_over(stream=True) == [2]
        fleet.now_s += 0.02
        assert fleet.ejection.passed_over(stream=True) == []
    assert fleet.out() == set()


class TestBudget:
    def budget(self, share=0.2, reserve=0):
        self.now_s = 0.0
        return RetryBudget(share, reserve, lambda: self.now_s)

    def test_retries_are_a_share_of_the_requests_and_a_reserve(self):
        budget = self.budget(reserve=3)
        for _ in range(50):
            budget.request()
        assert sum(budget.take(0) for _ in range(100)) == 13
        assert budget.num_denied == 87

    def test_it_looks_back_ten_seconds(self):
        budget = self.budget()
        for _ in range(50):
            budget.request()
        assert sum(budget.take(0) for _ in range(100)) == 10
        self.now_s = 10.0
        assert not budget.take(0)
        assert budget.take(100)  # what is in progress counts, however old

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_shares(self, share):
        budget = self.budget(share=share)
        for _ in range(10):
            budget.request()
        assert sum(budget.take(0) for _ in range(100)) == 10 * share
