"""servegym's policies in Ray Serve.

    @serve.deployment(
        request_router_config=RequestRouterConfig(
            request_router_class="servegym.serve.ray_serve.PolicyRequestRouter",
            request_router_kwargs={"replica": {...}, "dispatch": {"runtime": {"policy": "..."}}},
            request_routing_stats_period_s=0.25,
        )
    )

A replica's `record_routing_stats` returns what its engine says of itself, `num_running`,
`num_waiting` and `kv_cache_usage`, and may add `rates` if it is not like the others.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from servegym.documents import checked
from servegym.errors import ConfigError
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Hardware, Rates, fleet_facts, replica_facts
from servegym.serve.job import Job
from servegym.serve.requests.prompt import chat_text
from servegym.serve.state import EngineMetrics


class Described(NamedTuple):
    """What the router knows of a request.

    Attributes:
        prompt: Text or token ids.
        max_tokens: What the client allows, if it says so.
        tenant: Who asks.
        slo_class: Name of the service level, None for the default.
    """

    prompt: str | Sequence[int] = ""
    max_tokens: int | None = None
    tenant: str = "default"
    slo_class: str | None = None


class RayServeConfig(BaseModel):
    """What `request_router_kwargs` may hold.

    Attributes:
        replica: What a replica is, by its hardware or its numbers, unless it says otherwise.
        dispatch: Policy, service levels, prediction, prefixes and log.
        describe: `module:function` that makes a `Described` of a request's positional and keyword
            arguments; by default the first argument is taken for an OpenAI request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: Hardware | Rates
    dispatch: DispatchConfig = DispatchConfig()
    describe: str | None = None


def read_ray_config(given: Mapping[str, Any]) -> RayServeConfig:
    """Check what `request_router_kwargs` holds.

    Raises:
        ConfigError: If a key or value is not allowed.
    """
    config = checked(dict(given), "request_router_kwargs", RayServeConfig)
    if config.dispatch.allow_reject:
        raise ConfigError("Ray Serve's routers cannot reject a request: leave allow_reject off")
    return config


def describe_openai(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Described:
    """Describe a request whose first argument is an OpenAI request, a mapping or an object."""
    request = arguments[0] if arguments else keywords.get("request", "")
    if isinstance(request, str):
        return Described(request)
    body = request if isinstance(request, Mapping) else getattr(request, "__dict__", {})
    prompt = body.get("prompt") or ""
    if not prompt and body.get("messages"):
        prompt = chat_text([_as_mapping(message) for message in body["messages"]])
    if not (isinstance(prompt, str) or (prompt and all(isinstance(t, int) for t in prompt))):
        prompt = str(prompt)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    return Described(prompt, limit if isinstance(limit, int) else None)


def _as_mapping(message: Any) -> Mapping[str, Any]:
    return message if isinstance(message, Mapping) else getattr(message, "__dict__", {})


class RayFleet:
    """A fleet that grows and shrinks as Ray says.

    Ray's router sees neither tokens nor lengths of answers: a prompt counts as computed after the
    time it takes at the replica's known rate, and output lengths are not learned.

    Args:
        config: As given.

    Attributes:
        dispatcher: Over the replicas that Ray has named.
    """

    def __init__(self, config: RayServeConfig) -> None:
        self.config = config
        self.dispatcher = Dispatcher(config.dispatch, [], fleet_facts([]))
        self._describe = _load(config.describe) if config.describe else describe_openai
        self._usual = replica_facts(config.replica)
        self._slots: dict[Hashable, int] = {}
        self._leaving: list[int] = []  # slots of those that are gone, but for their requests
        self._rates: dict[int, Rates] = {}
        self._stats: dict[Hashable, Mapping[str, Any]] = {}
        self._jobs: dict[str, Job] = {}

    def update(self, replicas: Mapping[Hashable, Mapping[str, Any]]) -> None:
        """Note who is there and what they say of themselves.

        Args:
            replicas: Routing statistics by replica.
        """
        dispatcher = self.dispatcher
        for gone in [replica for replica in self._slots if replica not in replicas]:
            slot = self._slots.pop(gone)
            dispatcher.state.set_up(slot, False)
            self._leaving.append(slot)
            self._stats.pop(gone, None)
            self._rates.pop(slot, None)
        for slot in [s for s in self._leaving if dispatcher.state.outstanding(s) == 0]:
            self._leaving.remove(slot)
            dispatcher.remove(slot)
        for replica, stats in replicas.items():
            if replica not in self._slots:
                self._slots[replica] = dispatcher.add(str(replica), self._usual)
            # Ray hands out the same mapping until the replica is asked again
            if stats and self._stats.get(replica) is not stats:
                self._stats[replica] = stats
                self._read(self._slots[replica], stats)

    def _read(self, slot: int, stats: Mapping[str, Any]) -> None:
        """Take in a replica's statistics."""
        if {"num_running", "num_waiting", "kv_cache_usage"} <= stats.keys():
            metrics = EngineMetrics(
                float(stats["num_running"]),
                float(stats["num_waiting"]),
                float(stats["kv_cache_usage"]),
            )
            self.dispatcher.update_metrics(slot, metrics, self.dispatcher.clock())
        if "rates" in stats:
            rates = Rates.model_validate(stats["rates"])
            if self._rates.get(slot) != rates:
                self._rates[slot] = rates
                self.dispatcher.state.set_facts(slot, replica_facts(rates))

    def choose(
        self,
        key: str,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        candidates: Iterable[Hashable],
    ) -> Hashable | None:
        """Choose a replica for a request; None to ask again a little later.

        Args:
            key: Names the request; asked again, it is decided anew.
            arguments: The request's.
            keywords: The request's.
            candidates: Replicas in question.
        """
        job = self._jobs.get(key)
        if job is None:
            described = self._describe(arguments, keywords)
            job = self._jobs[key] = self.dispatcher.arrive(
                described.prompt,
                key=key,
                tenant=described.tenant,
                slo_class=self.dispatcher.slo_class(described.slo_class),
                max_tokens=described.max_tokens,
            )
        replica_of = {self._slots[r]: r for r in candidates if r in self._slots}
        if not replica_of:
            return None
        allowed = np.zeros(self.dispatcher.state.num_slots, np.bool_)
        allowed[list(replica_of)] = True
        self.dispatcher.decide(job, allowed=allowed)
        return None if job.request.held else replica_of[job.replica]

    def routed(self, key: str, replica: Hashable) -> float:
        """A replica has taken a request; return for how many seconds its prompt is computed."""
        job, slot = self._jobs.get(key), self._slots.get(replica)
        if job is None or slot is None:
            return 0.0
        state = self.dispatcher.state
        if job.replica != slot:
            # the chosen one was full, and Ray went on to the next
            if job.replica >= 0:
                state.leave(job.request)
            state.dispatch(job.request, slot, self.dispatcher.clock())
        return state.prefill_left_s(slot)

    def prefilled(self, key: str) -> None:
        """A prompt should be computed by now."""
        if key in self._jobs:
            self.dispatcher.end_prefill(self._jobs[key])

    def knows(self, key: str) -> bool:
        """Whether a request has been seen and has not ended."""
        return key in self._jobs

    def cancelled(self, key: str) -> None:
        """A request was given up before a replica took it."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self.dispatcher.end(job, "cancelled")

    def completed(self, key: str) -> None:
        """A request has ended."""
        job = self._jobs.pop(key, None)
        if job is not None and job.replica >= 0:
            self.dispatcher.finish(job, 0)


def _load(text: str) -> Callable[[Sequence[Any], Mapping[str, Any]], Described]:
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"describe must be like package.module:function: {error}") from error
    return found


@cache
def _router_class() -> type:
    from ray.serve.request_router import RequestRouter

    class PolicyRequestRouter(RequestRouter):  # type: ignore[misc]
        """Asks a servegym policy which replica takes a request."""

        def initialize_state(self, **kwargs: Any) -> None:
            """Read `request_router_kwargs`; Ray Serve calls it."""
            self.fleet = RayFleet(read_ray_config(kwargs))
            self._timers: dict[str, asyncio.TimerHandle] = {}
            self._loop: asyncio.AbstractEventLoop | None = None

        async def choose_replicas(
            self, candidate_replicas: list[Any], pending_request: Any | None = None
        ) -> list[list[Any]]:
            """Rank the policy's choice first, then all others in case it is full."""
            if pending_request is None:
                return [candidate_replicas]
            key = pending_request.metadata.internal_request_id
            if not self.fleet.knows(key):
                pending_request.future.add_done_callback(partial(self._answered, key))
            self.fleet.update({r.replica_id: r.routing_stats for r in candidate_replicas})
            chosen = self.fleet.choose(
                key,
                pending_request.args,
                pending_request.kwargs,
                [r.replica_id for r in candidate_replicas],
            )
            if chosen is None:
                return []
            first = [r for r in candidate_replicas if r.replica_id == chosen]
            return [first, [r for r in candidate_replicas if r.replica_id != chosen]]

        def _answered(self, key: str, future: Any) -> None:
            if future.cancelled():
                self.fleet.cancelled(key)

        def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
            """Book where a request went; Ray Serve calls it."""
            key = pending_request.metadata.internal_request_id
            left_s = self.fleet.routed(key, replica_id)
            self._loop = asyncio.get_running_loop()
            self._timers[key] = self._loop.call_later(left_s, self.fleet.prefilled, key)

        def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
            """Close a request's books; Ray Serve calls it, at times from a thread of its own."""
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._completed, internal_request_id)

        def _completed(self, key: str) -> None:
            timer = self._timers.pop(key, None)
            if timer is not None:
                timer.cancel()
            self.fleet.completed(key)

    # Ray sends the class to its proxies by name
    PolicyRequestRouter.__module__, PolicyRequestRouter.__qualname__ = (
        __name__,
        "PolicyRequestRouter",
    )
    return PolicyRequestRouter


def __getattr__(name: str) -> Any:
    """Make the router class when Ray Serve asks for it: only then Ray is imported."""
    if name == "PolicyRequestRouter":
        return _router_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")
