"""The Ray Serve adapter, with stand-ins for Ray's classes."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

import servegym.serve.ray_serve as module
from servegym.errors import ConfigError
from servegym.policy.contract import ReplicaFeature
from servegym.serve.ray_serve import (
    Described,
    RayFleet,
    describe_openai,
    read_ray_config,
)
from servegym.serve.requests.prompt import chat_text

RATES = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.02, "kv_capacity_tokens": 100_000}
SLOW = {**RATES, "prefill_tokens_per_s": 250.0, "decode_step_s": 0.08}


def kwargs(policy="least-outstanding", **more):
    return {
        "replica": RATES,
        "dispatch": {"runtime": {"policy": policy}},
        **more,
    }


def fleet(policy="least-outstanding", **more):
    return RayFleet(read_ray_config(kwargs(policy, **more)))


def test_requests_go_where_the_policy_says_and_the_books_close():
    f = fleet()
    f.update({"a": {}, "b": {}})
    first = f.choose("1", ["hello"], {}, ["a", "b"])
    f.routed("1", first)
    second = f.choose("2", ["hello"], {}, ["a", "b"])
    f.routed("2", second)
    assert {first, second} == {"a", "b"}
    f.completed("1")
    assert f.choose("3", ["hello"], {}, ["a", "b"]) == first
    f.routed("3", first)
    for key in ("2", "3"):
        f.completed(key)
    assert [f.dispatcher.state.outstanding(slot) for slot in f.dispatcher.slots()] == [0, 0]
    assert not any(f.knows(key) for key in "123")


def test_only_candidates_are_chosen():
    f = fleet()
    f.update({"a": {}, "b": {}})
    assert [f.choose(str(i), [""], {}, ["b"]) for i in range(3)] == ["b"] * 3
    assert f.choose("x", [""], {}, ["never seen"]) is None


def test_a_request_that_another_replica_took_is_booked_there():
    f = fleet()
    f.update({"a": {}, "b": {}})
    chosen = f.choose("1", ["hello"], {}, ["a", "b"])
    other = "b" if chosen == "a" else "a"
    f.routed("1", other)
    # the chosen one is free again, so it is next
    assert f.choose("2", ["hello"], {}, ["a", "b"]) == chosen


def test_a_replica_may_say_what_it_is():
    f = fleet("speed-family")
    f.update({"slow": {"rates": SLOW}, "fast": {}})
    view = f.dispatcher.state.replicas
    speeds = view[ReplicaFeature["RELATIVE_SPEED"], :2]
    assert speeds[1] == 1.0
    assert 0.2 < speeds[0] < 0.3
    # the fast one is worth about four slow ones
    picks = [f.choose(str(i), ["hello"], {}, ["slow", "fast"]) for i in range(3)]
    assert picks == ["fast"] * 3


def test_metrics_count_from_when_they_were_new():
    f = fleet()
    stats = {"num_running": 3, "num_waiting": 1, "kv_cache_usage": 0.5}
    f.update({"a": stats})
    told_s = f.dispatcher.clock() - f.dispatcher.state.metrics_age_s(0, f.dispatcher.clock())
    f.update({"a": stats})
    clock = f.dispatcher.clock()
    assert clock - f.dispatcher.state.metrics_age_s(0, clock) == pytest.approx(told_s)
    assert f.dispatcher.state.replicas[ReplicaFeature["NUM_RUNNING"], 0] == 3


def test_replicas_come_and_go():
    f = fleet()
    f.update({"a": {"num_running": 9, "num_waiting": 9, "kv_cache_usage": 1}, "b": {}})
    f.routed("1", f.choose("1", ["x"], {}, ["a"]))
    f.update({"b": {}})
    assert f.choose("2", ["x"], {}, ["b"]) == "b"
    # the slot of the one that is gone is not given on while a request counts there
    f.update({"b": {}, "c": {}})
    assert f.dispatcher.names == ["a", "b", "c"]
    assert f.dispatcher.state.outstanding(0) == 1
    f.completed("1")
    f.completed("2")
    f.update({"b": {}, "c": {}, "d": {}})
    assert f.dispatcher.names == ["d", "b", "c"]
    assert f.dispatcher.state.replicas[ReplicaFeature["NUM_RUNNING"], 0] == 0
    assert f.dispatcher.state.metrics_age_s(0, f.dispatcher.clock()) > 1e6
    picks = {f.choose(str(i), ["x"], {}, ["b", "c", "d"]) for i in range(10, 13)}
    assert picks == {"b", "c", "d"}


def test_a_request_given_up_leaves_the_books():
    f = fleet()
    f.update({"a": {}})
    f.choose("1", ["x"], {}, ["a"])
    assert f.dispatcher.state.outstanding(0) == 1
    f.cancelled("1")
    f.completed("1")
    assert f.dispatcher.state.outstanding(0) == 0


PICTURE = {"type": "image_url", "image_url": {"url": "A" * 400_000}}
TALK = [{"role": "user", "content": [PICTURE]}, {"role": "assistant", "content": "a cat"}]


@pytest.mark.parametrize(
    ("arguments", "keywords", "wanted"),
    [
        (["hello"], {}, Described("hello")),
        ([{"prompt": "hello", "max_tokens": 7}], {}, Described("hello", 7)),
        ([{"prompt": [3, 4]}], {}, Described([3, 4])),
        ([], {"request": {"messages": TALK}}, Described(chat_text(TALK))),
        (
            [SimpleNamespace(messages=[SimpleNamespace(**TALK[0])], max_completion_tokens=3)],
            {},
            Described(chat_text(TALK[:1]), 3),
        ),
        ([object()], {}, Described("")),
        ([], {}, Described("")),
    ],
)
def test_openai_requests_are_described(arguments, keywords, wanted):
    assert describe_openai(arguments, keywords) == wanted


def only_tenant(arguments, keywords):
    return Described("x", tenant="me")


def test_another_description_may_be_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(only_tenant=only_tenant))
    f = fleet(describe="mine:only_tenant")
    f.update({"a": {}})
    f.choose("1", [], {}, ["a"])
    assert f._jobs["1"].tenant == "me"
    with pytest.raises(ConfigError, match=r"must be like package\.module:function"):
        fleet(describe="mine:no_such")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "replica"),
        ({"replica": RATES, "polcy": 1}, "polcy"),
        ({"replica": RATES, "dispatch": {"allow_reject": True}}, "cannot reject"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        read_ray_config(given)


class FakeRouter:
    """As much of Ray's `RequestRouter` as its subclass needs."""


@pytest.fixture
def router(monkeypatch):
    for name in ("ray", "ray.serve", "ray.serve.request_router"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["ray.serve.request_router"].RequestRouter = FakeRouter
    module._router_class.cache_clear()
    made = module.PolicyRequestRouter()
    made.initialize_state(**kwargs())
    yield made
    module._router_class.cache_clear()


def replica(name):
    return SimpleNamespace(replica_id=name, routing_stats={})


def pending(key):
    future = asyncio.get_running_loop().create_future()
    metadata = SimpleNamespace(internal_request_id=key)
    return SimpleNamespace(args=["x"], kwargs={}, metadata=metadata, future=future)


def test_the_router_ranks_the_choice_first_and_keeps_books(router):
    async def drive():
        candidates = [replica("a"), replica("b")]
        one, two = pending("1"), pending("2")
        ranks = await router.choose_replicas(candidates, one)
        first = ranks[0][0].replica_id
        assert [len(rank) for rank in ranks] == [1, 1]
        router.on_request_routed(one, first, None)
        ranks = await router.choose_replicas(candidates, two)
        assert ranks[0][0].replica_id != first
        two.future.cancel()
        await asyncio.sleep(0.01)
        state = router.fleet.dispatcher.state
        assert sum(map(state.outstanding, router.fleet.dispatcher.slots())) == 1
        # the prompt's time at the known rate is over: it no longer counts as pending
        assert state.replicas[ReplicaFeature["PENDING_PREFILL_TOKENS"]].sum() == 0
        await asyncio.to_thread(router.on_request_completed, first, "1")
        await asyncio.sleep(0.01)
        assert sum(map(state.outstanding, router.fleet.dispatcher.slots())) == 0
        assert await router.choose_replicas(candidates, None) == [candidates]
        assert await router.choose_replicas([], pending("3")) == []

    asyncio.run(drive())


def test_ray_finds_the_class_by_name(router):
    assert type(router) is module.PolicyRequestRouter
    assert f"{type(router).__module__}.{type(router).__qualname__}" == (
        "servegym.serve.ray_serve.PolicyRequestRouter"
    )
    with pytest.raises(AttributeError, match="no attribute Other"):
        module.Other


def test_the_installed_ray_has_what_the_adapter_overrides():
    routers = pytest.importorskip("ray.serve.request_router")
    for name in (
        "initialize_state",
        "choose_replicas",
        "on_request_routed",
        "on_request_completed",
    ):
        assert hasattr(routers.RequestRouter, name)
