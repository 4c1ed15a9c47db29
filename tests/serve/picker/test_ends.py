"""When requests count as ended whose answers nobody sees, by hand-computed times."""

from __future__ import annotations

import pytest

from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.picker.config import AssumedEndsConfig
from servegym.serve.picker.ends import AssumedEnds
from servegym.serve.requests.prediction import LengthPrediction
from servegym.serve.runtime import RuntimeConfig
from servegym.serve.state import EngineMetrics

#: A prompt of 1,000 tokens takes a second, each token of an answer 0.01 s.
RATES = Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01, kv_capacity_tokens=100_000)


class Books:
    """A dispatcher for one replica, on a clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0
        config = DispatchConfig(
            runtime=RuntimeConfig(policy="least-outstanding"),
            prediction=LengthPrediction(kind="max-tokens"),
        )
        self.dispatcher = Dispatcher(config, ["r0"], fleet_facts([RATES]), lambda: self.now_s)
        ends = AssumedEndsConfig(settle_s=0.5, forget_after_s=60.0)
        self.ends = AssumedEnds(ends, self.dispatcher)

    def send(self, key: str, max_tokens: int):
        job = self.dispatcher.arrive([7] * 1000, key=key, max_tokens=max_tokens)
        self.dispatcher.decide(job)
        self.ends.expect(job)
        return job

    def count(self, running: int, waiting: int = 0) -> None:
        metrics = EngineMetrics(running, waiting, 0.1)
        self.dispatcher.update_metrics(0, metrics, asked_s=self.now_s)

    def look(self, now_s: float) -> None:
        self.now_s = now_s
        self.ends.look()


def test_of_more_than_the_engine_has_those_that_should_be_over_first_have_ended():
    books = Books()
    long, short = books.send("long", 900), books.send("short", 100)  # over at 110 and at 102
    books.now_s = 101.0
    books.count(running=1, waiting=1)
    books.look(101.1)
    assert (short.ended, long.ended) == (False, False)
    books.count(running=1)
    books.look(101.2)
    assert (short.ended, long.ended) == (True, False)
    assert (books.ends.num_counted, books.ends.num_timed, len(books.ends)) == (1, 0, 1)
    assert books.dispatcher.state.outstanding(0) == 1


def test_an_engine_that_counted_before_a_request_could_be_there_says_nothing_of_it():
    books = Books()
    job = books.send("one", 100)
    books.now_s = 100.4
    books.count(running=0)  # within settle_s of the dispatch
    books.look(101.0)
    assert not job.ended
    books.now_s = 100.6
    books.count(running=0)
    books.look(101.1)
    assert job.ended


@pytest.mark.parametrize("counts", [False, True], ids=["never", "too old"])
def test_without_the_engines_count_known_rates_say_when_it_should_be_over(counts):
    books = Books()
    if counts:
        books.count(running=3)
    books.now_s = 200.0  # metrics count for 5 s
    job = books.send("one", 300)  # 1 s of prefill, 3 s of decoding
    books.look(203.9)
    assert not job.ended
    books.look(204.1)
    assert job.ended
    assert (books.ends.num_counted, books.ends.num_timed) == (0, 1)


def test_a_request_is_forgotten_in_the_end_whatever_the_engine_counts():
    books = Books()
    job = books.send("one", 100)
    books.now_s = 159.0
    books.count(running=1)
    books.look(159.9)
    assert not job.ended
    books.look(160.1)
    assert job.ended
    assert books.ends.num_timed == 1


def test_what_has_ended_otherwise_is_waited_for_no_longer():
    books = Books()
    job = books.send("one", 100)
    books.dispatcher.end(job, "cancelled")
    books.look(100.1)
    assert len(books.ends) == 0
    assert (books.ends.num_counted, books.ends.num_timed) == (0, 0)
    books.ends.expect(job)
    assert len(books.ends) == 0


def test_nothing_is_learned_of_lengths_from_ends_that_are_assumed():
    books = Books()
    books.send("one", 100)
    books.look(160.1)
    assert books.ends.num_timed == 1
    assert books.dispatcher.state._length_sums.sum() == 0.0
