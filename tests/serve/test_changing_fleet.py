"""A dispatcher whose fleet changes: slots, what policies see, and what the log says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.cluster.state import EV_DISPATCH
from servegym.policy.contract import (
    NUM_REPLICA_FEATURES,
    NUM_UP,
    OUTSTANDING_PREDICTED_TOKENS,
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    RELATIVE_SPEED,
    UP,
)
from servegym.serve.decision_log import DecisionLogConfig, read_events, read_rows
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts, replica_facts
from servegym.serve.runtime import RuntimeConfig

SLOW = Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.02)
FAST = Rates(prefill_tokens_per_s=4000.0, decode_step_s=0.005)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def make(names=("a", "b", "c"), policy="least-outstanding", **more) -> Dispatcher:
    config = DispatchConfig(runtime=RuntimeConfig(policy=policy, fallback=policy), **more)
    facts = np.stack([replica_facts(SLOW)] * len(names), axis=1)
    return Dispatcher(config, names, facts, Clock())


def send(dispatcher: Dispatcher, name: str | None = None, key="k", prompt="hello"):
    """Place a request, where it is told to go if anywhere."""
    job = dispatcher.arrive(prompt, key=key)
    allowed = None
    if name is not None:
        allowed = np.array([named == name for named in dispatcher.names])
    dispatcher.decide(job, allowed=allowed)
    return job


class Seen:
    """Takes the place of a policy: notes the observations that it would have seen."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.seen = []
        self._decide = dispatcher.runtime.decide
        dispatcher.runtime.decide = self

    def __call__(self, observations, key, **settings):
        self.seen.append([array.copy() for array in observations])
        return self._decide(observations, key, **settings)


def test_a_replica_that_has_gone_leaves_no_gap_in_what_policies_see():
    dispatcher = make()
    seen = Seen(dispatcher)
    dispatcher.state.set_up(1, False)
    dispatcher.remove(1)
    assert dispatcher.names == ["a", "", "c"]
    assert dispatcher.slots() == [0, 2]
    job = send(dispatcher, "c")
    assert job.replica == 2
    replicas, request, mask = seen.seen[-1]
    assert replicas.shape == (1, NUM_REPLICA_FEATURES, 2)
    assert mask[0].tolist().count(True) == 1
    assert mask.shape == (1, 4)
    assert request[0, NUM_UP] == 2
    assert replicas[0, UP].tolist() == [1.0, 1.0]


def test_a_fleet_that_has_changed_looks_like_one_that_has_always_been_so():
    """`a` and `c` of three, beside `a` and `c` alone, through the same requests."""
    changed, always = make(policy="round-robin"), make(("a", "c"), policy="round-robin")
    changed.remove(1)
    changed.clock = always.clock = lambda: now[0]
    now = [100.0]
    seen = Seen(changed), Seen(always)
    jobs = []
    for i in range(6):
        now[0] += 0.25
        pair = [send(d, key=str(i), prompt=list(range(100 * i))) for d in (changed, always)]
        assert [changed.names[pair[0].replica], always.names[pair[1].replica]] == ["ac"[i % 2]] * 2
        jobs.append(pair)
        if i >= 2:
            for dispatcher, job in zip((changed, always), jobs[i - 2], strict=True):
                dispatcher.first_token(job)
                dispatcher.tokens(job, i)
                dispatcher.finish(job, i)
    assert len(seen[0].seen) == len(seen[1].seen) == 6
    for one, other in zip(seen[0].seen, seen[1].seen, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["add", "remove", "arrive", "arrive", "end"]), max_size=40))
def test_the_books_are_right_whatever_comes_and_goes(steps):
    dispatcher = make(("a", "b"), allow_reject=True)
    seen, jobs, leaving = Seen(dispatcher), [], set()
    for num, step in enumerate(steps):
        there = [slot for slot in dispatcher.slots() if slot not in leaving]
        if step == "add":
            dispatcher.add(f"n{num}", replica_facts(SLOW))
        elif step == "remove" and there:
            leaving.add(there[num % len(there)])
            dispatcher.state.set_up(there[num % len(there)], False)
        elif step == "arrive":
            job = send(dispatcher, key=str(num))
            replicas, _, mask = seen.seen[-1]
            assert replicas.shape[2] == len(mask[0]) - 2 == len(dispatcher.slots())
            assert mask[0, :-2].sum() == len(there)
            if there:
                assert job.replica in there
                jobs.append(job)
            else:
                assert job.ended
        elif step == "end" and jobs:
            dispatcher.finish(jobs.pop(num % len(jobs)), 3)
        for slot in [slot for slot in leaving if not dispatcher.state.outstanding(slot)]:
            leaving.remove(slot)
            dispatcher.remove(slot)
        at = [job.replica for job in jobs]
        assert {s: dispatcher.state.outstanding(s) for s in dispatcher.slots()} == {
            s: at.count(s) for s in dispatcher.slots()
        }
        assert len(dispatcher.names) == dispatcher.state.num_slots
        assert dispatcher.state.num_replicas == len([name for name in dispatcher.names if name])


def test_a_newcomer_takes_the_free_slot_and_inherits_nothing():
    dispatcher = make()
    prompt = list(range(640))
    dispatcher.index.resize(1, 100)
    job = send(dispatcher, "b", prompt=prompt)
    dispatcher.first_token(job)
    dispatcher.tokens(job, 7)
    assert dispatcher.index.sizes() == [0, 40, 0]
    dispatcher.finish(job, 7)
    assert dispatcher.state.describe(1)["recent_ttft_s"] > 0.0
    dispatcher.remove(1)
    assert dispatcher.add("d", replica_facts(SLOW)) == 1
    assert dispatcher.names == ["a", "d", "c"]
    assert dispatcher.index.sizes() == [0, 0, 0]
    assert dispatcher.state.outstanding(1) == 0
    fresh = Dispatcher(dispatcher.config, ["x"], replica_facts(SLOW)[:, None], Clock())
    assert dispatcher.state.describe(1) == fresh.state.describe(0)
    # with no slot free it is the fleet that grows
    assert dispatcher.add("e", replica_facts(SLOW)) == 3
    assert {send(dispatcher, key=str(i)).replica for i in range(4)} == {0, 1, 2, 3}


def test_requests_of_the_others_go_on_while_the_fleet_grows():
    dispatcher = make(("a",))
    job = send(dispatcher)
    for name in "bcd":
        dispatcher.add(name, replica_facts(SLOW))
    dispatcher.first_token(job)
    dispatcher.tokens(job, 5)
    assert dispatcher.state.outstanding(0) == 1
    dispatcher.finish(job, 5)
    counters = (
        OUTSTANDING_REQUESTS,
        OUTSTANDING_PROMPT_TOKENS,
        OUTSTANDING_PREDICTED_TOKENS,
        PENDING_PREFILL_TOKENS,
    )
    assert not dispatcher.state.replicas[list(counters)].any()


def test_a_slot_is_not_free_before_its_last_request_has_ended():
    dispatcher = make()
    job = send(dispatcher, "b")
    with pytest.raises(AssertionError):
        dispatcher.remove(1)
    dispatcher.end(job, "cancelled")
    dispatcher.remove(1)
    assert dispatcher.slots() == [0, 2]


def test_speeds_are_shares_of_the_fastest_that_is_there():
    dispatcher = make(("a",))
    speeds = dispatcher.state.replicas
    assert speeds[RELATIVE_SPEED].tolist() == [1.0]
    dispatcher.add("fast", replica_facts(FAST))
    both = fleet_facts([SLOW, FAST])[0]
    assert dispatcher.state.replicas[RELATIVE_SPEED].tolist() == both.tolist()
    assert both[0] == pytest.approx(0.25)  # a quarter of both rates
    dispatcher.remove(1)
    assert dispatcher.state.replicas[RELATIVE_SPEED].tolist() == [1.0, 0.0]


def test_a_dispatcher_may_begin_without_any_replica():
    dispatcher = Dispatcher(DispatchConfig(allow_reject=True), [], fleet_facts([]), Clock())
    assert send(dispatcher).ended  # rejected: there is nobody
    assert dispatcher.add("a", replica_facts(SLOW)) == 0
    assert send(dispatcher).replica == 0


@pytest.mark.parametrize("policy", ["round-robin", "weighted-round-robin", "sglang"])
def test_rules_that_count_replicas_go_round_those_that_are_there(policy):
    dispatcher = make(policy=policy)
    jobs = [send(dispatcher, key=str(i)) for i in range(4)]
    for job in jobs:
        dispatcher.end(job, "cancelled")
    dispatcher.remove(1)
    for name in "de":
        dispatcher.add(name, replica_facts(SLOW))
    chosen = [send(dispatcher, key=str(i)).replica for i in range(8)]
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_log_counts_replicas_among_those_there_and_names_them(tmp_path):
    log = DecisionLogConfig(folder=tmp_path, observations=True)
    dispatcher = make(log=log)
    dispatcher.finish(send(dispatcher, "c", key="first"), 3)
    dispatcher.remove(0)  # a
    dispatcher.finish(send(dispatcher, "c", key="second"), 3)
    dispatcher.finish(send(dispatcher, "b", key="third"), 3)
    dispatcher.add("d", replica_facts(SLOW))
    dispatcher.finish(send(dispatcher, "d", key="fourth"), 3)
    dispatcher.close()
    rows = {row["key"]: row for row in read_rows(tmp_path)}
    places = {key: (row["replica"], row["replica_name"]) for key, row in rows.items()}
    assert places == {
        "first": (2, "c"),
        "second": (1, "c"),
        "third": (0, "b"),
        "fourth": (0, "d"),
    }
    for row in rows.values():
        decision = row["decisions"][0]
        assert (decision["action"], decision["replica_name"]) == places[row["key"]]
        seen = decision["observation"]
        assert len(seen["replicas"]) == len(seen["mask"]) - 2
        assert seen["mask"].index(True) == decision["action"]
    assert len(rows["first"]["decisions"][0]["observation"]["replicas"]) == 3
    assert len(rows["third"]["decisions"][0]["observation"]["replicas"]) == 2


def test_events_number_replicas_by_name_if_the_fleet_has_changed(tmp_path):
    dispatcher = make(log=DecisionLogConfig(folder=tmp_path, max_file_rows=2))
    for name in "cb":
        dispatcher.finish(send(dispatcher, name), 3)
    dispatcher.remove(0)
    dispatcher.finish(send(dispatcher, "c"), 3)
    dispatcher.close()
    before, after = sorted(tmp_path.iterdir())
    assert places(before) == [2, 1]  # as counted: nothing has changed
    assert places(after) == [1]
    assert places(tmp_path) == [0, 1, 0]  # c, b, c


def places(path) -> list[int]:
    events = read_events(path)
    return events["replica"][events["kind"] == EV_DISPATCH].tolist()
