"""How long a step of vLLM would take on other hardware, and whose turn it is to get a token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.costs.grid import CostGrid
from servegym.documents import checked
from servegym.errors import ConfigError

#: Key in vLLM's `--additional-config`.
KEY = "servegym_paced"
#: Steps that the lateness is taken over.
WINDOW_STEPS = 65_536


class PacedConfig(BaseModel):
    """What `{"servegym_paced": {...}}` in `--additional-config` may hold.

    Attributes:
        grid: File of `save_grid` with the step cost.
        time_scale: How many times as long a step takes.
        lateness_file: File with how much later than meant steps ended, in seconds (`.npy`),
            written at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    grid: Path
    time_scale: float = Field(1.0, gt=0)
    lateness_file: Path | None = None


def read_paced_config(additional: object) -> PacedConfig:
    """Read the settings from vLLM's additional config.

    Raises:
        ConfigError: If there are none, or one is not allowed.
    """
    given = additional.get(KEY) if isinstance(additional, dict) else None
    if given is None:
        raise ConfigError(
            "tell the paced executor what a step costs: "
            """--additional-config '{"servegym_paced": {"grid": "grid.npz"}}'"""
        )
    return checked(given, KEY, PacedConfig)


class Step(NamedTuple):
    """A step as vLLM scheduled it.

    Attributes:
        duration_s: What the cost model says it takes.
        names: Requests in it.
        sampled: Of each, its new tokens: one, or none in the middle of a prefill.
    """

    duration_s: float
    names: list[str]
    sampled: list[list[int]]


class StepReader:
    """Tells from vLLM's `SchedulerOutput` what a step computes.

    Args:
        grid: What steps cost.
        vocabulary: Number of tokens; a request's tokens depend on their positions only.
    """

    def __init__(self, grid: CostGrid, vocabulary: int) -> None:
        self._grid = grid
        self._vocabulary = vocabulary
        self._prompt_tokens: dict[str, int] = {}

    def read(self, output: Any) -> Step:
        """Read a step; also one that computes nothing, to forget who ended."""
        for name in output.finished_req_ids:
            self._prompt_tokens.pop(name, None)
        state: dict[str, tuple[int, int]] = {}  # computed before, known tokens
        for new in output.scheduled_new_reqs:
            prompt = len(new.prompt_token_ids)
            self._prompt_tokens[new.req_id] = prompt
            state[new.req_id] = new.num_computed_tokens, prompt
        cached = output.scheduled_cached_reqs
        rows = zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        )
        for name, computed, generated in rows:
            state[name] = computed, self._prompt_tokens[name] + generated
        chunks: list[tuple[int, int]] = []
        decodes = kv_tokens = 0
        names, sampled = [], []
        for name, count in output.num_scheduled_tokens.items():
            computed, known = state[name]
            if count == 1 and computed and computed + 1 >= known:
                decodes += 1
                kv_tokens += computed + 1
            else:
                chunks.append((count, computed))
            names.append(name)
            end = computed + count
            sampled.append([self._token(end)] if end >= known else [])
        duration_s = self._grid.step_s(chunks, decodes, kv_tokens) if names else 0.0
        return Step(duration_s, names, sampled)

    def _token(self, position: int) -> int:
        # the first tokens of a vocabulary are special ones and single bytes, which are no text
        low = self._vocabulary // 3
        return low + position % (self._vocabulary - low)


class Pacer:
    """Lets steps end when they would, one after the other.

    Args:
        time_scale: How many times as long a step takes.
        clock: In seconds.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self,
        time_scale: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._time_scale = time_scale
        self._clock = clock
        self._sleep = sleep
        self._free_s = 0.0
        self._late_s = np.zeros(WINDOW_STEPS)
        self._num_steps = 0
        self._lock = threading.Lock()

    def begin(self, duration_s: float) -> float:
        """Begin a step now, or when the one before ends; return when it will end."""
        with self._lock:
            self._free_s = max(self._clock(), self._free_s) + duration_s * self._time_scale
            return self._free_s

    def finish(self, end_s: float) -> None:
        """Wait for the end of a step."""
        left_s = end_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
        self._late_s[self._num_steps % WINDOW_STEPS] = self._clock() - end_s
        self._num_steps += 1

    def lateness_s(self) -> Any:
        """Return how much later than meant the latest steps ended, `float64[n]`."""
        return self._late_s[: min(self._num_steps, WINDOW_STEPS)].copy()
