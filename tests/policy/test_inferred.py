"""What a router infers, by hand: from engines whose steps last as long as is said here."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from servegym.cluster.entry import INFER
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType, SloClass
from servegym.cluster.state import DECISION, FAULT_SLOW
from servegym.policy.contract import (
    INFERRED,
    NUM_REQUEST_FEATURES,
    Group,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.observe import observe, observe_batch, prepare
from servegym.policy.policy import Observations
from servegym.scenario import load_scenario
from servegym.workloads.table import RequestTable

from ..toys import constant_grid, token_grid  # noqa: TID252 - tests are no package

ALL = Group.COUNTERS | Group.METRICS | Group.PREFIX | INFERRED
#: The prior: 0.1 s of steps that were as expected; memory of steps, in time that passes and in time
#: observed, and of times between tokens.
PRIOR_S, MEMORY_S, OBSERVED_MEMORY_S, ITL_MEMORY_S = 0.1, 10.0, 0.5, 2.0

#: Steps take four times as long.
SLOW = Faults(np.zeros(1), np.zeros(1, np.int16), np.array([FAULT_SLOW], np.int8), np.array([0.25]))
REJECT = 2


def toy(
    arrival_s, prompt, output, *, slo=None, faults=None, slo_class=None, predicted=None, grid=None
):
    """One replica whose steps last 0.1 s, known to do so."""
    engine = ReplicaType("toy", grid or constant_grid(0.1), 100, max_num_seqs=8)
    table = RequestTable.build(
        np.array(arrival_s),
        np.array(prompt),
        np.array(output),
        slo_class=None if slo_class is None else np.array(slo_class),
        predicted_output_tokens=None if predicted is None else np.array(predicted),
    )
    classes = slo or (SloClass("a", 1e9, 1e9),)
    spec = ClusterSpec((engine,), block_size=16, slo_classes=classes, allow_reject=True)
    return Simulator(spec, [Episode(table, np.zeros(1, np.int16), np.ones(1), faults or Faults())])


def seen_at_last(simulator: Simulator, then: int = 0) -> Observations:
    """Send the first request to the one replica, the others there or away; observe the last."""
    seen, action = None, 0
    while simulator.advance()[0] == DECISION:
        seen = observe_batch(simulator, ALL)[0]
        simulator.apply(np.array([action]))
        action = then
    assert seen is not None
    return seen


def value(seen: Observations, name: str) -> float:
    return float(seen.replicas[0, ReplicaFeature[name.upper()], 0])


def test_before_any_token_all_is_as_expected():
    seen = seen_at_last(toy([0.0], [30], [20]))
    assert value(seen, "step_time_ratio") == 1.0
    assert value(seen, "recent_itl_s") == pytest.approx(value(seen, "decode_step_s"))
    assert value(seen, "expected_tokens_left") == 0.0


def test_steps_as_expected_have_ratio_one():
    seen = seen_at_last(toy([0.0, 1.55], [30] * 2, [40] * 2))
    assert value(seen, "decode_step_s") == pytest.approx(0.1)
    assert value(seen, "step_time_ratio") == pytest.approx(1.0)
    assert value(seen, "recent_itl_s") == pytest.approx(0.1)


def test_the_ratio_is_observed_over_expected_time_of_the_steps_since_the_first_token():
    # steps take 0.4 s from the first on: tokens at 0.4, 0.8, ..., 2.0: four steps seen by 2.05 s
    seen = seen_at_last(toy([0.0, 2.05], [30] * 2, [40] * 2, faults=SLOW))
    assert value(seen, "step_time_ratio") == pytest.approx((1.6 + PRIOR_S) / (0.4 + PRIOR_S))
    assert value(seen, "recent_itl_s") == pytest.approx((1.6 + PRIOR_S) / (4 + PRIOR_S / 0.1))


def test_what_was_observed_is_forgotten_in_time():
    # the first ends at 0.4 * 5 = 2 s; it is looked at at 2.05 and, nothing having come, at 5.05
    simulator = toy([0.0, 2.05, 5.05], [30] * 3, [5, 1, 1], faults=SLOW)
    kept = math.exp(-3.0 / MEMORY_S)
    assert value(seen_at_last(simulator), "step_time_ratio") == pytest.approx(
        (kept * 1.6 + PRIOR_S) / (kept * 0.4 + PRIOR_S)
    )


def test_what_was_observed_is_forgotten_sooner_where_newer_steps_are():
    # 1.6 s had been observed at 2.05, and 0.8 s more, of two steps, at 2.85
    simulator = toy([0.0, 2.05, 2.85], [30] * 3, [40] * 3, faults=SLOW)
    kept = math.exp(-0.8 / MEMORY_S - 0.8 / OBSERVED_MEMORY_S)
    seen = seen_at_last(simulator, then=REJECT)
    assert value(seen, "step_time_ratio") == pytest.approx(
        (kept * 1.6 + 0.8 + PRIOR_S) / (kept * 0.4 + 0.2 + PRIOR_S)
    )


def test_steps_that_prefill_count_between_tokens_but_not_in_the_ratio():
    # a step lasts 0.1 s and 1 ms a token. 0 is computed by 0.13 s and gets tokens at 0.231, 0.332,
    # 0.433, 0.534 and 0.635; then 1, which came at 0.55, is computed beside it until 0.796
    simulator = toy([0.0, 0.55, 0.85], [30, 60, 30], [40] * 3, grid=token_grid(0.1, 0.001))
    seen = seen_at_last(simulator)
    assert value(seen, "decode_step_s") == pytest.approx(0.101)
    assert value(seen, "step_time_ratio") == pytest.approx(1.0)
    kept = math.exp(-0.3 / ITL_MEMORY_S)  # of the four that had been seen at 0.55
    seconds, steps = kept * 0.404 + 0.101 + 0.161, kept * 4 + 2
    assert value(seen, "recent_itl_s") == pytest.approx(
        (seconds + PRIOR_S) / (steps + PRIOR_S / 0.101)
    )


def test_steps_that_may_prefill_count_if_they_took_longer_than_they_may():
    # as above but four times as slow: the mixed step takes 0.644 s, where 0.101 + 60 / rate is the
    # longest that is expected; before it five steps of 0.404 s were seen, four of them by 2.2 s
    grid = token_grid(0.1, 0.001)
    simulator = toy([0.0, 2.2, 3.3], [30, 60, 30], [40] * 3, grid=grid, faults=SLOW)
    seen = seen_at_last(simulator)
    kept = math.exp(-1.1 / MEMORY_S - (0.404 + 0.644) / OBSERVED_MEMORY_S)
    most_s = 0.101 + 60 / value(seen, "prefill_tokens_per_s")
    observed_s = kept * 4 * 0.404 + 0.404 + 0.644
    expected_s = kept * 4 * 0.101 + 0.101 + most_s
    assert value(seen, "step_time_ratio") == pytest.approx(
        (observed_s + PRIOR_S) / (expected_s + PRIOR_S)
    )


def test_tokens_left_are_those_predicted_less_those_that_came_before_any_end():
    # 0 has got tokens at 0.1, ..., 0.5: 5 of the 20 predicted; 1 has come at 0.52 and has none
    simulator = toy([0.0, 0.52, 0.55], [30] * 3, [40] * 3, predicted=[20.0, 50.0, 30.0])
    seen = seen_at_last(simulator)
    assert value(seen, "expected_tokens_left") == pytest.approx(15 + 50)
    assert seen.request[0, RequestFeature.EXPECTED_TOKENS] == pytest.approx(30.0)
    assert seen.request[0, RequestFeature.EXPECTED_TOKENS_SPREAD] == 0.0


def test_lengths_are_learnt_when_requests_end():
    # 0 ends at 0.8 s with 8 tokens where 4 were predicted: ln 2 over 20 + 1 requests
    simulator = toy([0.0, 0.75, 0.85], [30] * 3, [8, 1, 1], predicted=[4.0, 4.0, 4.0])
    expected = []
    while simulator.advance()[0] == DECISION:
        seen = observe_batch(simulator, ALL)[0]
        expected.append(float(seen.request[0, RequestFeature.EXPECTED_TOKENS]))
        simulator.apply(np.array([0]))
    assert expected == pytest.approx([4.0, 4.0, 4.0 * 2 ** (1 / 21)])


@pytest.mark.parametrize(
    ("limit_s", "pushed"),
    [
        # steps take 0.1 s whoever takes part, so the pause for 30 tokens is what counts. Five
        # tokens have come, 0.45 s after the first, and 15 are to come: TPOT is 1.95 / 20 = 0.0975 s
        # without it, and a twentieth of the pause more with it.
        (0.0975 / 0.5 + 1e-6, {50}),
        (0.0975 / 0.6 + 1e-6, {60}),
        (0.0975 / 1.0 + 1e-6, {100}),
        (0.0975 / 0.5 - 1e-6, set()),  # over it already
        (1.0, set()),  # far from it
    ],
)
def test_requests_are_counted_that_the_prefill_pushes_over_a_share_of_their_limit(limit_s, pushed):
    slo = (SloClass("tight", 1.0, limit_s), SloClass("loose", 1.0, 10.0))
    simulator = toy(
        [0.0, 0.55], [30] * 2, [40] * 2, predicted=[20.0, 20.0], slo=slo, slo_class=[0, 1]
    )
    seen = seen_at_last(simulator)
    got = {m for m in (40, 50, 60, 80, 100) if value(seen, f"pushed_over_{m}") == 1}
    assert got == pushed
    assert sum(value(seen, f"pushed_over_{m}") for m in (40, 50, 60, 80, 100)) == len(pushed)
    assert value(seen, "outstanding_as_tight") == 1  # 10 s is not below the other's limit


def test_outstanding_requests_with_looser_limits_are_not_as_tight():
    slo = (SloClass("tight", 1.0, 0.1), SloClass("loose", 1.0, 10.0))
    simulator = toy([0.0, 0.0, 0.55], [30] * 3, [40] * 3, slo=slo, slo_class=[0, 1, 0])
    assert value(seen_at_last(simulator), "outstanding_as_tight") == 1


def test_looking_changes_nothing_that_happens():
    scenario = load_scenario("failures")
    ends = []
    for needs in (ALL ^ INFERRED, ALL):
        simulator = Simulator(scenario.spec, [scenario.episode(2, num_requests=300, load=1.2)])
        while simulator.advance()[0] == DECISION:
            seen = observe_batch(simulator, needs)[0]
            simulator.apply(np.array([int(seen.replicas[0, 1].argmin())]))
        ends.append(simulator.state.request["finish_s"].copy())
    np.testing.assert_array_equal(*ends)


def test_whoever_has_not_prepared_is_told_that_nothing_is_known():
    simulator = toy([0.0], [30], [20])
    simulator.advance()
    request = np.zeros(NUM_REQUEST_FEATURES)
    arguments = (simulator.params, simulator.state, 0, int(ALL), request)
    observe(*arguments)
    assert np.isnan(request[RequestFeature.EXPECTED_TOKENS])
    prepare(simulator, ALL)
    observe(*arguments)
    assert request[RequestFeature.EXPECTED_TOKENS] == pytest.approx(20.0)


def test_what_was_prepared_is_there_in_another_process():
    simulator = toy([0.0], [30], [20])
    prepare(simulator, ALL ^ INFERRED)
    assert simulator.params.entries[INFER] == 0
    prepare(simulator, ALL)
    again = pickle.loads(pickle.dumps(simulator))
    assert simulator.params.entries[INFER] != 0
    assert again.params.entries[INFER] != 0


def test_slowed_replicas_stand_out_on_a_real_fleet():
    scenario = load_scenario("failures")
    simulator = Simulator(scenario.spec, [scenario.episode(1, num_requests=1500)])
    ratio = {True: [], False: []}
    while simulator.advance()[0] == DECISION:
        seen = observe_batch(simulator, ALL)[0]
        speed = simulator.state.replica["speed"][0]
        busy = seen.replicas[0, ReplicaFeature.OUTSTANDING_REQUESTS] > 5
        row = seen.replicas[0, ReplicaFeature.STEP_TIME_RATIO]
        for slow in (True, False):
            ratio[slow] += row[busy & ((speed < 0.5) == slow)].tolist()
        load = np.where(seen.mask[0, :-2], seen.replicas[0, 1], np.inf)
        simulator.apply(np.array([int(load.argmin())]))
    assert len(ratio[True]) > 100
    assert np.median(ratio[True]) > 1.8
    assert 0.85 < np.median(ratio[False]) < 1.15
