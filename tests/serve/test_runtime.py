"""The runtime: the same choice as the policy, or the fallback's, and always counted why."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import Manifest
from servegym.policy.contract import FIRST_NOMINAL, NO_BOUND, Group, ReplicaFeature
from servegym.policy.policy import Observations
from servegym.serve.guards import BreakerConfig, Circuit, Reason
from servegym.serve.loaded_policy import LoadedPolicy
from servegym.serve.ranges import Ranges
from servegym.serve.runtime import PolicyRuntime, RuntimeConfig, in_share

from .observations import observe


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Scripted:
    """A policy that does as it is told."""

    name = "scripted"
    information = "metric"
    needs = Group.COUNTERS | Group.METRICS

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.action: int | Exception = 1
        self.takes_s = 0.0
        self.asked = 0

    def reset(self, num_envs: int, seed: int) -> None:
        """Nothing to forget."""

    def act(self, observations, env_ids):
        self.asked += 1
        self.clock.now_s += self.takes_s
        if isinstance(self.action, Exception):
            raise self.action
        return np.array([self.action])


def scripted(**settings) -> tuple[PolicyRuntime, Scripted, Clock]:
    """A runtime whose policy chooses replica 1 while its fallback, the least loaded, chooses 0."""
    clock = Clock()
    settings = {"policy": "round-robin", "fallback": "least-outstanding"} | settings
    runtime = PolicyRuntime(RuntimeConfig(**settings), clock)
    policy = Scripted(clock)
    runtime.install(LoadedPolicy("scripted", policy))
    return runtime, policy, clock


SEEN = observe([0, 5, 5])


def test_acts_by_the_policy():
    runtime, _, _ = scripted()
    assert runtime.decide(SEEN) == (1, "policy", Reason.POLICY, 0.0, 1, None, None)
    assert runtime.counters.num_policy == 1
    assert runtime.latency.count == 1


def test_explores_as_often_as_it_says_and_only_where_the_policy_decides():
    runtime, policy, _ = scripted(explored=0.3)
    found = [runtime.decide(SEEN) for _ in range(3000)]
    assert {d.by for d in found} == {"policy"}
    assert {d.proposed for d in found} == {1}
    stated = {d.action: d.propensity for d in found}
    assert stated == pytest.approx({0: 0.1, 1: 0.8, 2: 0.1})
    shares = {a: np.mean([d.action == a for d in found]) for a in stated}
    assert shares == pytest.approx(stated, abs=0.025)
    assert {d.reason for d in found if d.action != 1} == {Reason.EXPLORED}
    assert {d.reason for d in found if d.action == 1} == {Reason.POLICY}
    policy.action = RuntimeError("broken")
    assert runtime.decide(SEEN)[:3] == (0, "fallback", Reason.ERROR)
    assert runtime.decide(SEEN).propensity is None


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (observe([0, 5, 5], metrics_age_s=NO_BOUND), Reason.MISSING),
        (observe([0, 5, 5], metrics_age_s=5.1), Reason.STALE),
        (observe([0, 5, 5], metrics_age_s=np.nan), Reason.NAN),
        (observe([0, 5, 5], recent_ttft_s=np.nan), Reason.NAN),
        (observe([0, 5, 5], request={"waited_s": np.inf}), Reason.NAN),
        (Observations(SEEN.replicas[:, :20], SEEN.request, SEEN.mask), Reason.SCHEMA),
        (Observations(SEEN.replicas, SEEN.request[:, :3], SEEN.mask), Reason.SCHEMA),
        (Observations(SEEN.replicas[0], SEEN.request, SEEN.mask), Reason.SCHEMA),
    ],
)
def test_a_doubtful_state_is_left_to_the_fallback(seen, reason):
    runtime, policy, _ = scripted()
    decision = runtime.decide(seen)
    assert (decision.by, decision.reason) == ("fallback", reason)
    assert policy.asked == 0
    if reason is not Reason.SCHEMA:  # the fallback cannot read it either
        assert decision.action == 0
    assert SEEN.mask[0, decision.action]
    assert runtime.counters.by_reason[reason] == 1
    assert runtime.breaker.state(0.0) is Circuit.CLOSED  # the policy is not to blame


@pytest.mark.parametrize("name", ["round-robin", "added-delay"])
def test_rules_that_do_not_read_metrics_decide_without_any(name):
    runtime = PolicyRuntime(RuntimeConfig(policy=name))
    assert runtime.decide(observe([0, 5, 5], metrics_age_s=NO_BOUND)).by == "policy"


def test_only_replicas_that_may_be_chosen_can_be_stale():
    age = np.array([0.1, 99.0, 0.1])
    down = observe([0, 5, 5], metrics_age_s=age, up=np.array([1.0, 0.0, 1.0]))
    runtime, policy, _ = scripted()
    policy.action = 2
    assert runtime.decide(down).by == "policy"
    assert runtime.decide(observe([0, 5, 5], metrics_age_s=age)).reason is Reason.STALE


@pytest.mark.parametrize(
    ("action", "reason"),
    # of three replicas: to hold and to reject, which is not allowed here, and what is no action
    [(action, Reason.INVALID) for action in (3, 4, 5, -1, -7)],
)
def test_an_action_that_is_not_allowed_is_not_taken(action, reason):
    runtime, policy, _ = scripted()
    policy.action = action
    assert runtime.decide(SEEN)[:3] == (0, "fallback", reason)


def test_holds_and_rejects_where_allowed():
    runtime, policy, _ = scripted()
    seen = observe([0, 5], hold=True, reject=True)
    for action in (2, 3):
        policy.action = action
        assert runtime.decide(seen)[:2] == (action, "policy")


def test_a_policy_that_raises_does_no_harm():
    runtime, policy, _ = scripted()
    policy.action = ValueError("no")
    assert runtime.decide(SEEN)[:3] == (0, "fallback", Reason.ERROR)


def test_a_late_answer_is_taken_and_counted_until_the_breaker_opens():
    runtime, policy, clock = scripted(breaker=BreakerConfig(open_faults=3, cooldown_s=10.0))
    policy.takes_s = 0.021
    for _ in range(2):
        decision = runtime.decide(SEEN)
        assert decision[:3] == (1, "policy", Reason.TIMEOUT)
        assert decision.duration_s == pytest.approx(0.021)
    assert runtime.decide(SEEN).by == "fallback"  # the third opens it
    assert runtime.decide(SEEN)[:3] == (0, "fallback", Reason.BREAKER)
    assert policy.asked == 3
    clock.now_s += 10.0
    policy.takes_s = 0.0
    for _ in range(20):  # on trial it is asked, and watched
        assert runtime.decide(SEEN) == (0, "fallback", Reason.BREAKER, 0.0, 1, None, None)
    assert runtime.decide(SEEN).by == "policy"


def test_shadow_asks_and_counts_but_acts_by_the_fallback():
    runtime, policy, _ = scripted(mode="shadow")
    assert runtime.decide(SEEN) == (0, "fallback", Reason.SHADOW, 0.0, 1, None, None)
    policy.action = 0
    runtime.decide(SEEN)
    policy.action = 9
    assert runtime.decide(SEEN).reason is Reason.INVALID
    assert (runtime.counters.num_differed, runtime.counters.num_agreed) == (1, 1)
    policy.action, policy.takes_s = 1, 1.0
    assert runtime.decide(SEEN)[:3] == (0, "fallback", Reason.TIMEOUT)
    runtime.mode = "live"
    policy.takes_s = 0.0
    assert runtime.decide(SEEN).by == "policy"


def test_a_canary_share_is_told_by_the_key_and_only_grows():
    runtime, policy, _ = scripted(canary_fraction=0.2)
    keys = [f"request-{i}" for i in range(2000)]
    first = {key for key in keys if runtime.decide(SEEN, key).by == "policy"}
    assert 0.17 < len(first) / len(keys) < 0.23
    assert policy.asked == len(first)
    assert first == {key for key in keys if runtime.decide(SEEN, key).by == "policy"}
    assert first <= {key for key in keys if in_share(key, 0.5)}
    runtime.canary_fraction = 0.0
    assert {runtime.decide(SEEN, key).reason for key in keys} == {Reason.CANARY}


def test_no_replica_left_forces_hold_or_reject_without_asking():
    runtime, policy, _ = scripted()
    down = np.zeros(2)
    assert runtime.decide(observe([0, 0], up=down, hold=True)).action == 2
    assert runtime.decide(observe([0, 0], up=down, reject=True)).action == 3
    assert runtime.decide(observe([0, 0], up=down)).action == 3
    assert runtime.counters.by_reason[Reason.FORCED] == 3
    assert policy.asked == 0


def test_a_broken_fallback_leaves_the_allowed_replicas_in_turn(monkeypatch):
    runtime, policy, _ = scripted()
    policy.action = ValueError("no")

    def broken(observations, env_ids):
        raise RuntimeError

    monkeypatch.setattr(runtime.fallback, "act", broken)
    seen = observe([0, 5, 5], up=np.array([1.0, 0.0, 1.0]))
    decisions = [runtime.decide(seen) for _ in range(4)]
    assert [d.action for d in decisions] == [2, 0, 2, 0]
    assert {d.reason for d in decisions} == {Reason.LAST_RESORT}


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("least-outstandin", ConfigError, "did you mean least-outstanding"),
        ("what-if", ConfigError, "what-if cannot be live: it needs what only a simulator knows"),
        ("mct-oracle", ConfigError, "mct-oracle cannot be live"),
        ("nowhere/policy.onnx", ExportError, "must exist with a manifest.json beside it"),
    ],
)
def test_what_cannot_be_live_is_refused_in_one_sentence(text, kind, sentence):
    with pytest.raises(kind, match=sentence):
        PolicyRuntime(RuntimeConfig(policy=text))
    runtime = PolicyRuntime(RuntimeConfig(policy=text, require_policy=False))
    assert runtime.decide(SEEN)[:3] == (0, "fallback", Reason.NO_POLICY)
    runtime.reload("round-robin")
    assert runtime.decide(SEEN).by == "policy"


def test_a_fallback_must_be_a_rule():
    with pytest.raises(ConfigError, match="the fallback must be a rule by name"):
        PolicyRuntime(RuntimeConfig(fallback="x/policy.onnx"))


def test_a_reload_that_fails_keeps_the_old_policy(tmp_path):
    runtime, _, _ = scripted()
    (tmp_path / "policy.onnx").write_bytes(b"no graph")
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ExportError, match="not the file its manifest was written for"):
        runtime.reload(str(tmp_path / "policy.onnx"))
    assert runtime.loaded is not None
    assert runtime.loaded.text == "scripted"
    assert runtime.decide(SEEN).by == "policy"
    assert runtime.counters.num_refused == 1
    runtime.reload("added-delay:prefill=1.9")
    assert runtime.status()["policy"] == "added-delay:prefill=1.9"
    assert runtime.counters.num_reloads == 2


def test_every_rule_that_can_be_live_decides_as_in_the_simulator():
    from servegym.baselines.registry import RULES, policy

    seen = observe(
        [3, 1, 2], relative_speed=np.array([1.0, 0.2, 0.5]), num_running=np.array([3.0, 1.0, 2.0])
    )
    rules = {name: policy(name) for name in RULES.names()}
    live = {
        name: rule
        for name, rule in rules.items()
        if rule.information != "oracle" and not rule.needs & Group.WHAT_IF
    }
    assert live
    for name, rule in live.items():
        rule.reset(1, 0)
        runtime = PolicyRuntime(RuntimeConfig(policy=name))
        for _ in range(3):
            want = int(rule.act(seen, np.zeros(1, np.int64))[0])
            assert runtime.decide(seen)[:2] == (want, "policy"), name


class TestRanges:
    """Features far from what training has shown."""

    @staticmethod
    def runtime(**settings) -> PolicyRuntime:
        runtime, policy, _ = scripted(**settings)
        low, high = np.full(30, -1e12), np.full(30, 1e12)
        for name in ("OUTSTANDING_REQUESTS", "NUM_WAITING", "NUM_RUNNING"):
            low[ReplicaFeature[name]], high[ReplicaFeature[name]] = -10.0, 20.0
        high[21] = 4000.0  # prompt tokens
        runtime.install(LoadedPolicy("scripted", policy, None, Ranges(low, high)))
        return runtime

    def test_a_few_features_may_be_far(self):
        runtime = self.runtime(max_features_out=2)
        seen = observe([0, 21, 21], num_waiting=30)
        assert runtime.decide(seen).by == "policy"
        assert runtime.features_out == {"outstanding_requests": 1, "num_waiting": 1}

    def test_too_many_are_left_to_the_fallback(self):
        runtime = self.runtime(max_features_out=2)
        seen = observe([0, 21, 21], num_waiting=30, request={"prompt_tokens": 4001})
        assert runtime.decide(seen)[:3] == (0, "fallback", Reason.OUT_OF_RANGE)
        assert runtime.features_out["prompt_tokens"] == 1

    def test_replicas_that_are_down_do_not_count(self):
        runtime = self.runtime(max_features_out=0)
        up = np.array([1.0, 1.0, 0.0])
        assert runtime.decide(observe([0, 5, 21], up=up)).by == "policy"
        assert runtime.decide(observe([0, 5, 21])).reason is Reason.OUT_OF_RANGE

    def test_a_manifests_ranges_are_widened_by_their_width_or_by_what_never_matters(self):
        still, wide = (0.0, 0.0), (10.0, 30.0)
        manifest = Manifest(
            sha256="",
            replica_ranges=[wide if i == 1 else (0.0, 1e9) for i in range(21)],
            request_ranges=[still if i == 5 else (0.0, 1e9) for i in range(9)],  # waited_s
        )
        ranges = Ranges.of(manifest, 1.0)
        assert ranges.far(observe([49, 10])) == []
        assert ranges.far(observe([51, 10])) == ["outstanding_requests"]
        assert ranges.far(observe([49], request={"waited_s": 0.9})) == []
        assert ranges.far(observe([49], request={"waited_s": 1.1})) == ["waited_s"]
        assert Ranges.of(manifest, 0.0).far(observe([31])) == ["outstanding_requests"]
        assert Ranges.of(Manifest(sha256=""), 1.0) is None


class TestSilence:
    """A policy that never gets to decide is not kept quiet."""

    def test_it_is_said_after_so_many_decisions_and_when_it_is_over(self, caplog):
        runtime = TestRanges.runtime(max_features_out=0, silent_after_decisions=5)
        for _ in range(4):
            runtime.decide(observe([21]))
        assert not caplog.records
        for _ in range(200):
            runtime.decide(observe([21]))
        said = [record.getMessage() for record in caplog.records]
        assert [text.split(" decisions")[0].split()[-1] for text in said] == ["5", "50"]
        assert "scripted has not been asked in 5" in said[0]
        assert "out_of_range (outstanding_requests); least-outstanding decides" in said[0]
        assert (runtime.silence.num_in_row, runtime.silence.num_noticed) == (204, 1)
        assert runtime.status()["kept_out_in_row"] == 204
        caplog.clear()
        runtime.decide(observe([5, 0]))
        assert "asked again, after 204 decisions" in caplog.text
        assert runtime.silence.num_in_row == 0

    def test_single_doubts_are_no_news(self, caplog):
        runtime = TestRanges.runtime(max_features_out=0, silent_after_decisions=2)
        for _ in range(20):
            runtime.decide(observe([21, 0]))
            assert runtime.decide(observe([5, 0])).by == "policy"
        assert not caplog.records

    @pytest.mark.parametrize("reason", [Reason.MISSING, Reason.STALE, Reason.NAN])
    def test_every_doubt_about_the_state_counts(self, caplog, reason):
        runtime, _, _ = scripted(silent_after_decisions=3)
        age = {Reason.MISSING: NO_BOUND, Reason.STALE: 100.0, Reason.NAN: math.nan}[reason]
        for _ in range(3):
            assert runtime.decide(observe([0, 1], metrics_age_s=age)).reason is reason
        assert f"3 decisions in a row: {reason.value}; least-outstanding decides" in caplog.text

    def test_an_open_breaker_is_said(self, caplog):
        runtime, policy, _ = scripted(breaker={"open_faults": 2})
        policy.action = 7
        for _ in range(3):
            runtime.decide(SEEN)
        assert "scripted is out of service after faults (invalid_action)" in caplog.text

    def test_a_fleet_that_no_decision_can_be_about_is_said_at_once(self, caplog):
        runtime = TestRanges.runtime(max_features_out=2)
        rows = slice(FIRST_NOMINAL, FIRST_NOMINAL + 4)
        fleet = observe([0, 0, 0]).replicas[0].copy()
        runtime.meet(fleet)
        assert runtime.never_decides() is None
        fleet[rows] = 0.0
        assert runtime.never_decides() is None  # not yet known
        fleet[rows, 1] = 1e15
        reason = runtime.never_decides()
        assert "scripted can never decide for this fleet: relative_speed, " in reason
        assert not caplog.records
        runtime.install(runtime.loaded)
        assert reason in caplog.text
        fleet[rows.start : rows.start + 2] = 0.0
        assert runtime.never_decides() is None  # two may be far


def test_status_is_plain_json():
    runtime, _, _ = scripted()
    runtime.decide(SEEN)
    status = json.loads(json.dumps(runtime.status()))
    assert status["counters"]["reason_policy"] == 1
    assert status["breaker"] == "closed"
    assert Path(status["policy"]).name == "scripted"
