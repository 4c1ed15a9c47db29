"""A scheduler for vLLM that writes a log of the engine's steps, and decides nothing.

This file needs vLLM and nothing else. Write it into a folder on vLLM's path, and name it:

    servegym calibrate plugin --out vllm_step_log.py
    PYTHONPATH=. vllm serve MODEL --scheduler-cls vllm_step_log.StepLogScheduler \
        --additional-config '{"step_log": "steps.csv"}'
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

#: Versions of vLLM whose scheduler this was tried on.
KNOWN_VERSIONS = ("0.32.",)
COLUMNS = ("prefill_tokens", "decode_sequences", "kv_tokens", "duration_s", "prefill_pairs")


def step_row(requests: Iterable[tuple[int, int, int]]) -> tuple[int, int, int, int]:
    """Add up a step: prompt tokens, decoding sequences, their KV tokens, pairs of the prompts.

    Of each request: tokens computed now, those in the KV cache before, and all it has so far.
    A request decodes if it computes one token and that is its last; all else is prefill, also
    what a preempted request computes anew.
    """
    prompt = decodes = kv_tokens = pairs = 0
    for computed, before, total in requests:
        # with asynchronous scheduling the last token may be a placeholder not yet counted
        if computed == 1 and before > 0 and before + 1 >= total:
            decodes += 1
            kv_tokens += before + 1
        else:
            prompt += computed
            pairs += computed * before + computed * (computed + 1) // 2
    return prompt, decodes, kv_tokens, pairs


def step_requests(output: Any, requests: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """List the requests of a step as `step_row` takes them.

    Args:
        output: vLLM's `SchedulerOutput`.
        requests: vLLM's requests by id.
    """
    # new requests may have found a cached prefix; preempted ones begin anew
    before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return [
        (count, before[name], requests[name].num_tokens)
        for name, count in output.num_scheduled_tokens.items()
    ]


class StepLog:
    """A CSV file of steps as `servegym calibrate engine` takes it.

    A step lasts from its scheduling, or from the end of the step before where that overlaps,
    until its tokens are taken in.

    Args:
        path: The file; one that is there is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)
        self._file.flush()
        self._open: dict[int, tuple[float, tuple[int, int, int, int]]] = {}
        self._last_end_s = 0.0

    @classmethod
    def from_config(cls, config: object) -> StepLog:
        """Open the file that vLLM's additional config names.

        Raises:
            ValueError: If it names none.
        """
        path = config.get("step_log") if isinstance(config, Mapping) else None
        if not isinstance(path, str):
            raise ValueError(
                "name the file of the step log: "
                """--additional-config '{"step_log": "steps.csv"}'"""
            )
        return cls(Path(path))

    def scheduled(
        self, step: object, start_s: float, requests: Iterable[tuple[int, int, int]]
    ) -> None:
        """Note what a step will compute; `step` is the same object when it is finished."""
        self._open[id(step)] = start_s, step_row(requests)

    def finished(self, step: object, end_s: float) -> None:
        """Write a step, unless it computed nothing."""
        start_s, (prompt, decodes, kv_tokens, pairs) = self._open.pop(id(step))
        duration_s = end_s - max(start_s, self._last_end_s)
        self._last_end_s = end_s
        if prompt or decodes:
            self._writer.writerow((prompt, decodes, kv_tokens, f"{duration_s:.7f}", pairs))
            self._file.flush()

    def close(self) -> None:
        """Write what is left and close the log."""
        self._file.close()


def __getattr__(name: str) -> Any:
    """Make `StepLogScheduler` when vLLM asks for it: only then vLLM is imported."""
    if name == "StepLogScheduler":
        return _scheduler_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@cache
def _scheduler_class() -> type:
    """Make a scheduler class for vLLM that logs the steps it forms.

    Raises:
        ImportError: If vLLM is of a version that this was not tried on.
    """
    import vllm  # type: ignore[import-not-found,unused-ignore]

    if not vllm.__version__.startswith(KNOWN_VERSIONS):
        known = ", ".join(f"{start}x" for start in KNOWN_VERSIONS)
        raise ImportError(f"the step log knows vLLM {known}, this is {vllm.__version__}")
    from vllm.v1.core.sched.async_scheduler import (  # type: ignore[import-not-found,unused-ignore]
        AsyncScheduler,
    )

    class StepLogScheduler(AsyncScheduler):  # type: ignore[misc,unused-ignore]
        """vLLM's scheduler, with a log of what each step computed and how long it took."""

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(vllm_config, *args, **kwargs)
            self._step_log = StepLog.from_config(vllm_config.additional_config)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            """Schedule as vLLM does; keep what was scheduled."""
            start_s = time.monotonic()
            output = super().schedule(*args, **kwargs)
            self._step_log.scheduled(output, start_s, step_requests(output, self.requests))
            return output

        def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            """Take in what the model computed, as vLLM does; the step is then over."""
            result = super().update_from_output(scheduler_output, *args, **kwargs)
            self._step_log.finished(scheduler_output, time.monotonic())
            return result

        def shutdown(self) -> None:
            """Shut down; close the log."""
            self._step_log.close()
            super().shutdown()

    return StepLogScheduler
