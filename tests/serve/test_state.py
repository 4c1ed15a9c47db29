"""The live state shows what the simulator shows, feature by feature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import SloClass
from servegym.cluster.state import (
    DECISION,
    EV_ARRIVE,
    EV_DISPATCH,
    EV_FINISH,
    EV_FIRST_TOKEN,
    EV_HOLD,
    EV_REJECT,
    EV_RETURN,
    FAULT_DOWN,
    FAULT_UP,
)
from servegym.cluster.stretches import catch_up as book_ended_steps
from servegym.policy.contract import (
    FIRST_NOMINAL,
    INFERRED,
    NO_BOUND,
    NUM_EXTENDED_FEATURES,
    NUM_NOMINAL,
    NUM_OBSERVED_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.observe import observe_batch
from servegym.scenario import load_scenario
from servegym.scenario.disturbances import FailStopConfig
from servegym.scenario.scenario import ActionConfig
from servegym.serve.facts import Hardware, Rates, fleet_facts
from servegym.serve.state import EngineMetrics, LiveState

ALL = Group.COUNTERS | Group.METRICS | Group.PREFIX
INFERRED_ROWS = range(NUM_OBSERVED_FEATURES, NUM_EXTENDED_FEATURES)


class Follower:
    """Feeds a simulator's event log to a live state."""

    def __init__(self, simulator: Simulator, facts: np.ndarray, hold: bool) -> None:
        self.simulator, self.table = simulator, simulator.episodes[0].table
        self.state = LiveState(
            facts, simulator.spec.slo_classes, allow_hold=hold, allow_reject=hold
        )
        self.requests = {}
        self.hits = {}
        self.seen = 0
        self.seen_steps = 0
        self.faults = 0

    def catch_up(self) -> None:
        """Take in what has happened since the last call, in order of time."""
        p, s = self.simulator.params, self.simulator.state
        now_s = float(s.env[0]["now_s"])
        for r in range(self.state.num_replicas):
            book_ended_steps(p, s, 0, r, now_s)  # so that the log has all that have ended
        events, steps = self.simulator.events(), self.simulator.steps()
        new = [(event["time_s"], 1, event) for event in events[self.seen :]]
        new += [(step["end_s"], 0, step) for step in steps[self.seen_steps :]]
        for time_s, is_event, what in sorted(new, key=lambda entry: entry[:2]):
            self.fail_until(time_s)
            (self.take if is_event else self.stream)(what)
        self.seen, self.seen_steps = len(events), len(steps)
        self.fail_until(now_s)

    def stream(self, step) -> None:
        """Pass on the tokens of a stretch of steps, all of them when it ends."""
        r = int(step["replica"])
        there = [q for q in self.requests.values() if q.replica == r and q.generated_tokens]
        if len(there) == step["num_decodes"]:  # else one computes anew what another began
            for request in there:
                self.state.tokens(request, int(step["num_steps"]), float(step["end_s"]))

    def fail_until(self, now_s: float) -> None:
        faults = self.simulator.episodes[0].faults
        while self.faults < len(faults) and faults.time_s[self.faults] <= now_s:
            kind, r = faults.kind[self.faults], int(faults.replica[self.faults])
            if kind in (FAULT_DOWN, FAULT_UP):
                self.state.set_up(r, kind == FAULT_UP)
            self.faults += 1

    def take(self, event) -> None:
        i, r, now_s = int(event["request"]), int(event["replica"]), float(event["time_s"])
        kind, state, table = event["kind"], self.state, self.table
        if kind == EV_ARRIVE:
            self.requests[i] = state.arrive(
                now_s,
                key=str(i),
                prompt_tokens=table.prompt_tokens[i],
                predicted_output_tokens=table.predicted_output_tokens[i],
                slo_class=int(table.slo_class[i]),
            )
        elif kind == EV_DISPATCH:
            state.replicas[ReplicaFeature["PREFIX_HIT_TOKENS"], r] = self.hits[i][r]
            state.dispatch(self.requests[i], r, now_s)
        elif kind == EV_FIRST_TOKEN:
            state.first_token(self.requests[i], now_s)
            state.tokens(self.requests[i], 1, now_s)
        elif kind == EV_FINISH:
            state.finish(self.requests[i], now_s, int(table.output_tokens[i]))
        elif kind == EV_HOLD:
            state.hold(self.requests[i])
        elif kind in (EV_RETURN, EV_REJECT):
            state.leave(self.requests[i])

    def observe(self, seen):
        """Observe the pending decision; engine metrics and prefix hits are given."""
        self.catch_up()
        env = self.simulator.state.env[0]
        i, now_s = int(env["deciding"]), float(env["now_s"])
        metrics = seen.replicas[0]
        for r in range(self.state.num_replicas):
            given = EngineMetrics(
                num_running=metrics[ReplicaFeature["NUM_RUNNING"], r],
                num_waiting=metrics[ReplicaFeature["NUM_WAITING"], r],
                kv_cache_usage=metrics[ReplicaFeature["KV_CACHE_USAGE"], r],
                generated_tokens=metrics[ReplicaFeature["GENERATED_TOKENS"], r],
            )
            scraped_s = env["last_scrape_s"] if self.simulator.params.metrics_interval_s else now_s
            self.state.update_metrics(r, given, float(scraped_s))
        self.hits[i] = metrics[ReplicaFeature["PREFIX_HIT_TOKENS"]].copy()
        return self.state.observe(
            self.requests[i], now_s, hit_tokens=self.hits[i], needs=ALL | INFERRED
        )


def require_close(got, want, rows: Sequence[int], rtol: float) -> None:
    """Compare all rows at once: one by one they take twice as long as what is compared."""
    rows = list(rows)
    if np.allclose(got[rows], want[rows], rtol=rtol, atol=1e-9, equal_nan=True):
        return
    for f in rows:
        np.testing.assert_allclose(
            got[f], want[f], rtol=rtol, atol=1e-9, err_msg=REPLICA_FEATURES[f].name
        )


@pytest.mark.parametrize("name", ["mixed-chat", "hetero-prefix", "failures", "slo-chat"])
@pytest.mark.parametrize("metrics_interval_s", [0.0, 0.1])
@pytest.mark.parametrize("hold", [False, True])
def test_live_state_shows_what_the_simulator_shows(name, metrics_interval_s, hold):
    scenario = load_scenario(name)
    changed = {"metrics_interval_s": metrics_interval_s}
    if name == "failures":  # so many that each of these short episodes has some
        changed["fail_stop"] = FailStopConfig(rate_per_replica_hour=2000.0, recovery_s=0.3)
    scenario = scenario.model_copy(
        update={
            "actions": ActionConfig(hold=hold, reject=hold),
            "disturbances": scenario.disturbances.model_copy(update=changed),
        }
    )
    episode = scenario.episode(3, num_requests=250, load=1.3)
    simulator = Simulator(scenario.spec, [episode], record=True)
    rng = np.random.default_rng(7)
    follower, checked, num_pushed = None, 0, 0
    while simulator.advance()[0] == DECISION:
        want, _ = observe_batch(simulator, ALL | INFERRED)
        if follower is None:
            facts = want.replicas[0, FIRST_NOMINAL : FIRST_NOMINAL + NUM_NOMINAL].copy()
            follower = Follower(simulator, facts, hold)
        got = follower.observe(want)
        require_close(got.replicas[0], want.replicas[0], range(NUM_OBSERVED_FEATURES), 1e-9)
        inferred = INFERRED_ROWS if name != "failures" else ()
        require_close(got.replicas[0], want.replicas[0], inferred, 1e-6)
        if not np.allclose(got.request, want.request, rtol=1e-9, atol=0.0):
            for f, feature in enumerate(REQUEST_FEATURES):
                assert got.request[0, f] == pytest.approx(want.request[0, f], rel=1e-9), (
                    feature.name
                )
        np.testing.assert_array_equal(got.mask, want.mask)
        pushed = got.replicas[0, ReplicaFeature["PUSHED_OVER_50"]]
        num_pushed += int(pushed.sum())
        checked += 1
        allowed = np.flatnonzero(want.mask[0, :-2])
        draw = rng.random()
        width = want.mask.shape[1] - 2
        action = width if draw < 0.1 else width + 1 if draw < 0.15 else int(rng.choice(allowed))
        simulator.apply(np.array([action if hold or action < width else int(rng.choice(allowed))]))
    assert checked >= 250
    assert num_pushed > 20
    follower.catch_up()
    seen = follower.state.replicas
    for name in ("outstanding_requests", "pending_prefill_tokens", "outstanding_prompt_tokens"):
        assert (seen[ReplicaFeature[name.upper()]] == 0).all(), name


def make_state(width: int = 2, **settings) -> LiveState:
    facts = fleet_facts([Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01)] * width)
    return LiveState(facts, [SloClass("a", 1.0, 0.1)], **settings)


def arrive(state: LiveState, now_s: float = 0.0, prompt: float = 100.0, predicted: float = 50.0):
    return state.arrive(now_s, key="k", prompt_tokens=prompt, predicted_output_tokens=predicted)


def value(seen, name: str, r: int = 0) -> float:
    return float(seen.replicas[0, ReplicaFeature[name.upper()], r])


def test_metrics_that_were_never_seen_are_as_old_as_can_be():
    state = make_state()
    request = arrive(state)
    assert value(state.observe(request, 1.0), "metrics_age_s") == NO_BOUND
    state.update_metrics(0, EngineMetrics(1, 2, 0.5, age_s=0.2), 1.0)
    seen = state.observe(request, 1.5)
    assert value(seen, "metrics_age_s") == pytest.approx(0.7)
    assert value(seen, "metrics_age_s", 1) == NO_BOUND
    assert value(seen, "num_waiting") == 2


def test_the_routers_own_count_of_tokens_stands_where_the_engine_says_nothing():
    state = make_state()
    first, second = arrive(state), arrive(state)
    for request in (first, second):
        state.observe(request, 0.0)
        state.dispatch(request, 1, 0.0)
    state.first_token(first, 0.5)
    state.tokens(first, 3, 0.6)
    state.tokens(second, 4, 0.6)
    assert value(state.observe(first, 1.0), "generated_tokens", 1) == 7
    state.finish(second, 1.0, 4)
    assert value(state.observe(first, 1.0), "generated_tokens", 1) == 3
    state.update_metrics(1, EngineMetrics(1, 0, 0.1, generated_tokens=12), 1.0)
    assert value(state.observe(first, 1.0), "generated_tokens", 1) == 12
    state.leave(first)
    assert value(state.observe(arrive(state), 1.0), "outstanding_requests", 1) == 0


def test_what_nobody_needs_is_not_inferred():
    state = make_state()
    first = arrive(state, predicted=50.0)
    state.observe(first, 0.0)
    state.dispatch(first, 0, 0.0)
    state.first_token(first, 0.5)
    state.tokens(first, 1, 0.5)
    state.tokens(first, 1, 0.9)  # unseen: nobody has asked yet
    plain = state.observe(arrive(state), 1.0)
    assert value(plain, "step_time_ratio") == value(plain, "expected_tokens_left") == 0.0
    lengths = state.observe(arrive(state), 1.0, needs=ALL | Group.LENGTHS)
    assert lengths.request[0, RequestFeature["EXPECTED_TOKENS"]] == pytest.approx(50.0)
    assert value(lengths, "expected_tokens_left") == 0.0
    assert value(lengths, "step_time_ratio") == 1.0
    state.tokens(first, 1, 1.1)
    state.tokens(first, 1, 1.5)
    seen = state.observe(arrive(state), 1.6, needs=ALL | Group.LIMITS)
    # two steps of 0.01 s, from the last token before to 1.5 s
    assert value(seen, "step_time_ratio") == pytest.approx((0.6 + 0.1) / (0.02 + 0.1))
    assert value(seen, "expected_tokens_left") == pytest.approx(46.0)
    assert value(seen, "outstanding_as_tight") == 1.0


def test_answers_that_come_whole_say_nothing_of_step_times():
    state = make_state()
    for key in range(3):
        request = arrive(state)
        state.observe(request, 0.0)
        state.dispatch(request, 0, 0.0)
        state.first_token(request, 5.0 + key)
        state.tokens(request, 50, 5.0 + key)
        state.finish(request, 5.0 + key, 50)
    seen = state.observe(arrive(state), 9.0, needs=ALL | INFERRED)
    assert value(seen, "step_time_ratio") == 1.0
    assert seen.request[0, RequestFeature["EXPECTED_TOKENS"]] == pytest.approx(50.0)


def test_a_stream_that_another_replica_takes_up_decodes_there():
    state = make_state()
    request = arrive(state)
    state.observe(request, 0.0, needs=ALL | INFERRED)
    state.dispatch(request, 0, 0.0)
    state.first_token(request, 0.1)
    state.tokens(request, 3, 0.1)
    state.leave(request)
    state.observe(request, 0.2)
    state.dispatch(request, 1, 0.2)
    state.tokens(request, 1, 0.5)  # the prefill ends, as far as is seen
    state.tokens(request, 1, 0.52)
    seen = state.observe(arrive(state), 0.6, needs=ALL | INFERRED)
    assert value(seen, "step_time_ratio", 0) == 1.0
    assert value(seen, "step_time_ratio", 1) == pytest.approx((0.02 + 0.1) / (0.01 + 0.1))
    assert value(seen, "expected_tokens_left", 1) == pytest.approx(50 - 5)


def test_prefill_that_is_assumed_over_is_no_longer_pending_and_counts_no_ttft():
    state = make_state()
    request = arrive(state)
    state.observe(request, 0.0, hit_tokens=np.array([30.0, 0.0]))
    state.dispatch(request, 0, 0.0)
    assert value(state.observe(arrive(state), 0.1), "pending_prefill_tokens") == 70
    assert state.prefill_left_s(0) == pytest.approx(0.07)
    state.end_prefill(request)
    state.end_prefill(request)
    seen = state.observe(arrive(state), 0.1)
    assert value(seen, "pending_prefill_tokens") == 0
    assert value(seen, "recent_ttft_s") == 0
    state.first_token(request, 0.4)
    seen = state.observe(arrive(state), 0.5)
    assert value(seen, "pending_prefill_tokens") == 0
    assert value(seen, "recent_ttft_s") == pytest.approx(0.4)


def test_replicas_that_are_down_too_small_or_tried_before_are_masked():
    facts = fleet_facts(
        [
            Rates(prefill_tokens_per_s=1.0, decode_step_s=1.0, kv_capacity_tokens=size)
            for size in (148, 149, 0, 1000, 1000)
        ]
    )
    state = LiveState(facts, allow_hold=True)
    request = arrive(state)  # 100 + 50 - 1 tokens
    state.set_up(3, False)
    allowed = np.array([True, True, True, True, False])
    seen = state.observe(request, 0.0, allowed=allowed)
    assert seen.mask[0].tolist() == [False, True, True, False, False, True, False]
    assert seen.request[0, RequestFeature["NUM_UP"]] == 4
    assert not state.observe(request, 0.0, may_hold=False).mask[0, -2]


def test_the_cache_size_is_asked_of_the_engine_only_where_it_is_not_given():
    rates = {"prefill_tokens_per_s": 1.0, "decode_step_s": 1.0}
    state = LiveState(fleet_facts([Rates(**rates), Rates(**rates, kv_capacity_tokens=5)]))
    for r in (0, 1):
        state.update_metrics(r, EngineMetrics(0, 0, 0, kv_capacity_tokens=64), 0.0)
    seen = state.observe(arrive(state), 0.0)
    assert value(seen, "kv_capacity_tokens", 0) == 64
    assert value(seen, "kv_capacity_tokens", 1) == 5


def test_facts_of_known_hardware_are_the_simulators():
    scenario = load_scenario("hetero-prefix")
    engine = scenario.engine
    episode = scenario.episode(0, num_requests=10)
    simulator = Simulator(scenario.spec, [episode])
    simulator.advance()
    want = observe_batch(simulator, ALL)[0].replicas[0]
    fleet = [
        Hardware(
            gpu=entry.gpu,
            model=scenario.model,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
        )
        for entry in scenario.fleet
        for _ in range(entry.count)
    ]
    got = fleet_facts(fleet)
    assert len(got) == NUM_NOMINAL > 0
    for i in range(NUM_NOMINAL):
        name = REPLICA_FEATURES[FIRST_NOMINAL + i].name
        # the simulator rounds the cache to whole blocks
        tolerance = 1e-3 if name == "kv_capacity_tokens" else 1e-9
        np.testing.assert_allclose(got[i], want[FIRST_NOMINAL + i], rtol=tolerance, err_msg=name)


def test_half_the_speed_is_half_of_every_rate():
    known = {"gpu": "A40", "model": "Llama-3.1-8B"}
    fast, slow = fleet_facts([Hardware(**known), Hardware(**known, speed=0.5)]).T
    np.testing.assert_allclose(slow / fast, [0.5, 0.5, 2.0, 2.0, 1.0, 1.0, 1.0])
    assert fast[0] == 1.0
