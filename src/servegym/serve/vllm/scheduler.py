"""vLLM's scheduler, with the plug-in around each step."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from servegym.calibrate.vllm_step_log import StepLog, step_requests
from servegym.serve.vllm.config import PluginConfig, read_config
from servegym.serve.vllm.plugin import Plugin, load_policy
from servegym.serve.vllm.selftest import (
    SCHEDULER_PARTS,
    require_parts,
    require_priority_queue,
    require_scores,
)
from servegym.serve.vllm.versions import require_known


def may_admit(scheduler: Any) -> bool:
    """Whether it could matter in this step who is first in the queue."""
    return len(scheduler.waiting) > 1 and len(scheduler.running) < scheduler.max_num_running_reqs


def may_preempt(scheduler: Any) -> bool:
    """Whether the running requests could want more KV blocks in this step than there are.

    Each needs at most one block it has begun and those of its new tokens. Twice as many are
    allowed for, in every group of layers: tokens drafted ahead take blocks too.
    """
    if len(scheduler.running) < 2:
        return False
    new_blocks = scheduler.max_num_scheduled_tokens / scheduler.block_size
    wanted = (
        2
        * len(scheduler.kv_cache_config.kv_cache_groups)
        * (2 * len(scheduler.running) + new_blocks)
    )
    free: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return free < wanted


def order_by_policy(base: type) -> type:
    """Subclass a scheduler so that a policy orders its requests.

    Args:
        base: vLLM's `Scheduler`, or anything that looks like it.
    """

    class Ordered(base):  # type: ignore[misc]
        """vLLM's scheduler; a policy says whom to admit and whom to preempt first."""

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(vllm_config, *args, **kwargs)
            config = read_config(vllm_config.additional_config)
            self.plugin = self._make_plugin(config)
            self._step_log = StepLog(config.step_log) if config.step_log else None

        def _make_plugin(self, config: PluginConfig) -> Plugin:
            require_parts(self, SCHEDULER_PARTS)
            policy = load_policy(config.policy)
            require_scores(policy)
            return Plugin(
                config,
                policy,
                block_size=self.block_size,
                max_num_batched_tokens=self.max_num_scheduled_tokens,
                priority_mode=hasattr(self.waiting, "_heap"),
            )

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            """Order the requests, then schedule as vLLM does."""
            begin_ns = time.perf_counter_ns()
            self.plugin.before(
                self.waiting,
                self.running,
                self.requests,
                self.kv_cache_manager.usage,
                may_decide=may_admit(self) or may_preempt(self),
            )
            ordered_ns = time.perf_counter_ns()
            start_s = time.monotonic()
            output = super().schedule(*args, **kwargs)
            scheduled_ns = time.perf_counter_ns()
            if self._step_log is not None:
                rows = step_requests(output, self.requests)
                self._step_log.scheduled(output, start_s, rows)
            self.plugin.after(
                output,
                self.requests,
                begin_ns=begin_ns,
                ordered_ns=ordered_ns,
                scheduled_ns=scheduled_ns,
            )
            return output

        def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            """Take in what the model computed, as vLLM does; the step is then over."""
            result = super().update_from_output(scheduler_output, *args, **kwargs)
            if self._step_log is not None:
                self._step_log.finished(scheduler_output, time.monotonic())
            return result

        def shutdown(self) -> None:
            """Shut down; report once more and close the step log."""
            self.plugin.report()
            if self._step_log is not None:
                self._step_log.close()
            super().shutdown()

    return Ordered


@cache
def make_scheduler(name: str, *, overlapped: bool) -> type:
    """Make the class that vLLM's `--scheduler-cls` names.

    Args:
        name: Its name.
        overlapped: Whether to form a step while the one before runs (`async_scheduling`).

    Raises:
        ConfigError: If this vLLM is not one that the plug-in knows.
    """
    import vllm  # type: ignore[import-not-found,unused-ignore]

    require_known(vllm.__version__)
    from vllm.sampling_params import (  # type: ignore[import-not-found,unused-ignore]
        SamplingParams,
    )
    from vllm.v1.core.sched.async_scheduler import (  # type: ignore[import-not-found,unused-ignore]
        AsyncScheduler,
    )
    from vllm.v1.core.sched.request_queue import (  # type: ignore[import-not-found,unused-ignore]
        SchedulingPolicy,
        create_request_queue,
    )
    from vllm.v1.core.sched.scheduler import (  # type: ignore[import-not-found,unused-ignore]
        Scheduler,
    )
    from vllm.v1.request import Request  # type: ignore[import-not-found,unused-ignore]

    def make_request(request_id: str, arrival_s: float) -> Any:
        return Request(
            request_id=request_id,
            prompt_token_ids=[0],
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            arrival_time=arrival_s,
        )

    require_priority_queue(create_request_queue(SchedulingPolicy.PRIORITY), make_request)
    made = order_by_policy(AsyncScheduler if overlapped else Scheduler)
    # vLLM may send the class to its engine process, by name
    made.__module__, made.__name__, made.__qualname__ = __package__, name, name
    return made
