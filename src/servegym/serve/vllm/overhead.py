"""How long the policy and vLLM's own scheduling take, over the latest steps it was asked in."""

from __future__ import annotations

import numpy as np

#: Steps that percentiles are taken over.
WINDOW_STEPS = 4096


class Overhead:
    """Durations of the latest steps' scheduling."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._policy_ns = np.zeros(WINDOW_STEPS, np.int64)
        self._engine_ns = np.zeros(WINDOW_STEPS, np.int64)

    def add(self, policy_ns: int, engine_ns: int) -> None:
        """Note a step: time of the plug-in, time of vLLM's `schedule`."""
        i = self._num_steps % WINDOW_STEPS
        self._policy_ns[i], self._engine_ns[i] = policy_ns, engine_ns
        self._num_steps += 1

    def percentiles_us(self) -> dict[str, float]:
        """Return p50 and p99 of both in microseconds, 0 before the first step."""
        n = min(self._num_steps, WINDOW_STEPS)
        return {
            f"{who}_p{p}_us": float(np.percentile(ns[:n], p)) / 1e3 if n else 0.0
            for who, ns in (("policy", self._policy_ns), ("engine", self._engine_ns))
            for p in (50, 99)
        }
