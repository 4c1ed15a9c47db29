"""Observations, recomputed from the event log, the request table or by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType
from servegym.cluster.state import (
    DECISION,
    EV_ARRIVE,
    EV_DISPATCH,
    EV_FINISH,
    EV_FIRST_TOKEN,
    EV_HOLD,
    EV_RETURN,
    FAULT_DOWN,
    FAULT_SLOW,
    FAULT_UP,
    QUEUED,
    RUNNING,
)
from servegym.policy.contract import (
    NUM_OBSERVED_REQUEST_FEATURES,
    Group,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.observe import observe_batch
from servegym.policy.policy import Observations
from servegym.scenario import load_scenario
from servegym.scenario.disturbances import FailStopConfig
from servegym.scenario.scenario import ActionConfig
from servegym.workloads.table import RequestTable

from ..toys import constant_grid  # noqa: TID252 - tests are no package

ALL = Group.COUNTERS | Group.METRICS | Group.PREFIX


def arrivals(events):
    """When requests arrived: those of sessions after their answers, which no table knows."""
    came = events[events["kind"] == EV_ARRIVE]
    return dict(zip(came["request"].tolist(), came["time_s"].tolist(), strict=True))


def router_book(events, table, num_replicas, deciding, hints):
    """The router's rows by feature name, from the events so far alone."""
    rows = {
        name: np.zeros(num_replicas)
        for name in (
            "outstanding_requests",
            "outstanding_prompt_tokens",
            "outstanding_predicted_tokens",
            "pending_prefill_tokens",
            "recent_ttft_s",
            "recent_tpot_s",
        )
    }
    last_dispatch = np.full(num_replicas, -np.inf)
    at, first_token, last_kind, arrived_s = {}, {}, {}, arrivals(events)

    def average(name, r, value):
        old = rows[name][r]
        rows[name][r] = value if old == 0 else 0.9 * old + 0.1 * value

    for event in events:
        i, r, t = int(event["request"]), int(event["replica"]), float(event["time_s"])
        last_kind[i] = event["kind"]
        if event["kind"] == EV_DISPATCH:
            at[i] = r
            last_dispatch[r] = t
        elif event["kind"] == EV_FIRST_TOKEN:
            first_token[i] = t
            average("recent_ttft_s", r, t - arrived_s[i])
        elif event["kind"] in (EV_FINISH, EV_RETURN):
            del at[i]
            if event["kind"] == EV_FINISH and table.output_tokens[i] > 1:
                tokens = table.output_tokens[i] - 1
                average("recent_tpot_s", r, (t - first_token[i]) / tokens)
    for i, r in at.items():
        rows["outstanding_requests"][r] += 1
        rows["outstanding_prompt_tokens"][r] += table.prompt_tokens[i]
        rows["outstanding_predicted_tokens"][r] += table.predicted_output_tokens[i]
        if i not in first_token:
            rows["pending_prefill_tokens"][r] += table.prompt_tokens[i] - hints[i]
    held = sum(kind == EV_HOLD for i, kind in last_kind.items() if i != deciding)
    return rows, last_dispatch, held


def up_at(faults: Faults, num_replicas: int, now_s: float) -> np.ndarray:
    up = np.ones(num_replicas)
    for time_s, r, kind in zip(faults.time_s, faults.replica, faults.kind, strict=True):
        if time_s <= now_s and kind in (FAULT_DOWN, FAULT_UP):
            up[r] = kind == FAULT_UP
    return up


def arrival_rate(arrival_s: np.ndarray) -> float:
    gaps = np.diff(arrival_s)
    if len(gaps) == 0:
        return 0.0
    mean = gaps[0]
    for gap in gaps[1:]:
        mean += 0.02 * (gap - mean)
    return 1 / mean


@pytest.mark.parametrize("name", ["mixed-chat", "hetero-prefix", "failures"])
@pytest.mark.parametrize("seed", [1, 2])
def test_observations_equal_what_log_and_table_say(name, seed):
    scenario = load_scenario(name)
    changed = {"metrics_interval_s": 0.0}
    if name == "failures":  # so many that each of these short episodes has some
        changed["fail_stop"] = FailStopConfig(rate_per_replica_hour=2000.0, recovery_s=0.3)
    scenario = scenario.model_copy(
        update={
            "actions": ActionConfig(hold=True, reject=True),
            "disturbances": scenario.disturbances.model_copy(update=changed),
        }
    )
    episode = scenario.episode(seed, num_requests=150, load=1.5)
    table, n = episode.table, episode.num_replicas
    simulator = Simulator(scenario.spec, [episode], record=True)
    rng = np.random.default_rng(seed)
    hints: dict[int, float] = {}
    checked = 0
    while simulator.advance()[0] == DECISION:
        seen, _ = observe_batch(simulator, ALL)
        env = simulator.state.env[0]
        deciding, now_s = int(env["deciding"]), float(env["now_s"])
        if rng.random() < 0.3:
            checked += 1
            events = simulator.events()
            got = {f.name.lower(): seen.replicas[0, f] for f in ReplicaFeature}
            rows, last_dispatch, held = router_book(events, table, n, deciding, hints)
            rows["since_dispatch_s"] = np.minimum(now_s - last_dispatch, 1e6)
            rows["up"] = up_at(episode.faults, n, now_s)
            requests = simulator.state.request[0, :150]
            for row, status in (("num_running", RUNNING), ("num_waiting", QUEUED)):
                mine = requests["replica"][requests["status"] == status]
                rows[row] = np.bincount(mine, minlength=n)
            for row, want in rows.items():
                np.testing.assert_allclose(got[row], want, rtol=1e-9, atol=1e-9, err_msg=row)
            arrived_s = arrivals(events)
            level = scenario.slo_classes[table.slo_class[deciding]]
            wanted = {
                "prompt_tokens": table.prompt_tokens[deciding],
                "predicted_output_tokens": table.predicted_output_tokens[deciding],
                "ttft_slo_s": level.ttft_s,
                "tpot_slo_s": level.tpot_s,
                "slo_weight": level.weight,
                "waited_s": now_s - arrived_s[deciding],
                "arrival_rate_rps": arrival_rate(np.array(list(arrived_s.values()))),
                "num_up": rows["up"].sum(),
                "num_held": held,
            }
            for f in list(RequestFeature)[:NUM_OBSERVED_REQUEST_FEATURES]:
                assert seen.request[0, f] == pytest.approx(wanted[f.name.lower()], rel=1e-9)
            need = table.prompt_tokens[deciding] + table.output_tokens[deciding] - 1
            allowed = (rows["up"] > 0) & (need <= got["kv_capacity_tokens"])
            assert seen.mask[0].tolist() == [*allowed.tolist(), True, True]
        action = int(rng.choice(np.flatnonzero(seen.mask[0, :-2])))
        draw = rng.random()
        width = seen.mask.shape[1] - 2
        action = width if draw < 0.1 else width + 1 if draw < 0.15 else action
        if action < width:
            hints[deciding] = seen.replicas[0, ReplicaFeature.PREFIX_HIT_TOKENS, action]
        simulator.apply(np.array([action]))
    assert checked > 20
    assert (simulator.events()["kind"] == EV_RETURN).any() == (name == "failures")


def toy(arrival_s, prompt, output, *, replicas=1, faults=None, max_num_seqs=8, **rules):
    """Replicas of 10 blocks of 16 tokens whose steps last 0.1 s."""
    engine = ReplicaType("toy", constant_grid(0.1), 10, max_num_seqs=max_num_seqs)
    table = RequestTable.build(np.array(arrival_s), np.array(prompt), np.array(output))
    spec = ClusterSpec((engine,), block_size=16, **rules)
    episode = Episode(table, np.zeros(replicas, np.int16), np.ones(replicas), faults or Faults())
    return Simulator(spec, [episode])


def follow(simulator: Simulator, actions: list[int]) -> Observations:
    """Take some decisions and observe the one after them."""
    for action in actions:
        simulator.advance()
        simulator.apply(np.array([action]))
    simulator.advance()
    return observe_batch(simulator, ALL)[0]


def value(seen: Observations, name: str, r: int = 0) -> float:
    return float(seen.replicas[0, ReplicaFeature[name.upper()], r])


def test_engine_rows_count_what_has_come_out_and_what_is_held_now():
    # 0 and 1 are computed at 0.1 s, where each emits a token; 2 waits for a sequence slot.
    # Steps end at 0.2, 0.3, ...: at 0.55 s five have ended, 2 * 5 tokens are out. In the sixth,
    # each computes its token number 30 + 5: ceil(35 / 16) = 3 blocks each, 6 of 10.
    seen = follow(toy([0, 0, 0, 0.55], [30] * 4, [20] * 4, max_num_seqs=2), [0, 0, 0])
    assert value(seen, "num_running") == 2
    assert value(seen, "num_waiting") == 1
    assert value(seen, "generated_tokens") == 10
    assert value(seen, "kv_cache_usage") == pytest.approx(0.6)
    assert value(seen, "metrics_age_s") == 0
    assert value(seen, "since_dispatch_s") == pytest.approx(0.55)


def test_stale_metrics_stay_until_the_next_scrape():
    # scrapes at 0, 0.5, 1.0, ...; the request is dispatched at 0.2 s and computed by 0.3 s
    arrivals = [0.2, 0.45, 0.55, 0.95]
    simulator = toy(arrivals, [30] * 4, [20] * 4, metrics_interval_s=0.5)
    seen = follow(simulator, [0])
    assert value(seen, "num_running") == 0
    assert value(seen, "metrics_age_s") == pytest.approx(0.45)
    assert value(seen, "outstanding_requests") == 1  # the router's own book is never stale
    seen = follow(simulator, [0])
    # at 0.5 s request 1 waited for the step that ends then, so replica events came first
    assert value(seen, "num_running") == 2
    assert value(seen, "generated_tokens") == 3  # tokens at 0.3, 0.4 and 0.5 s
    assert value(seen, "metrics_age_s") == pytest.approx(0.05)
    seen = follow(simulator, [0])
    assert value(seen, "num_running") == 2
    assert value(seen, "generated_tokens") == 3
    assert value(seen, "metrics_age_s") == pytest.approx(0.45)


def test_a_replica_that_is_down_shows_nothing_and_is_masked():
    down = Faults(
        np.array([0.25, 5.0]),
        np.array([0, 0], np.int16),
        np.array([FAULT_DOWN, FAULT_UP], np.int8),
        np.zeros(2),
    )
    simulator = toy([0, 0, 0.3], [30] * 3, [20] * 3, replicas=2, faults=down)
    seen = follow(simulator, [0, 1])  # the request that replica 0 lost is decided again
    assert seen.mask[0].tolist() == [False, True, False, False]
    assert value(seen, "up", 0) == 0
    assert value(seen, "num_running", 0) == value(seen, "generated_tokens", 0) == 0
    assert value(seen, "outstanding_requests", 0) == 0
    assert value(seen, "num_running", 1) == 1
    assert seen.request[0, RequestFeature.NUM_UP] == 1
    assert seen.request[0, RequestFeature.WAITED_S] == pytest.approx(0.25)


def test_a_slow_down_is_hidden():
    slow = Faults(
        np.array([0.05]), np.zeros(1, np.int16), np.array([FAULT_SLOW], np.int8), np.array([0.1])
    )
    calm = follow(toy([0.06], [30], [20], replicas=2), [])
    hidden = follow(toy([0.06], [30], [20], replicas=2, faults=slow), [])
    np.testing.assert_array_equal(calm.replicas, hidden.replicas)


def test_the_true_length_is_hidden():
    simulator = toy([0, 0, 0.35], [30] * 3, [20] * 3, replicas=2)
    other = toy([0, 0, 0.35], [30] * 3, [20] * 3, replicas=2)
    table = simulator.episodes[0].table
    longer = replace(table, output_tokens=table.output_tokens + 50)
    other.load(0, replace(simulator.episodes[0], table=longer))
    seen = list(zip(follow(simulator, [0, 1]), follow(other, [0, 1]), strict=True))
    assert len(seen) == len(Observations._fields)
    for got, want in seen:
        np.testing.assert_array_equal(got, want)


def test_columns_of_absent_replicas_are_zero_and_masked():
    spec = toy([0], [30], [20]).spec
    episodes = [toy([0], [30], [20], replicas=count).episodes[0] for count in (1, 3)]
    simulator = Simulator(spec, episodes, max_replicas=4)
    simulator.advance()
    seen, envs = observe_batch(simulator, ALL)
    assert envs.tolist() == [0, 1]
    for row, count in enumerate((1, 3)):
        assert (seen.replicas[row, :, count:] == 0).all()
        assert seen.mask[row, :-2].tolist() == [r < count for r in range(4)]


def test_a_replica_too_small_for_the_request_is_masked():
    small, large = (ReplicaType(str(n), constant_grid(0.1), n) for n in (3, 4))
    # 30 + 20 - 1 = 49 tokens: one more than 3 blocks of 16
    table = RequestTable.build(np.zeros(1), np.array([30]), np.array([20]))
    episode = Episode(table, np.array([0, 1], np.int16), np.ones(2))
    simulator = Simulator(ClusterSpec((small, large), allow_hold=True), [episode])
    assert follow(simulator, []).mask[0].tolist() == [False, True, True, False]


def test_prefix_hits_are_whole_blocks_that_leave_a_token_to_compute():
    # requests repeat one text of 64 tokens: 4 blocks, of which (64 - 1) // 16 = 3 may be reused
    table = RequestTable.build(
        np.array([0.0, 1.0]),
        np.array([64, 64]),
        np.array([1, 1]),
        prefix_offsets=np.array([0, 1, 2]),
        prefix_keys=np.array([7, 7]),
        prefix_ends=np.array([64, 64]),
    )
    engine = ReplicaType("toy", constant_grid(0.1), 10)
    episode = Episode(table, np.zeros(2, np.int16), np.ones(2))
    simulator = Simulator(ClusterSpec((engine,), prefix_caching=True), [episode])
    seen = follow(simulator, [1])
    assert [value(seen, "prefix_hit_tokens", r) for r in (0, 1)] == [0, 48]
    simulator.apply(np.array([1]))
    simulator.advance()
    assert simulator.outcomes()["cached_tokens"].tolist() == [0, 48]
