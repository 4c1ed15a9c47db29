"""Start-up checks: that vLLM's scheduler has the parts the plug-in works on, as it knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from servegym.errors import ConfigError
from servegym.policy.ordering import IS_RUNNING, NUM_ORDERING_FEATURES, OrderingPolicy

#: What is read from a scheduler.
SCHEDULER_PARTS = (
    "waiting",
    "running",
    "requests",
    "block_size",
    "max_num_scheduled_tokens",
    "max_num_running_reqs",
    "kv_cache_config.kv_cache_groups",
    "kv_cache_manager.usage",
    "kv_cache_manager.block_pool.get_num_free_blocks",
)
#: What is read from a request.
REQUEST_PARTS = (
    "request_id",
    "priority",
    "arrival_time",
    "max_tokens",
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_output_tokens",
    "num_preemptions",
    "sampling_params.extra_args",
)


def require_parts(thing: object, parts: tuple[str, ...]) -> None:
    """Check that a thing has all parts, dotted ones too.

    Raises:
        ConfigError: If one is missing.
    """
    for part in parts:
        inner: Any = thing
        for name in part.split("."):
            if not hasattr(inner, name):
                raise _changed(f"{type(thing).__name__} has no {part}")
            inner = getattr(inner, name)


def require_priority_queue(queue: Any, make_request: Callable[[str, float], Any]) -> None:
    """Check that a queue is a heap by (priority, arrival), in the list that is rewritten.

    Args:
        queue: An empty queue of the kind the scheduler has.
        make_request: Makes a request from an id and an arrival time.

    Raises:
        ConfigError: If it is not.
    """
    requests = [make_request(str(i), float(i)) for i in range(4)]
    require_parts(requests[0], REQUEST_PARTS)
    for request in requests:
        queue.add_request(request)
    if not isinstance(getattr(queue, "_heap", None), list) or len(queue._heap) != len(requests):
        raise _changed(f"{type(queue).__name__} keeps no list of its requests")
    wanted = [requests[i] for i in (2, 0, 3, 1)]
    for place, request in enumerate(wanted):
        request.priority = place
    queue._heap[:] = wanted
    if [queue.pop_request() for _ in requests] != wanted:
        raise _changed("the waiting queue does not go by priority")
    for request in requests:
        request.priority = 0
        queue.add_request(request)
    if [queue.pop_request() for _ in requests] != requests:
        raise _changed("requests of equal priority do not go by arrival")


def require_scores(policy: OrderingPolicy) -> None:
    """Check that a policy scores three requests, waiting and running.

    Raises:
        ConfigError: If it does not.
    """
    features = np.ones((3, NUM_ORDERING_FEATURES))
    features[:2, IS_RUNNING] = 0.0
    scores = policy.score(features, np.zeros((3, policy.memory_size)))
    if scores.shape != (3,) or not np.isfinite(scores).all():
        raise ConfigError(f"policy {policy.name} must give three requests three finite scores")


def _changed(what: str) -> ConfigError:
    return ConfigError(
        f"this vLLM is not as servegym knows it: {what}; start without --scheduler-cls"
    )
