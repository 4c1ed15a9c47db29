"""The LiteLLM adapter, with stand-ins for LiteLLM's classes."""

from __future__ import annotations

import asyncio
import inspect
import sys
from datetime import datetime, timedelta
from types import ModuleType, SimpleNamespace

import pytest

from servegym.errors import ConfigError
from servegym.policy.contract import ReplicaFeature
from servegym.serve.litellm import LiteLLMConfig, PolicyStrategy, install, prompt_text
from servegym.serve.requests.prompt import chat_text

RATES = {"prefill_tokens_per_s": 1e6, "decode_step_s": 0.02, "kv_capacity_tokens": 100_000}


class FakeLiteLLM:
    """As much of `litellm.Router` as the strategy needs."""

    def __init__(self, ids=("a", "b")):
        self.model_list = [{"model_name": "m", "model_info": {"id": name}} for name in ids]
        self.healthy = list(ids)
        self.strategy = None

    async def async_get_healthy_deployments(self, model, request_kwargs, **_):
        if request_kwargs.get("pinned"):
            return self.model_list[1]
        return [d for d in self.model_list if d["model_info"]["id"] in self.healthy]

    def set_custom_routing_strategy(self, strategy):
        self.strategy = strategy


def make(policy="least-outstanding", router=None, **more):
    config = {
        "deployments": {"a": {"rates": RATES}, "b": {"rates": RATES}},
        "dispatch": {"runtime": {"policy": policy}, **more.pop("dispatch", {})},
        **more,
    }
    return PolicyStrategy(router or FakeLiteLLM(), LiteLLMConfig.model_validate(config))


async def ask(strategy, request=None, **kwargs):
    kwargs = {"messages": [{"role": "user", "content": "hello there"}], **kwargs}
    chosen = await strategy.async_get_available_deployment(
        model="m", request_kwargs={} if request is None else request, **kwargs
    )
    return chosen["model_info"]["id"]


def answer(tokens):
    return SimpleNamespace(usage=SimpleNamespace(completion_tokens=tokens, prompt_tokens=11))


def outstanding(strategy):
    return [strategy.dispatcher.state.outstanding(i) for i in range(2)]


def test_requests_go_where_the_policy_says_and_the_books_close():
    async def drive():
        strategy = make()
        requests = [{} for _ in range(3)]
        first = await ask(strategy, requests[0])
        second = await ask(strategy, requests[1])
        assert {first, second} == {"a", "b"}
        strategy.ended(requests[1], answer(5), None)
        assert await ask(strategy, requests[2]) == second
        strategy.ended(requests[0], answer(7), None)
        strategy.failed(requests[2])
        assert outstanding(strategy) == [0, 0]
        # the call's id is how the end is matched to the beginning
        assert len({r["litellm_call_id"] for r in requests}) == 3
        strategy.ended(requests[0], answer(7), None)
        strategy.ended({}, answer(7), None)
        assert outstanding(strategy) == [0, 0]

    asyncio.run(drive())


def test_deployments_in_cooldown_are_left_out():
    async def drive():
        router = FakeLiteLLM()
        strategy = make(router=router)
        router.healthy = ["b"]
        assert [await ask(strategy) for _ in range(3)] == ["b"] * 3

    asyncio.run(drive())


def test_deployments_that_are_not_ours_are_left_to_chance():
    async def drive():
        router = FakeLiteLLM(("a", "b", "other"))
        router.healthy = ["other"]
        strategy = make(router=router)
        assert await ask(strategy) == "other"
        assert outstanding(strategy) == [0, 0]
        assert not strategy._jobs

    asyncio.run(drive())


def test_a_pinned_deployment_is_not_decided_about():
    async def drive():
        strategy = make()
        assert await ask(strategy, {"pinned": True}) == "b"
        assert outstanding(strategy) == [0, 0]

    asyncio.run(drive())


def test_a_retry_is_the_same_request():
    async def drive():
        strategy = make()
        request = {}
        await ask(strategy, request)
        await ask(strategy, request)
        assert sum(outstanding(strategy)) == 1
        assert strategy._jobs[request["litellm_call_id"]].num_retries == 1

    asyncio.run(drive())


def test_latencies_are_learned_from_streams():
    async def drive():
        strategy = make(dispatch={"prediction": {"min_answers": 1}})
        request = {"stream": True}
        chosen = await ask(strategy, request)
        await asyncio.sleep(0.05)
        strategy.ended(request, answer(5), datetime.now() - timedelta(seconds=0.04))
        column = ["a", "b"].index(chosen)
        view = strategy.dispatcher.state.replicas
        assert 0.005 < view[ReplicaFeature["RECENT_TTFT_S"], column] < 5.0  # a busy machine is late
        # four tokens after the first in 0.04 s
        assert 0.009 < view[ReplicaFeature["RECENT_TPOT_S"], column] < 5.0
        assert strategy.dispatcher.predictor.predict("default", 0) == pytest.approx(5.0)

    asyncio.run(drive())


def test_prompts_count_as_computed_after_their_time_at_the_known_rate():
    async def drive():
        strategy = make()
        await ask(strategy)
        view = strategy.dispatcher.state.replicas
        assert view[ReplicaFeature["PENDING_PREFILL_TOKENS"]].sum() > 0
        await asyncio.sleep(0.01)
        assert view[ReplicaFeature["PENDING_PREFILL_TOKENS"]].sum() == 0

    asyncio.run(drive())


def test_requests_of_clients_that_went_away_are_forgotten():
    async def drive():
        strategy = make(forget_after_s=0.02)
        await ask(strategy)
        await asyncio.sleep(0.03)
        await ask(strategy)
        assert sum(outstanding(strategy)) == 1

    asyncio.run(drive())


class Hold:
    """Holds twice, then takes the first replica, or rejects."""

    name = "hold"
    information = "blind"
    needs = 1

    def __init__(self, then):
        self.then = then
        self.calls = 0

    def reset(self, num_envs, seed):
        pass

    def act(self, observations, env_ids):
        self.calls += 1
        hold = observations.mask.shape[1] - 2
        return [hold if self.calls < 3 else self.then]


def test_a_policy_may_hold_and_reject(monkeypatch):
    fake = ModuleType("litellm")
    fake.RateLimitError = type(
        "RateLimitError", (Exception,), {"__init__": lambda self, message, **_: None}
    )
    monkeypatch.setitem(sys.modules, "litellm", fake)

    async def drive(then):
        strategy = make(hold_s=0.01, dispatch={"allow_hold": True, "allow_reject": True})
        policy = Hold(then)
        loaded = strategy.dispatcher.runtime.loaded
        strategy.dispatcher.runtime.install(type(loaded)("hold", policy))
        chosen = await ask(strategy)
        assert policy.calls == 3
        return chosen

    assert asyncio.run(drive(0)) in ("a", "b")  # the first it was shown
    with pytest.raises(fake.RateLimitError):
        asyncio.run(drive(3))  # of two replicas


TALK = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "A" * 400_000}}]},
    {"role": "assistant", "content": "a cat"},
]


@pytest.mark.parametrize(
    ("messages", "given", "wanted"),
    [
        (TALK, None, chat_text(TALK)),
        (None, "text", "text"),
        (None, [1, 2], [1, 2]),
        (None, ["a", "b"], "a\nb"),
        (None, None, ""),
    ],
)
def test_prompts_are_found(messages, given, wanted):
    assert prompt_text(messages, given) == wanted


def test_deployments_must_be_known_and_described():
    with pytest.raises(ConfigError, match="unknown deployment 'b': choose one of a"):
        make(router=FakeLiteLLM(("a",)))
    config = LiteLLMConfig.model_validate({"deployments": {"a": {}}})
    with pytest.raises(ConfigError, match="needs either hardware or rates"):
        PolicyStrategy(FakeLiteLLM(), config)


def test_polling_needs_the_address_of_every_deployment():
    with pytest.raises(ConfigError, match="every deployment needs a metrics_url"):
        asyncio.run(make().start())


def test_synchronous_calls_are_refused():
    with pytest.raises(ConfigError, match="use acompletion"):
        make().get_available_deployment(model="m")


def test_installed_it_hears_of_every_end(monkeypatch):
    for name in ("litellm", "litellm.integrations", "litellm.integrations.custom_logger"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["litellm"].callbacks = []
    sys.modules["litellm.integrations.custom_logger"].CustomLogger = object
    router = FakeLiteLLM()
    config = {"deployments": {"a": {"rates": RATES}}}
    strategy = install(router, LiteLLMConfig.model_validate(config))
    assert router.strategy is strategy
    (logger,) = sys.modules["litellm"].callbacks

    async def drive():
        good, bad = {}, {}
        await ask(strategy, good)
        await ask(strategy, bad)
        await logger.async_log_success_event(good, answer(3), None, None)
        await logger.async_log_failure_event(bad, None, None, None)
        await strategy.stop()

    asyncio.run(drive())
    assert strategy.dispatcher.state.outstanding(0) == 0


def test_the_installed_litellm_asks_as_the_adapter_answers():
    types = pytest.importorskip("litellm.types.router")
    asked = inspect.signature(types.CustomRoutingStrategyBase.async_get_available_deployment)
    answered = inspect.signature(PolicyStrategy.async_get_available_deployment)
    assert list(asked.parameters) == list(answered.parameters)
