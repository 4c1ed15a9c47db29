"""servegym's policies in LiteLLM's router.

    router = litellm.Router(model_list=[...])
    strategy = servegym.serve.litellm.install(router, config)

LiteLLM says nothing of the engines behind its deployments. `await strategy.start()` polls the
metrics pages that the configuration names; without them only policies that need no engine metrics
decide.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.errors import ConfigError, unknown_name
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Hardware, Rates, fleet_facts
from servegym.serve.job import Job
from servegym.serve.requests.prompt import chat_text

#: How a request is found again when it has ended: LiteLLM passes it on and back.
_KEY = "litellm_call_id"
#: Whom LiteLLM's proxy names in a request's metadata.
_USER = "user_api_key_user_id"


class DeploymentConfig(BaseModel):
    """One deployment of the router's `model_list`.

    Attributes:
        hardware: What it runs on, if servegym knows its costs.
        rates: Its numbers, instead.
        metrics_url: Of its Prometheus page.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hardware: Hardware | None = None
    rates: Rates | None = None
    metrics_url: str | None = None

    @property
    def facts(self) -> Hardware | Rates:
        """What is known of it.

        Raises:
            ConfigError: If nothing is, or two things are.
        """
        if (self.hardware is None) == (self.rates is None):
            raise ConfigError("a deployment needs either hardware or rates")
        found = self.hardware or self.rates
        assert found is not None
        return found


class LiteLLMConfig(BaseModel):
    """How servegym decides for a LiteLLM router.

    Attributes:
        deployments: By the `id` of their `model_info`.
        dispatch: Policy, service levels, prediction, prefixes and log.
        slo_key: Key of a request's `metadata` that names its service level.
        hold_s: How long a hold lasts.
        max_hold_s: How long a request is held in all.
        scrape_interval_s: Time between two polls of a metrics page.
        forget_after_s: LiteLLM does not tell when a client goes away: after this time a request
            counts as cancelled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    deployments: Mapping[str, DeploymentConfig] = Field(min_length=1)
    dispatch: DispatchConfig = DispatchConfig()
    slo_key: str = "slo_class"
    hold_s: float = Field(0.05, gt=0)
    max_hold_s: float = Field(10.0, ge=0)
    scrape_interval_s: float = Field(0.25, gt=0)
    forget_after_s: float = Field(600.0, gt=0)


def prompt_text(
    messages: Sequence[Mapping[str, Any]] | None, given: str | Sequence[Any] | None
) -> str | list[int]:
    """Return what a request asks, as text or token ids."""
    if messages:
        return chat_text(messages)
    if given is None or isinstance(given, str):
        return given or ""
    tokens = [token for token in given if isinstance(token, int)]
    return tokens if tokens and len(tokens) == len(given) else "\n".join(map(str, given))


class PolicyStrategy:
    """What LiteLLM's router asks for a deployment.

    Args:
        router: The `litellm.Router`.
        config: As given.

    Attributes:
        dispatcher: Over the deployments, in the order of the configuration.

    Raises:
        ConfigError: If a deployment is not in the router's list, or a part of the configuration
            cannot be used.
    """

    def __init__(self, router: Any, config: LiteLLMConfig) -> None:
        self._router = router
        self._config = config
        self._ids = list(config.deployments)
        there = {deployment["model_info"]["id"] for deployment in router.model_list}
        for name in self._ids:
            if name not in there:
                raise ConfigError(unknown_name("deployment", name, there))
        facts = [deployment.facts for deployment in config.deployments.values()]
        self.dispatcher = Dispatcher(config.dispatch, self._ids, fleet_facts(facts))
        self._jobs: dict[str, Job] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._stop: Any = None

    async def start(self) -> None:
        """Begin to poll the metrics pages that are configured."""
        import aiohttp

        from servegym.serve.monitoring.poller import MetricsPoller

        urls = [d.metrics_url for d in self._config.deployments.values()]
        if None in urls:
            raise ConfigError("to poll metrics, every deployment needs a metrics_url")
        session = aiohttp.ClientSession()
        interval_s = self._config.scrape_interval_s
        poller = MetricsPoller(
            None,
            self.dispatcher,
            session,
            interval_s=interval_s,
            timeout_s=max(1.0, 4.0 * interval_s),
        )
        for slot, url in enumerate(urls):
            assert url is not None
            poller.add(slot, url)
        await poller.start()

        async def stop() -> None:
            await poller.stop()
            await session.close()

        self._stop = stop

    async def stop(self) -> None:
        """Stop polling, and write what is left of the decision log."""
        if self._stop is not None:
            await self._stop()
        self.dispatcher.close()

    async def async_get_available_deployment(
        self,
        model: str,
        messages: list[dict[str, Any]] | None = None,
        input: str | list[Any] | None = None,
        specific_deployment: bool | None = False,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Choose a deployment; LiteLLM's router calls it."""
        request = {} if request_kwargs is None else request_kwargs
        healthy = await self._router.async_get_healthy_deployments(
            model=model,
            request_kwargs=request,
            messages=messages,
            input=input,
            specific_deployment=specific_deployment,
        )
        if isinstance(healthy, dict):
            return healthy
        job = self._arrive(request, model, prompt_text(messages, input or request.get("prompt")))
        allowed, found = self._allowed(healthy)
        if not allowed.any():
            # none of these is ours: leave it to chance, as LiteLLM's default does
            self._forget(job.request.key, "failed")
            return healthy[int(np.random.default_rng().integers(len(healthy)))]
        clock, hold_s = self.dispatcher.clock, self._config.hold_s
        until_s = clock() + self._config.max_hold_s
        while True:
            may_hold = clock() + hold_s <= until_s
            self.dispatcher.decide(job, allowed=allowed, may_hold=may_hold)
            if job.replica >= 0:
                break
            if not job.request.held:
                self._jobs.pop(job.request.key, None)
                raise _rate_limit_error(model)
            await asyncio.sleep(hold_s)
        self._assume_prefill(job)
        return found[job.replica]

    def get_available_deployment(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: decisions need the event loop's books.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("servegym decides for LiteLLM's async calls only: use acompletion")

    def _arrive(self, request: dict[str, Any], model: str, prompt: str | list[int]) -> Job:
        """Return the job of a request; a retry has one already."""
        self._forget_old()
        key = request.setdefault(_KEY, str(uuid.uuid4()))
        job = self._jobs.get(key)
        if job is None:
            metadata = request.get("metadata") or {}
            limit = request.get("max_completion_tokens") or request.get("max_tokens")
            job = self._jobs[key] = self.dispatcher.arrive(
                prompt,
                key=key,
                tenant=str(metadata.get(_USER) or request.get("user") or "default"),
                slo_class=self.dispatcher.slo_class(metadata.get(self._config.slo_key)),
                max_tokens=limit,
                model=model,
            )
        return job

    def _forget_old(self) -> None:
        before_s = self.dispatcher.clock() - self._config.forget_after_s
        for key in list(self._jobs):
            if self._jobs[key].request.arrival_s > before_s:
                return  # the others are younger
            self._forget(key, "cancelled")

    def _allowed(self, healthy: Sequence[dict[str, Any]]) -> tuple[Any, dict[int, dict[str, Any]]]:
        by_id = {deployment["model_info"]["id"]: deployment for deployment in healthy}
        found = {i: by_id[name] for i, name in enumerate(self._ids) if name in by_id}
        allowed = np.zeros(len(self._ids), np.bool_)
        allowed[list(found)] = True
        return allowed, found

    def _assume_prefill(self, job: Job) -> None:
        """No one says when the prompt is computed: take the known rate for it."""
        key = job.request.key
        if key in self._timers:
            self._timers[key].cancel()
        left_s = self.dispatcher.state.prefill_left_s(job.replica)
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(left_s, self.dispatcher.end_prefill, job)

    def ended(self, request: Mapping[str, Any], response: Any, begin: datetime | None) -> None:
        """A request has all its tokens.

        Args:
            request: LiteLLM's arguments of the call.
            response: What it returned, with its `usage`.
            begin: When the first token came, if it was streamed.
        """
        job = self._take(request)
        if job is None:
            return
        usage = getattr(response, "usage", None)
        tokens = int(getattr(usage, "completion_tokens", 0) or 0)
        prompt_tokens = int(getattr(usage, "prompt_tokens", 0) or 0)
        if prompt_tokens:
            self.dispatcher.usage(job, prompt_tokens=prompt_tokens)
        if begin is not None:
            ago_s = max(0.0, datetime.now(begin.tzinfo).timestamp() - begin.timestamp())
            self.dispatcher.end_prefill(job)
            self.dispatcher.state.first_token(job.request, self.dispatcher.clock() - ago_s)
        self.dispatcher.finish(job, tokens)

    def failed(self, request: Mapping[str, Any]) -> None:
        """A request has failed; if LiteLLM tries again, it arrives anew."""
        job = self._take(request)
        if job is not None:
            self.dispatcher.end(job, "failed")

    def _take(self, request: Mapping[str, Any]) -> Job | None:
        key = request.get(_KEY)
        return self._forget(key, None) if isinstance(key, str) else None

    def _forget(self, key: str, status: Any) -> Job | None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        job = self._jobs.pop(key, None)
        if job is not None and status is not None:
            self.dispatcher.end(job, status)
        return job


def _rate_limit_error(model: str) -> Exception:
    import litellm  # type: ignore[import-not-found]

    error: Exception = litellm.RateLimitError(
        "the fleet is too busy for this request", llm_provider="servegym", model=model
    )
    return error


def install(router: Any, config: LiteLLMConfig) -> PolicyStrategy:
    """Let servegym decide for a LiteLLM router.

    Args:
        router: A `litellm.Router`; its `acompletion` and `atext_completion` are decided for.
        config: Deployments and policy.

    Returns:
        The strategy; `start` it to poll metrics, `stop` it at the end.

    Raises:
        ConfigError: If a deployment is not in the router's list, or a part of the configuration
            cannot be used.
    """
    import litellm
    from litellm.integrations.custom_logger import (  # type: ignore[import-not-found]
        CustomLogger,
    )

    strategy = PolicyStrategy(router, config)

    class Outcomes(CustomLogger):  # type: ignore[misc]
        """Tells the strategy what became of its requests."""

        async def async_log_success_event(
            self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Close the books of a request that has all its tokens."""
            begin = kwargs.get("completion_start_time") if kwargs.get("stream") else None
            strategy.ended(kwargs, response_obj, begin)

        async def async_log_failure_event(
            self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Close the books of a request that failed."""
            strategy.failed(kwargs)

    router.set_custom_routing_strategy(strategy)
    litellm.callbacks.append(Outcomes())
    return strategy
