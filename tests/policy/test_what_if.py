"""The planner's forward simulation against playing every choice to its end."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType
from servegym.cluster.state import (
    DECISION,
    FAULT_DOWN,
    FAULT_SLOW,
    FAULT_UP,
    OBSERVED_WHAT_IF_ADDED,
    OBSERVED_WHAT_IF_E2E,
)
from servegym.costs.grid import NUM_BATCH_KNOTS
from servegym.costs.speculation import Speculation
from servegym.policy.contract import Group
from servegym.policy.observe import observe_batch
from servegym.policy.run import run
from servegym.workloads.table import RequestTable

from ..toys import token_grid  # noqa: TID252 - tests are no package

NEEDS = Group.COUNTERS | Group.WHAT_IF
#: A step lasts 10 ms and 1 ms for each token in it.
STEP_S, TOKEN_S = 0.01, 0.001


def cluster(
    requests,
    speeds,
    *,
    faults=None,
    predicted=None,
    num_blocks=1000,
    max_num_seqs=8,
    acceptance=(),
) -> Simulator:
    """Make a fleet without prefix cache for rows of (arrival_s, prompt, output tokens)."""
    arrival_s, prompt, output = map(np.array, zip(*requests, strict=True))
    table = RequestTable.build(
        arrival_s,
        prompt,
        output,
        predicted_output_tokens=np.array(output if predicted is None else predicted, float),
    )
    engine = ReplicaType("toy", token_grid(STEP_S, TOKEN_S), num_blocks, max_num_seqs=max_num_seqs)
    if acceptance:
        drafts = Speculation(acceptance, engine.grid, np.zeros(NUM_BATCH_KNOTS))
        engine = replace(engine, speculation=drafts)
    episode = Episode(
        table, np.zeros(len(speeds), np.int16), np.array(speeds, float), faults or Faults()
    )
    return Simulator(ClusterSpec((engine,)), [episode])


def follow(simulator: Simulator, actions) -> None:
    """Take some decisions and stop at the one after them."""
    for action in actions:
        assert simulator.advance()[0] == DECISION
        simulator.apply(np.array([action]))
    assert simulator.advance()[0] == DECISION


def planned(simulator: Simulator) -> tuple[np.ndarray, np.ndarray]:
    """What the planner says of each replica: own time and added time, seconds."""
    rows = observe_batch(simulator, NEEDS)[0].replicas[0]
    return rows[OBSERVED_WHAT_IF_E2E], rows[OBSERVED_WHAT_IF_ADDED]


def chosen(simulator: Simulator, name: str) -> int:
    rule = policy(name)
    rule.reset(1, 0)
    observations, envs = observe_batch(simulator, rule.needs)
    return int(rule.act(observations, envs)[0])


def played(simulator: Simulator) -> tuple[np.ndarray, np.ndarray]:
    """Play each choice of the last request to the end: its own time, and everybody's in sum."""
    request = int(simulator.state.env[0]["deciding"])
    now_s = float(simulator.state.env[0]["now_s"])
    before = simulator.snapshot()
    own, total = [], []
    for r in range(simulator.max_replicas):
        simulator.apply(np.array([r]))
        simulator.advance()
        own.append(float(simulator.state.request[0, request]["finish_s"]) - now_s)
        total.append(float(simulator.state.env[0]["area"]))
        simulator.restore(before)
    return np.array(own), np.array(total)


def test_a_request_alone_takes_its_prefill_and_its_decode_steps():
    # 10 + 100 ms of prefill, 9 steps of 11 ms: 209 ms; twice that at half the speed
    simulator = cluster([(0.0, 100, 10)], [1.0, 0.5])
    follow(simulator, [])
    own, added = planned(simulator)
    np.testing.assert_allclose(own, [0.209, 0.418])
    np.testing.assert_allclose(added, own)


def test_a_plan_counts_on_drafts():
    # 110 ms of prefill, then 9 tokens in 3 steps of 3: 13 ms each. While it prefills another comes.
    # The plan begins with the first's last token, which is padded to three, beside the other's 50:
    # 63 ms; then both have 9 tokens left, 3 steps of 16 ms
    simulator = cluster([(0.0, 100, 10), (0.105, 50, 10)], [1.0], acceptance=(1.0, 1.0))
    follow(simulator, [])
    np.testing.assert_allclose(planned(simulator)[0], [0.149])
    follow(simulator, [0])
    own, _ = planned(simulator)
    np.testing.assert_allclose(own, [0.063 + 3 * 0.016])


def test_added_time_counts_the_delay_of_the_others():
    # both arrive at 0 s. Alone the first takes 60 + 3 * 11 = 93 ms. Together: 10 + 100 ms of
    # prefill, 3 steps of 12 ms: 146 ms each. Added: 2 * 146 - 93 = 199 ms, own 146 ms.
    simulator = cluster([(0.0, 50, 4), (0.0, 50, 4)], [1.0])
    follow(simulator, [0])
    own, added = planned(simulator)
    np.testing.assert_allclose(own, [0.146])
    np.testing.assert_allclose(added, [0.199])


def test_own_and_added_time_may_disagree():
    # beside 6 others a fast replica ends it sooner, but each of them pays for its long prompt
    rows = [(0.0, 1, 100)] * 6 + [(0.5, 400, 2)]
    simulator = cluster(rows, [1.0, 0.8])
    follow(simulator, [0] * 6)
    assert chosen(simulator, "what-if") == 0
    assert chosen(simulator, "what-if-added") == 1
    own, total = played(simulator)
    assert (own.argmin(), total.argmin()) == (0, 1)


@pytest.mark.parametrize("seed", range(12))
def test_the_planner_chooses_what_playing_each_choice_shows_to_be_best(seed):
    # short prompts, so that the step in progress, which the planner rounds, matters little
    rng = np.random.default_rng(seed)
    num = int(rng.integers(6, 20))
    rows = [
        (t, int(rng.integers(1, 5)), int(rng.integers(5, 120)))
        for t in np.sort(rng.uniform(0, 0.5, num))
    ]
    speeds = rng.uniform(0.4, 1.0, 3)
    simulator = cluster(rows, speeds, max_num_seqs=4)
    follow(simulator, rng.integers(0, 3, num - 1))
    step_s = (STEP_S + 8 * TOKEN_S) / speeds.min()
    for name, plan, truth in zip(
        ("what-if", "what-if-added"), planned(simulator), played(simulator), strict=True
    ):
        best, second = np.sort(truth)[:2]
        if second - best > 2 * step_s:
            assert chosen(simulator, name) == truth.argmin()
        np.testing.assert_allclose(plan - plan.min(), truth - truth.min(), atol=2 * num * step_s)
    np.testing.assert_allclose(planned(simulator)[0], played(simulator)[0], atol=2 * step_s)


def test_the_planner_does_not_repeat_the_step_in_progress():
    # At 0.95 s replica 0 has done 0.95 of the 1.01 s of its long prefill, replica 1 nothing of
    # 0.21 s: the new request starts after 0.06 s on 0 and after 0.21 s on 1.
    rows = [(0.0, 1000, 5), (0.95, 200, 5), (0.95, 1, 5)]
    simulator = cluster(rows, [1.0, 1.0])
    follow(simulator, [0, 1])
    own, total = played(simulator)
    assert own.argmin() == total.argmin() == 0
    np.testing.assert_allclose(planned(simulator)[0], own, atol=0.03)
    assert chosen(simulator, "what-if") == 0


def test_the_planner_foresees_that_blocks_run_out():
    # Replica 0 is the faster one, but of its 10 blocks the request there holds 9 or 10, and the
    # new one needs 7 for its prompt: it has to wait until the other has ended.
    rows = [(0.0, 140, 20), (0.2, 100, 50)]
    simulator = cluster(rows, [1.0, 0.95], num_blocks=10)
    follow(simulator, [0])
    own, _ = played(simulator)
    assert own.argmin() == 1
    assert chosen(simulator, "what-if") == 1
    np.testing.assert_allclose(planned(simulator)[0], own, atol=0.03)


def test_planning_leaves_the_simulation_as_it_was():
    rows = [(0.05 * i, 20 + i, 10 + 3 * i) for i in range(12)]
    simulator = cluster(rows, [1.0, 0.7])
    follow(simulator, [0, 1] * 4)
    before = simulator.snapshot().state
    planned(simulator)
    assert before._fields
    for name, old, new in zip(before._fields, before, simulator.state, strict=True):
        if name == "observation":
            old, new = old[:, :OBSERVED_WHAT_IF_E2E], new[:, :OBSERVED_WHAT_IF_E2E]
        for field in old.dtype.names or [...]:  # bytes between fields are not copied
            np.testing.assert_array_equal(new[field], old[field], err_msg=name)


ROWS = [(0.0, 50, 40), (0.0, 50, 60), (0.2, 50, 20)]


def plan_of(rows=ROWS, **more) -> np.ndarray:
    simulator = cluster(rows, [1.0, 1.0, 0.5], **more)
    follow(simulator, [0, 1])
    return np.array(planned(simulator))


def test_the_plan_knows_predicted_lengths_only():
    predicted = [40, 60, 20]
    longer = [(t, prompt, 2 * output) for t, prompt, output in ROWS]
    np.testing.assert_array_equal(plan_of(longer, predicted=predicted), plan_of())
    assert (plan_of(predicted=[80, 120, 40])[0] > plan_of()[0]).all()


def test_the_plan_knows_no_later_arrival():
    np.testing.assert_array_equal(plan_of([*ROWS, (0.21, 900, 50)]), plan_of())


def test_the_plan_does_not_know_that_a_replica_became_slow():
    slow = Faults(
        np.array([0.001]), np.array([2], np.int16), np.array([FAULT_SLOW], np.int8), np.array([0.1])
    )
    np.testing.assert_array_equal(plan_of(faults=slow)[:, 2], plan_of()[:, 2])


def test_a_prediction_already_exceeded_leaves_one_token():
    # at 0.2 s requests 0 and 1 have emitted far more than the one token predicted
    own, _ = plan_of(predicted=[1, 1, 20])
    alone_s = 0.06 + 19 * 0.011  # on an idle replica of speed 1
    assert alone_s < own[0] < alone_s + 0.03


def test_a_replica_that_is_down_is_not_planned():
    down = Faults(
        np.array([0.1, 9.0]),
        np.array([2, 2], np.int16),
        np.array([FAULT_DOWN, FAULT_UP], np.int8),
        np.zeros(2),
    )
    simulator = cluster(ROWS, [1.0, 1.0, 0.5], faults=down)
    follow(simulator, [0, 1])
    own, added = planned(simulator)
    assert own[2] == added[2] == 0
    assert chosen(simulator, "what-if") != 2


def planned_run(name: str, predicted: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    rows = [
        (t, int(rng.integers(1, 200)), int(rng.integers(1, 100)))
        for t in np.sort(rng.uniform(0, 5, 80))
    ]
    simulator = cluster(rows, [1.0, 0.6, 0.3], predicted=np.full(80, predicted))
    run(simulator, policy(name))
    outcomes = simulator.outcomes()
    return outcomes["finish_s"] - outcomes["arrival_s"]


@pytest.mark.parametrize("name", ["what-if", "what-if-added"])
def test_a_planner_gains_on_round_robin_and_its_oracle_needs_no_predictions(name):
    assert planned_run(name, 50.0).mean() < 0.8 * planned_run("round-robin", 50.0).mean()
    truth = planned_run(f"{name}-oracle", 50.0)
    np.testing.assert_array_equal(truth, planned_run(f"{name}-oracle", 7.0))
    assert not np.array_equal(truth, planned_run(name, 50.0))


def test_a_batch_of_environments_is_planned_like_each_alone():
    one = cluster(ROWS, [1.0, 0.5])
    other = replace(one.episodes[0], speed=np.array([0.3, 0.9]))
    both = Simulator(one.spec, [one.episodes[0], other])
    both.advance()
    seen, _ = observe_batch(both, NEEDS)
    assert len(both.episodes) == 2
    for row, episode in enumerate(both.episodes):
        alone = Simulator(one.spec, [episode])
        alone.advance()
        np.testing.assert_array_equal(
            seen.replicas[row], observe_batch(alone, NEEDS)[0].replicas[0]
        )


#: Plans in another process, which can be ended if it never comes back.
PLAN = """
import numpy as np
from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.policy.run import run
from servegym.scenario import parse_scenario

scenario = parse_scenario('''
name: planned
engine: {{block_size: 16, max_num_seqs: 32, prefix_caching: {caching}}}
fleet: [{{gpu: A100-SXM-80GB, count: 2, num_blocks: {blocks}}}]
workload:
  kind: generated
  rate_rps: 20.0
  prompt: {{medians_tokens: [50.0], max_tokens: 60}}
  output: {{medians_tokens: [20.0], max_tokens: 40}}
disturbances: {{metrics_interval_s: {interval}, predictor: {{kind: lognormal, sigma: {sigma}}}}}
num_requests: 10
''', 'planned')
simulator = Simulator(scenario.spec, [scenario.episode(1)])
run(simulator, policy('what-if'))
assert np.isfinite(simulator.outcomes()['finish_s']).all()
"""


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"interval": 0.1},
        {"caching": "true"},
        {"blocks": 10, "sigma": 2.0},  # some predictions are longer than the KV cache
    ],
    ids=["plain", "metrics scraped", "prefix caching", "prediction beyond capacity"],
)
def test_planning_ends_in_every_setting(setting):
    planned(_warm())  # compiled now, so that the other process finds it in the cache
    usual = {"caching": "false", "blocks": 1000, "interval": 0.0, "sigma": 0.0}
    code = PLAN.format(**{**usual, **setting})
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.fail("the planner never came back")
    assert done.returncode == 0, done.stderr


def _warm() -> Simulator:
    simulator = cluster([(0.0, 1, 1)], [1.0])
    follow(simulator, [])
    return simulator


def test_what_is_drawn_is_what_is_predicted_where_predictions_are_right():
    simulator = cluster(ROWS, [1.0, 1.0, 0.5])
    follow(simulator, [0, 1])
    added = planned(simulator)[1]
    sampled = observe_batch(simulator, NEEDS | Group.SAMPLED)[0].replicas[0]
    np.testing.assert_allclose(sampled[OBSERVED_WHAT_IF_ADDED], added)


def test_a_planner_over_likely_lengths_gains_on_round_robin():
    sampled, other = (planned_run(x, 50.0).mean() for x in ("what-if-sampled", "round-robin"))
    assert sampled < 0.8 * other


def test_it_does_not_know_that_a_replica_became_slow_either():
    slow = Faults(
        np.array([0.001]), np.array([2], np.int16), np.array([FAULT_SLOW], np.int8), np.array([0.1])
    )

    def added(**more) -> float:
        simulator = cluster(ROWS, [1.0, 1.0, 0.5], **more)
        follow(simulator, [0, 1])
        rows = observe_batch(simulator, NEEDS | Group.SAMPLED)[0].replicas[0]
        return float(rows[OBSERVED_WHAT_IF_ADDED][2])

    assert added(faults=slow) == added() > 0
