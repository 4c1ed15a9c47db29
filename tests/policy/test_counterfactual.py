"""What a teacher says of all choices, against sums by hand and against playing them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType, SloClass
from servegym.cluster.state import DECISION, FAULT_SLOW, OBSERVED_WHAT_IF_ADDED
from servegym.policy.contract import Group
from servegym.policy.counterfactual import Teacher, Worth, due
from servegym.policy.drawn_lengths import Lengths, lengths_of
from servegym.policy.observe import observe_batch
from servegym.workloads.table import RequestTable

from ..toys import token_grid  # noqa: TID252 - tests are no package

#: A step lasts 10 ms and 1 ms for each token in it.
GRID = token_grid(0.01, 0.001)
#: Predictions are right.
EXACT = Lengths(np.empty(0), np.ones((1, 1)))
LATENCY = Worth(num_samples=1, second=1.0, in_time=0.0, stretch=1.0, softness=0.1, prefix_price=0.0)
ROWS = [(0.0, 50, 40), (0.0, 50, 60), (0.0, 30, 90), (0.2, 50, 20)]


def fleet(requests, speeds, *, predicted=None, segments=None, reject=False, **more) -> Simulator:
    """Make replicas for rows of (arrival_s, prompt, output tokens)."""
    arrival_s, prompt, output = map(np.array, zip(*requests, strict=True))
    predicted = np.array(output if predicted is None else predicted, float)
    table = RequestTable.build(
        arrival_s, prompt, output, predicted_output_tokens=predicted, **(segments or {})
    )
    engine = ReplicaType("toy", GRID, 1000, max_num_seqs=8)
    spec = ClusterSpec((engine,), prefix_caching=segments is not None, allow_reject=reject)
    limits = more.pop("limits", None)
    if limits:
        spec = replace(spec, slo_classes=(SloClass("only", *limits, 1.0),))
    fate = more.pop("faults", None) or Faults()
    speeds = np.array(speeds, float)
    return Simulator(spec, [Episode(table, np.zeros(len(speeds), np.int16), speeds, fate)])


def follow(simulator: Simulator, actions) -> Simulator:
    """Take some decisions and stop at the one after them."""
    for action in actions:
        assert simulator.advance()[0] == DECISION
        simulator.apply(np.array([action]))
    assert simulator.advance()[0] == DECISION
    return simulator


def values(simulator: Simulator, worth=LATENCY, lengths=EXACT, key=7) -> np.ndarray:
    return Teacher(lengths, worth).values(simulator, due(simulator), key)[0]


def test_with_lengths_that_are_known_it_is_the_time_that_the_planner_says_is_added():
    simulator = follow(fleet(ROWS, [1.0, 0.8, 0.5]), [0, 1, 0])
    rows = observe_batch(simulator, Group.COUNTERS | Group.WHAT_IF)[0].replicas[0]
    np.testing.assert_allclose(values(simulator)[:3], -rows[OBSERVED_WHAT_IF_ADDED])


def test_added_time_by_hand():
    # Alone the first takes 60 + 3 * 11 = 93 ms. Together: 10 + 100 ms of prefill, 3 steps of 12
    # ms: 146 ms each. Added: 2 * 146 - 93 = 199 ms. On the empty one 60 + 33 = 93 ms.
    simulator = follow(fleet([(0.0, 50, 4), (0.0, 50, 4)], [1.0, 1.0]), [0])
    np.testing.assert_allclose(values(simulator)[:2], [-0.199, -0.093])


def test_lengths_are_those_that_a_prediction_leaves_open():
    # predicted 10, it is 5 or 15: both are tried, 60 ms of prefill and 4 or 14 steps of 11 ms
    simulator = follow(fleet([(0.0, 50, 8)], [1.0], predicted=[10.0]), [])
    open_ones = Lengths(np.empty(0), np.array([[0.5, 1.5]]))
    got = values(simulator, LATENCY._replace(num_samples=2), open_ones)[0]
    assert got == pytest.approx(-(0.060 + 9 * 0.011))
    one = {round(values(simulator, lengths=open_ones, key=k)[0], 6) for k in range(20)}
    assert one == {-0.104, -0.214}


def test_all_choices_are_tried_on_the_same_futures():
    # two replicas alike, empty: whatever is drawn, it is drawn for both
    simulator = follow(fleet([(0.0, 50, 8)], [1.0, 1.0], predicted=[200.0]), [])
    ratios = np.sort(np.random.default_rng(0).uniform(0.1, 2.0, (1, 50)))
    drawn = [values(simulator, lengths=Lengths(np.empty(0), ratios), key=k) for k in range(8)]
    assert len({v[0] for v in drawn}) > 4
    assert all(v[0] == v[1] for v in drawn)


def test_true_lengths_and_later_arrivals_are_not_known():
    def of(rows) -> np.ndarray:
        predicted = [40, 60, 90, 20, 9][: len(rows)]
        simulator = fleet(rows, [1.0, 0.8], predicted=predicted)
        return values(follow(simulator, [0, 1, 0]))[:2]

    longer = [(t, prompt, 3 * output) for t, prompt, output in ROWS]
    np.testing.assert_array_equal(of(longer), of(ROWS))
    np.testing.assert_array_equal(of([*ROWS, (0.21, 900, 50)]), of(ROWS))


def test_the_speed_that_a_replica_has_now_is_known():
    slow = Faults(
        np.array([0.1]), np.array([1], np.int16), np.array([FAULT_SLOW], np.int8), np.array([0.5])
    )
    rows = [(0.2, 50, 20)]
    np.testing.assert_allclose(
        values(follow(fleet(rows, [1.0, 1.0], faults=slow), []))[:2],
        values(follow(fleet(rows, [1.0, 0.5]), []))[:2],
    )


def test_the_price_is_on_prefill_that_no_cache_saves_beside_others():
    # the first 64 tokens are those of the request before, which is still there, and so is another
    segments = {"prefix_offsets": range(4), "prefix_keys": [3] * 3, "prefix_ends": [64] * 3}
    rows = [(0.0, 65, 400), (0.1, 65, 400), (0.5, 100, 20)]
    simulator = follow(fleet(rows, [1.0, 1.0], segments=segments), [0, 0])
    free, paid = values(simulator), values(simulator, LATENCY._replace(prefix_price=3.0))
    rate = simulator.params.nominal[0, 1]
    assert free[0] - paid[0] == pytest.approx(3.0 * 2 * (100 - 64) / rate)
    assert paid[1] == free[1]  # nobody is there
    both = values(simulator, LATENCY._replace(prefix_price=1.0, prefill_price=2.0))
    np.testing.assert_allclose(both, paid)


def test_memory_has_a_price_while_others_are_there():
    # as by hand above: after its first token it holds 54 of 16,000 tokens for 3 steps of 12 ms
    simulator = follow(fleet([(0.0, 50, 4), (0.0, 50, 4)], [1.0, 1.0]), [0])
    free, paid = values(simulator), values(simulator, LATENCY._replace(memory_price=2000.0))
    assert free[0] - paid[0] == pytest.approx(2000.0 * 54 / 16_000 * 0.036)
    assert paid[1] == free[1]  # nobody is there


def test_who_leaves_or_waits_is_no_gain_where_times_are_judged():
    got = values(follow(fleet(ROWS, [1.0, 0.5], reject=True), [0, 1, 0]))
    assert got[2] == got[3] == got[:2].min()


def judged(limits, **worth) -> np.ndarray:
    """Two requests of 50 + 4 tokens at once, as in the sums by hand above; one may be rejected."""
    rows = [(0.0, 50, 4), (0.0, 50, 4)]
    simulator = follow(fleet(rows, [1.0, 0.5], reject=True, limits=limits), [0])
    hard = LATENCY._replace(second=0.0, in_time=1.0, softness=1e-4)
    return values(simulator, hard._replace(**worth))


@pytest.mark.parametrize(
    ("limits", "stretch", "want"),
    [
        # Replica 0: both have their first tokens after 110 ms, then one each 12 ms. Replica 1,
        # empty and half as fast: after 120 ms, then one each 22 ms. The first alone: 60 ms, 11 ms.
        ((1.0, 1.0), 1.0, [1, 1, 0, 0]),
        ((0.115, 1.0), 1.0, [1, 0, 0, 0]),
        ((0.115, 0.0125), 1.0, [1, 0, 0, 0]),
        # above 11 but not 12 ms a token: on replica 0 the new one fails, and so does the one there
        ((0.115, 0.0115), 1.0, [-1, 0, -1, 0]),
        # as if all took 1.1 times as long, 121 and 132 ms, and 66 ms alone
        ((0.115, 1.0), 1.1, [-1, 0, -1, 0]),
        ((0.125, 1.0), 1.1, [1, 0, 0, 0]),
    ],
)
def test_limits_met_and_broken_by_hand(limits, stretch, want):
    np.testing.assert_allclose(judged(limits, stretch=stretch), want, atol=1e-12)


def test_time_has_its_price_beside_limits():
    got = judged((0.115, 1.0), second=0.5)
    np.testing.assert_allclose(got[:2], [1 - 0.5 * 0.199, -0.5 * (0.120 + 3 * 0.022)])
    assert got[3] == 0.0


def test_soft_limits_count_by_degrees():
    # 110 ms of 200: 0.45 below the limit, at a softness of 0.15 three times that
    got = judged((0.2, math.inf), softness=0.15)[0]
    one = 1.0 / (1.0 + math.exp(-3.0))
    before = 1.0 / (1.0 + math.exp((60 / 200 - 1) / 0.15))
    assert got == pytest.approx(2 * one - before)


def test_threads_and_other_environments_change_nothing():
    rng = np.random.default_rng(5)
    rows = [(0.03 * i, int(rng.integers(1, 90)), int(rng.integers(2, 90))) for i in range(12)]
    lengths = lengths_of(np.full(64, 40.0), rng.uniform(5, 90, 64))
    one = follow(fleet(rows, [1.0, 0.6]), [0, 1] * 5)
    many = Simulator(one.spec, one.episodes * 5)
    for action in [0, 1] * 5:
        many.advance()
        many.apply(np.full(5, action))
    many.advance()
    worth = LATENCY._replace(num_samples=3)
    envs = due(many)
    assert envs.tolist() == [0, 1, 2, 3, 4]
    threads = Teacher(lengths, worth, num_threads=2)
    got = threads.values(many, envs, key=4)
    threads.close()
    np.testing.assert_array_equal(got, Teacher(lengths, worth).values(many, envs, key=4))
    np.testing.assert_array_equal(got[0], values(one, worth, lengths, key=4))
    assert len(np.unique(got[:, 0])) == 5  # each environment has futures of its own
    assert (got != Teacher(lengths, worth).values(many, envs, key=5)).any()
