"""The cost of an engine step: operators of every layer, added up and compiled to grids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.assets.specs import GpuSpec, ModelSpec
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import CostSource
from servegym.errors import ConfigError
from servegym.typing import FloatArray

_ACTIVATION_BYTES = 2.0
#: Memory of a GPU beside weights and KV cache: driver, activations, CUDA graphs. What vLLM 0.19
#: left on an RTX 4090 (Llama-3.1-8B, 2,048 tokens a step); larger steps of larger models need more.
_RESERVED_BYTES = 1.7e9


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of `model` on `tp` GPUs, term by term.

    Attributes:
        gpu: The GPU.
        model: The architecture.
        tp: Tensor-parallel degree.
        fp8: Weights and GEMMs in fp8 (KV cache stays 16 bit).
        source: Operator times.
    """

    gpu: GpuSpec
    model: ModelSpec
    tp: int = 1
    fp8: bool = False
    source: CostSource | None = None

    def __post_init__(self) -> None:
        if self.tp < 1 or self.model.heads % self.tp:
            raise ConfigError(f"tp must divide the {self.model.heads} heads, got {self.tp}")
        if self.fp8 and not self.gpu.fp8_flops:
            raise ConfigError("this GPU has no fp8 units: choose precision bf16")
        if self.source is None:
            object.__setattr__(self, "source", RooflineSource(self.gpu, self.fp8))
        self.operators.all_reduce_s(1.0, self.tp)  # refuse a degree without collectives

    @property
    def operators(self) -> CostSource:
        """The source of operator times."""
        assert self.source is not None
        return self.source

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight."""
        return 1.0 if self.fp8 else 2.0

    def terms(
        self,
        tokens: float,
        chunk: float = 0.0,
        context: float = 0.0,
        batch: float = 0.0,
        kv_tokens: float = 0.0,
    ) -> dict[str, float]:
        """Split the duration of a step into its terms.

        Args:
            tokens: All tokens of the step.
            chunk: Prompt tokens of one prefilling request.
            context: Its tokens already cached.
            batch: Decoding sequences.
            kv_tokens: Tokens these attend to in all.

        Returns:
            Seconds by term.
        """
        m, op = self.model, self.operators
        kv_heads = max(1, m.kv_heads // self.tp)
        heads = m.heads // self.tp
        qkv = op.gemm_s(tokens, (heads + 2 * kv_heads) * m.head_dim, m.hidden, self.weight_bytes)
        out = op.gemm_s(tokens, m.hidden, heads * m.head_dim, self.weight_bytes)
        reduce_s = 2.0 * op.all_reduce_s(_ACTIVATION_BYTES * tokens * m.hidden, self.tp)
        head = op.gemm_s(min(tokens, 256.0), m.vocab // self.tp, m.hidden, self.weight_bytes)
        return {
            "cpu": op.cpu_s(),
            "attention GEMMs": m.layers * (qkv + out),
            "MLP" if not m.num_experts else "experts": m.layers * self._mlp_s(tokens),
            "all-reduce": m.layers * reduce_s,
            "output head": head,
            "attention launch": m.layers * op.attention_launch_s(),
            "prefill attention": m.layers
            * (op.prefill_attention_s(chunk, context, heads, kv_heads, m.head_dim) if chunk else 0),
            "decode attention": m.layers
            * (
                op.decode_attention_s(batch, kv_tokens, heads, kv_heads, m.head_dim) if batch else 0
            ),
        }

    def _mlp_s(self, tokens: float) -> float:
        m, op = self.model, self.operators
        if not m.num_experts:
            width = m.ffn_dim // self.tp
            up = op.gemm_s(tokens, (m.ffn_matrices - 1) * width, m.hidden, self.weight_bytes)
            return up + op.gemm_s(tokens, m.hidden, width, self.weight_bytes)
        # uniform routing: expected number of distinct experts that `tokens` tokens touch
        miss = (1.0 - m.active_experts / m.num_experts) ** tokens
        touched = m.num_experts * (1.0 - miss)
        rows = tokens * m.active_experts / touched
        width = max(1, m.expert_ffn_dim // self.tp)
        one = op.gemm_s(rows, (m.ffn_matrices - 1) * width, m.hidden, self.weight_bytes)
        one += op.gemm_s(rows, m.hidden, width, self.weight_bytes)
        # experts run in one grouped kernel: its launch is paid once, not once per expert
        launch = 2.0 * op.gemm_s(1e-9, 1, 1, self.weight_bytes)
        return touched * (one - launch) + launch

    def dense_s(self, tokens: float) -> float:
        """Seconds of everything in a step that depends on its tokens alone."""
        terms = self.terms(tokens)
        return sum(terms.values()) - terms["cpu"]

    def kv_capacity_tokens(self, memory_fraction: float = 0.9) -> int:
        """KV tokens that fit beside the weights.

        Raises:
            ConfigError: If the weights do not fit.
        """
        budget = memory_fraction * self.gpu.memory_bytes * self.tp
        weights = self.weight_bytes * self.model.num_params
        free = budget - weights - _RESERVED_BYTES * self.tp
        if free <= 0:
            raise ConfigError(
                f"the weights take {weights / 1e9:.0f} GB and do not fit the {budget / 1e9:.0f} GB "
                f"of {self.tp} GPU(s): raise tp, use fp8 or a smaller model"
            )
        # GPUs beyond the KV heads hold copies of them
        copies = max(1, self.model.kv_heads // self.tp) * self.tp / self.model.kv_heads
        return int(free / (self.model.kv_bytes_per_token * copies))

    def compile(self, max_tokens: int = 8192, max_context: int = 131072) -> CostGrid:
        """Sample the terms on the grids that the simulator interpolates.

        Args:
            max_tokens: Largest token budget of a step.
            max_context: Longest context.
        """
        model = self.model
        kv_heads = max(1, model.kv_heads // self.tp)
        heads = model.heads // self.tp
        dense = _knots(1.0, max_tokens, NUM_DENSE_KNOTS)
        # short chunks cost next to nothing: one knot below a quarter of the budget, or 256
        chunk = np.concatenate(
            ([1.0], _knots(min(256.0, max_tokens / 4), max_tokens, NUM_CHUNK_KNOTS - 1))
        )
        context = np.concatenate(([0.0], _knots(64.0, max_context, NUM_CONTEXT_KNOTS - 1)))
        batch = _knots(1.0, 1024.0, NUM_BATCH_KNOTS)
        kv = _knots(1.0, 4.0e6, NUM_KV_KNOTS)
        op = self.operators
        return CostGrid(
            cpu_s=op.cpu_s(),
            dense_tokens=dense,
            dense_s=np.array([self.dense_s(t) for t in dense]),
            prefill_chunk=chunk,
            prefill_context=context,
            prefill_s=model.layers
            * np.array(
                [
                    [op.prefill_attention_s(c, h, heads, kv_heads, model.head_dim) for h in context]
                    for c in chunk
                ]
            ),
            decode_batch=batch,
            decode_kv=kv,
            decode_s=model.layers
            * np.array(
                [
                    [op.decode_attention_s(b, k, heads, kv_heads, model.head_dim) for k in kv]
                    for b in batch
                ]
            ),
        )


def _knots(low: float, high: float, count: int) -> FloatArray:
    return np.geomspace(low, high, count)
