"""The plug-in around a scheduler that decides as vLLM does."""

from __future__ import annotations

import csv
import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import servegym.serve.vllm
from servegym.errors import ConfigError
from servegym.policy.ordering import OrderingFeature
from servegym.serve.vllm import scheduler as scheduler_module
from servegym.serve.vllm.scheduler import make_scheduler, order_by_policy

from .fake_engine import FakeQueue, FakeRequest, FakeScheduler

WAITED = int(OrderingFeature["WAITED_S"])


class Fixed:
    """Scores by a table of its own."""

    name = "fixed"
    information = "blind"
    memory_size = 0

    def __init__(self, score):
        self.score_of = score
        self.calls = 0

    def score(self, features, memory):
        self.calls += 1
        return self.score_of(features)


@pytest.fixture
def make(monkeypatch):
    """Make a scheduler with the plug-in; `policy` may be a scoring function."""

    def build(policy="srpt", sizes=None, **settings):
        if callable(policy):
            fixed = Fixed(policy)
            monkeypatch.setattr(scheduler_module, "load_policy", lambda text: fixed)
        name = policy if isinstance(policy, str) else "fixed"
        config = SimpleNamespace(additional_config={"servegym": {"policy": name, **settings}})
        return order_by_policy(FakeScheduler)(config, **(sizes or {}))

    return build


def run(scheduler, limit=2000):
    for _ in range(limit):
        if not scheduler.requests:
            return
        scheduler.step()
    raise AssertionError(f"{len(scheduler.requests)} requests never ended")


def test_the_policy_decides_who_is_admitted(make):
    scheduler = make("srpt", {"max_num_running_reqs": 1})
    for name, tokens in (("long", 9), ("short", 2), ("middle", 5)):
        scheduler.add_request(FakeRequest(name, max_tokens=tokens))
    run(scheduler)
    assert scheduler.finished == ["short", "middle", "long"]


def test_the_policy_decides_who_is_preempted(make):
    # 6 blocks of 4: two prompts of 8 fit with one block each for their outputs
    scheduler = make("srpt", {"num_blocks": 5})
    scheduler.add_request(FakeRequest("old and long", 1.0, max_tokens=12))
    scheduler.add_request(FakeRequest("new and short", 2.0, max_tokens=7))
    preempted = []
    while scheduler.requests:
        preempted += scheduler.step().preempted_req_ids
    assert preempted == ["old and long"]
    statistics = scheduler.plugin.statistics()
    assert (statistics["num_preempted"], statistics["num_preempted_agreed"]) == (1, 1)


def test_fcfs_preempts_the_latest(make):
    scheduler = make("fcfs", {"num_blocks": 5})
    scheduler.add_request(FakeRequest("old and long", 1.0, max_tokens=12))
    scheduler.add_request(FakeRequest("new and short", 2.0, max_tokens=7))
    preempted = []
    while scheduler.requests:
        preempted += scheduler.step().preempted_req_ids
    assert set(preempted) == {"new and short"}


def test_the_clients_priority_stays_a_feature(make):
    scheduler = make("priority", {"max_num_running_reqs": 1})
    for name, priority in (("a", 7), ("b", -3), ("c", 2)):
        scheduler.add_request(FakeRequest(name, priority=priority))
    run(scheduler)
    # by the second step all priorities have been overwritten with places
    assert scheduler.finished == ["b", "c", "a"]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=25),
    order=st.sampled_from(["fcfs", "srpt", "sjf", "random", "ltr:starvation=3,period=2", "mlfq"]),
    num_blocks=st.integers(8, 20),
)
def test_nothing_is_lost_and_the_engine_obeys(lengths, order, num_blocks):
    config = SimpleNamespace(additional_config={"servegym": {"policy": order}})
    scheduler = order_by_policy(FakeScheduler)(config, num_blocks=num_blocks)
    for i, (prompt, output) in enumerate(lengths):
        arrived = FakeRequest(str(i), float(i), num_prompt_tokens=prompt, max_tokens=output)
        scheduler.add_request(arrived)
        scheduler.step()
    run(scheduler)
    assert sorted(scheduler.finished, key=int) == [str(i) for i in range(len(lengths))]
    told = scheduler.plugin.statistics()
    assert told["num_admitted"] == told["num_admitted_agreed"]
    assert told["num_preempted"] == told["num_preempted_agreed"]
    assert told["num_faults"] == told["num_fallback_steps"] == 0


def test_the_policy_is_asked_only_when_something_can_come_of_it(make):
    scheduler = make("srpt", {"max_num_running_reqs": 2})
    asked = []
    for i in range(4):
        scheduler.add_request(FakeRequest(str(i), max_tokens=(5, 3, 4, 4)[i]))
    while scheduler.requests:
        before = scheduler.plugin.counts.num_asked
        scheduler.step()
        asked.append(scheduler.plugin.counts.num_asked - before)
    # at the start; when the first of two has ended and two others wait; never for the last one
    assert asked == [1, 0, 0, 1, 0, 0, 0, 0, 0]


def test_a_policy_with_a_memory_is_asked_at_every_step(make):
    scheduler = make("mlfq")
    scheduler.add_request(FakeRequest("a", max_tokens=5))
    run(scheduler)
    assert scheduler.plugin.counts.num_asked == scheduler.plugin.counts.num_steps == 5


def explode(features):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    "broken",
    [
        explode,
        lambda features: np.full(len(features), np.nan),
        lambda features: np.zeros(len(features) + 1),
    ],
    ids=["raises", "not finite", "wrong shape"],
)
def test_a_broken_policy_is_replaced_by_fcfs(make, caplog, broken):
    def works_at_start(features):
        return broken(features) if features.shape != (3, features.shape[1]) else np.zeros(3)

    scheduler = make(works_at_start, {"max_num_running_reqs": 2, "num_blocks": 12})
    for i, priority in enumerate((3, 2, 1, 0)):
        scheduler.add_request(FakeRequest(str(i), float(i), priority=priority, max_tokens=8))
    with caplog.at_level(logging.ERROR, "vllm.servegym"):
        for _ in range(6):
            scheduler.step()
    assert [r.request_id for r in scheduler.running] == ["0", "1"]
    statistics = scheduler.plugin.statistics()
    assert statistics["num_policy_steps"] == 0
    assert statistics["num_fallback_steps"] == 6
    # five faults open the breaker; the sixth step does not ask
    assert statistics["num_faults"] == 5
    assert statistics["circuit"] == "open"
    assert [r.message for r in caplog.records if "fault" in r.message] == [
        "servegym: the policy failed, the fallback orders this step (fault 1)",
        "servegym: the policy failed, the fallback orders this step (fault 5)",
    ]


def test_the_fallback_may_follow_the_clients_priority(make):
    scheduler = make(
        lambda features: np.zeros(3) if len(features) == 3 else explode(features),
        {"max_num_running_reqs": 1},
        fallback="priority",
    )
    for i, priority in enumerate((3, 2, 1, 0)):
        scheduler.add_request(FakeRequest(str(i), float(i), priority=priority))
    scheduler.step()
    assert [r.request_id for r in scheduler.running] == ["3"]


def test_a_policy_that_recovers_is_taken_back_after_a_trial(make, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("servegym.serve.vllm.plugin.time.monotonic", lambda: now_s[0])
    broken = [False]
    scheduler = make(
        lambda features: (
            explode(features) if broken[0] else -features[:, OrderingFeature["WAITED_S"]]
        ),
        {"num_blocks": 12},
        breaker={"open_faults": 2, "cooldown_s": 5.0, "close_successes": 3},
    )
    for i in range(2):
        scheduler.add_request(FakeRequest(str(i), max_tokens=14))
    circuits = []
    for step in range(12):
        broken[0] = step in (1, 2)
        now_s[0] += 1.0
        scheduler.step()
        circuits.append(scheduler.plugin.statistics()["circuit"])
    # two faults; five seconds out of service; three good decisions on trial
    wanted = ["closed"] * 2 + ["open"] * 5 + ["half_open"] * 2 + ["closed"] * 3
    assert circuits == wanted
    assert scheduler.plugin.statistics()["num_breaker_opened"] == 1


def test_shadow_mode_changes_nothing_and_counts_agreement(make):
    scheduler = make("srpt", {"max_num_running_reqs": 1}, shadow=True)
    for name, priority, tokens in (("a", 2, 1), ("b", 1, 5), ("c", 0, 9)):
        scheduler.add_request(FakeRequest(name, priority=priority, max_tokens=tokens))
    run(scheduler)
    assert scheduler.finished == ["c", "b", "a"]
    told = scheduler.plugin.statistics()
    assert told["num_policy_steps"] == told["num_fallback_steps"] == 0
    # neither was SRPT's choice; the last one was nobody's: there was no other
    assert (told["num_admitted"], told["num_admitted_agreed"]) == (2, 0)


def test_an_engine_that_preempts_otherwise_is_found_out(make, monkeypatch):
    scheduler = make("srpt", {"num_blocks": 5})
    scheduler.add_request(FakeRequest("old and long", 1.0, max_tokens=12))
    scheduler.add_request(FakeRequest("new and short", 2.0, max_tokens=7))
    monkeypatch.setitem(
        sys.modules[type(scheduler).__mro__[1].__module__].__dict__,
        "max",
        lambda running, key: min(running, key=key),
    )
    while not scheduler.plugin.statistics()["num_preempted"]:
        scheduler.step()
    told = scheduler.plugin.statistics()
    assert told["num_preempted_agreed"] == 0
    assert told["num_faults"] == 1


def test_without_priority_mode_only_shadowing_is_allowed(make, monkeypatch):
    def fcfs_mode(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.waiting = []

    original = FakeScheduler.__init__
    monkeypatch.setattr(FakeScheduler, "__init__", fcfs_mode)
    with pytest.raises(ConfigError, match="--scheduling-policy priority, or set shadow"):
        make("srpt")
    assert make("srpt", shadow=True).schedule().num_scheduled_tokens == {}


def test_a_scheduler_without_a_known_part_is_refused(make, monkeypatch):
    monkeypatch.setattr(
        FakeScheduler, "kv_cache_manager", SimpleNamespace(free_blocks=0), raising=True
    )
    with pytest.raises(ConfigError, match=r"has no kv_cache_manager\.usage; start without"):
        make("srpt")


def test_the_step_log_is_what_calibration_reads(make, tmp_path):
    path = tmp_path / "steps.csv"
    scheduler = make("fcfs", step_log=str(path))
    scheduler.add_request(FakeRequest("a", num_prompt_tokens=20, max_tokens=3))
    run(scheduler)
    scheduler.shutdown()
    assert scheduler.closed
    with path.open(newline="") as file:
        rows = [
            [*map(int, (r["prefill_tokens"], r["decode_sequences"], r["kv_tokens"]))]
            for r in csv.DictReader(file)
        ]
    # a budget of 16: two chunks, the second ends with the first token; then two decodes
    assert rows == [[16, 0, 0], [4, 0, 0], [0, 1, 21], [0, 1, 22]]


def test_statistics_are_written_at_each_report_and_at_the_end(make, tmp_path):
    path = tmp_path / "stats.json"
    scheduler = make("sjf", stats_file=str(path), report_every_s=1e-9)
    for name in ("a", "b"):
        scheduler.add_request(FakeRequest(name))
    scheduler.step()
    assert json.loads(path.read_text())["num_policy_steps"] == 1
    run(scheduler)
    scheduler.shutdown()
    told = json.loads(path.read_text())
    assert told["policy"] == "sjf"
    # after the first step nobody waits, and there are blocks for all
    assert (told["num_steps"], told["num_asked"], told["num_policy_steps"]) == (4, 1, 1)
    assert 0 < told["policy_p50_us"] <= told["policy_p99_us"]


def test_statistics_that_cannot_be_written_do_not_stop_serving(make, tmp_path, caplog):
    scheduler = make("sjf", stats_file=str(tmp_path / "no" / "stats.json"), report_every_s=1e-9)
    scheduler.add_request(FakeRequest("a"))
    with caplog.at_level(logging.WARNING, "vllm.servegym"):
        run(scheduler)
    assert scheduler.finished == ["a"]
    assert "cannot be written" in caplog.text


@pytest.fixture
def fake_vllm(monkeypatch):
    """Put modules with vLLM's names in place."""
    names = ("config", "sampling_params", "v1", "v1.core", "v1.core.sched", "v1.request")
    sched = ("async_scheduler", "request_queue", "scheduler")
    modules = {
        f"vllm.{name}": ModuleType(f"vllm.{name}")
        for name in (*names, *(f"v1.core.sched.{name}" for name in sched))
    }
    modules["vllm"] = ModuleType("vllm")
    modules["vllm"].__version__ = "0.32.0"
    modules["vllm.sampling_params"].SamplingParams = SimpleNamespace
    modules["vllm.v1.core.sched.async_scheduler"].AsyncScheduler = FakeScheduler
    modules["vllm.v1.core.sched.scheduler"].Scheduler = type("Plain", (FakeScheduler,), {})
    queue = modules["vllm.v1.core.sched.request_queue"]
    queue.SchedulingPolicy = SimpleNamespace(PRIORITY="priority")
    queue.create_request_queue = lambda policy: FakeQueue()
    modules["vllm.v1.request"].Request = lambda request_id, arrival_time, **_: FakeRequest(
        request_id, arrival_time
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    make_scheduler.cache_clear()
    yield modules
    make_scheduler.cache_clear()


def test_vllm_finds_both_classes_by_name(fake_vllm):
    overlapped = servegym.serve.vllm.PolicyScheduler
    assert overlapped.__name__ == "PolicyScheduler"
    assert overlapped.__mro__[1] is FakeScheduler
    assert servegym.serve.vllm.PolicySyncScheduler.__mro__[1].__name__ == "Plain"
    assert servegym.serve.vllm.PolicyScheduler is overlapped
    with pytest.raises(AttributeError, match="no attribute Other"):
        servegym.serve.vllm.Other


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0"])
def test_an_unknown_version_is_refused(fake_vllm, version):
    fake_vllm["vllm"].__version__ = version
    with pytest.raises(ConfigError, match=rf"knows vLLM 0\.32\.x, this is {version}"):
        servegym.serve.vllm.PolicyScheduler


def test_a_queue_that_goes_by_something_else_is_refused(fake_vllm, monkeypatch):
    monkeypatch.setattr(FakeRequest, "__lt__", lambda self, other: id(self) < id(other))
    monkeypatch.setattr(
        FakeRequest, "__lt__", lambda self, other: self.arrival_time < other.arrival_time
    )
    with pytest.raises(ConfigError, match="does not go by priority"):
        servegym.serve.vllm.PolicyScheduler


def test_a_queue_without_its_list_is_refused(fake_vllm, monkeypatch):
    monkeypatch.setattr(FakeQueue, "_heap", (), raising=False)
    monkeypatch.setattr(FakeQueue, "__init__", lambda self: None)
    monkeypatch.setattr(FakeQueue, "add_request", lambda self, request: None)
    with pytest.raises(ConfigError, match="keeps no list of its requests"):
        servegym.serve.vllm.PolicyScheduler
