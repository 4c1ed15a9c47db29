"""servegym inside vLLM: admission order and preemption victims by a policy, and a step log.

    vllm serve MODEL --scheduling-policy priority \
        --scheduler-cls servegym.serve.vllm.PolicyScheduler \
        --additional-config '{"servegym": {"policy": "srpt"}}'

vLLM is imported only when it asks for one of the classes. See docs/live-vllm.md.
"""

from __future__ import annotations

from typing import Any

#: For production: steps overlap, as in vLLM by default.
_ASYNC = "PolicyScheduler"
#: For engines with `async_scheduling` off.
_SYNC = "PolicySyncScheduler"


def __getattr__(name: str) -> Any:
    """Make a scheduler class when vLLM asks for it."""
    if name in (_ASYNC, _SYNC):
        from servegym.serve.vllm.scheduler import make_scheduler

        return make_scheduler(name, overlapped=name == _ASYNC)
    if name == "PacedExecutor":
        from servegym.serve.vllm.paced_executor import make_executor

        return make_executor()
    raise AttributeError(f"module {__name__} has no attribute {name}")
