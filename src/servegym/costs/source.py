"""What a source of kernel costs answers."""

from __future__ import annotations

from typing import Protocol


class CostSource(Protocol):
    """Seconds of single operators on one device; `StepCost` adds them up to a step.

    Sources: fitted rooflines (`costs.roofline`); measured tables answer the same questions.
    """

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        ...

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]` with weights of `weight_bytes` bytes an element."""
        ...

    def prefill_attention_s(
        self, chunk: float, context: float, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """Seconds of causal attention of `chunk` new tokens over `context` cached, no launch."""
        ...

    def decode_attention_s(
        self, batch: float, kv_tokens: float, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """Seconds of `batch` sequences, one token each, over `kv_tokens` in all, no launch."""
        ...

    def attention_launch_s(self) -> float:
        """Constant part of one attention kernel."""
        ...

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce of `num_bytes` over `num_gpus`."""
        ...

    def cpu_s(self) -> float:
        """Time of an engine iteration outside the device."""
        ...
