"""Requests that keep a small engine short of KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Drawn:
    """A request as it is handed to the engine.

    Attributes:
        step: Engine step before which it arrives.
        prompt: Token ids.
        output_tokens: Tokens it generates.
        predicted_tokens: Its client's prediction of that.
        priority: Its client's priority.
        ttft_slo_s: Its TTFT limit.
    """

    step: int
    prompt: list[int]
    output_tokens: int
    predicted_tokens: int
    priority: int
    ttft_slo_s: float


def draw(num_requests: int, per_step: float, vocabulary: int, seed: int) -> list[Drawn]:
    """Draw requests with lengths spread over more than a decade, arriving at random steps."""
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.exponential(1 / per_step, num_requests)).astype(int)
    prompts = np.clip(rng.lognormal(4.3, 1.0, num_requests), 4, 600).astype(int)
    outputs = np.clip(rng.lognormal(3.4, 0.9, num_requests), 2, 300).astype(int)
    predicted = np.maximum(outputs * np.exp(0.3 * rng.normal(size=num_requests)), 1).astype(int)
    return [
        Drawn(
            step=int(steps[i]),
            prompt=rng.integers(5, vocabulary, prompts[i]).tolist(),
            output_tokens=int(outputs[i]),
            predicted_tokens=int(predicted[i]),
            priority=int(rng.integers(0, 5)),
            ttft_slo_s=float(rng.choice([0.5, 2.0, 10.0])),
        )
        for i in range(num_requests)
    ]
