"""Kernels of transformer layers on several GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.assets.specs import ModelSpec, gpu, model
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import CostSource, Heads
from servegym.errors import ConfigError
from servegym.typing import IntArray
from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.family import Family
from servegym.workloads.mixtures import LengthConfig

_QKV, _PREFILL, _DECODE, _OUT, _REDUCE, _UP, _DOWN = range(7)
_BYTES = 2.0  # of weights and activations


class TransformerLayer(Family):
    """One batch through some layers, split over `tp` shards and `num_microbatches` parts.

    Each shard projects, attends (prompts and decoding sequences in a kernel of their own) and
    projects back; an all-reduce adds up the shards, then the same with both halves of the MLP. A
    stage is one kernel, with the norms, rotary embedding and activation of its half of the layer
    where these happen; durations are those of the kernel costs on each GPU. An edge carries the
    activations that would have to be moved if the next kernel of a shard ran elsewhere; those from
    and to an all-reduce carry none, as its duration is that of moving them. Microbatches do not
    wait for each other: one's all-reduce can hide behind another's GEMMs.

    Attributes:
        device_types: GPUs, by the names of `assets/gpus.yaml`.
        model: A dense model of `assets/models.yaml`.
        layers: Layers.
        tp: Shards; the GPUs need an all-reduce fit for it.
        num_microbatches: Parts of the batch.
        num_prompts: Prompts of a part, each prefilled whole.
        prompt: Length of prompts.
        num_decodes: Decoding sequences of a part.
        context: Length of what these attend to.
    """

    labels: ClassVar[tuple[str, ...]] = (
        *("QKV", "prefill attention", "decode attention", "output"),
        *("all-reduce", "up", "down"),
    )

    kind: Literal["transformer-layer"] = "transformer-layer"
    device_types: tuple[str, ...] = Field(("H100-SXM-80GB", "A100-SXM-80GB", "L40S"), min_length=1)
    model: str = "Llama-3.1-8B"
    layers: int = Field(1, ge=1)
    tp: int = Field(4, ge=1)
    num_microbatches: int = Field(2, ge=1)
    num_prompts: int = Field(2, ge=0)
    prompt: LengthConfig = LengthConfig(medians_tokens=(1024.0,), sigmas=(0.8,), max_tokens=8192)
    num_decodes: int = Field(64, ge=0)
    context: LengthConfig = LengthConfig(medians_tokens=(1500.0,), sigmas=(0.8,), max_tokens=32768)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the lengths of a batch.

        Raises:
            ConfigError: If the batch is empty, the model no dense one, or `tp` does not divide it.
        """
        spec = model(self.model)
        if spec.num_experts or spec.latent_dim:
            raise ConfigError(f"transformer-layer needs a dense model, got {self.model}")
        if spec.heads % self.tp:
            raise ConfigError(f"tp must divide the {spec.heads} heads, got {self.tp}")
        if not self.num_prompts + self.num_decodes:
            raise ConfigError("give at least one prompt or decoding sequence")
        builder = JobBuilder("transformer-layer", self.device_types)
        kernels = _Kernels(builder, spec, self.tp)
        for _ in range(self.num_microbatches):
            prompts = self.prompt.draw(rng, self.num_prompts)
            contexts = self.context.draw(rng, self.num_decodes)
            before: int | None = None
            for _ in range(self.layers):
                before = kernels.layer(prompts, contexts, before)
        return builder.build()


class _Kernels:
    """Adds the kernels of a model to a job."""

    def __init__(self, builder: JobBuilder, spec: ModelSpec, tp: int) -> None:
        self.builder, self.spec, self.tp = builder, spec, tp
        self.heads = spec.heads // tp
        self.kv_heads = max(1, spec.kv_heads // tp)
        self.sources = {name: _source(name) for name in builder.device_types}

    def layer(self, prompts: IntArray, contexts: IntArray, before: int | None) -> int:
        """Add a layer after an all-reduce, if any; returns its last all-reduce."""
        m, tokens = self.spec, float(prompts.sum() + len(contexts))
        qkv_width = (self.heads + 2 * self.kv_heads) * m.head_dim
        out_width = self.heads * m.head_dim
        ffn_width = m.ffn_dim // self.tp
        reduced = []
        for _ in range(self.tp):
            qkv = self._gemm(_QKV, tokens, qkv_width, m.hidden, norms=True)
            if before is not None:
                self.builder.edge(before, qkv)
            attended = self._attention(qkv, prompts, contexts)
            out = self._gemm(_OUT, tokens, m.hidden, out_width)
            for attention, rows in attended:
                self.builder.edge(attention, out, data_bytes=_BYTES * rows * out_width)
            reduced.append(out)
        middle = self._all_reduce(tokens, reduced)
        reduced = []
        for _ in range(self.tp):
            up = self._gemm(_UP, tokens, (m.ffn_matrices - 1) * ffn_width, m.hidden)
            down = self._gemm(_DOWN, tokens, m.hidden, ffn_width, norms=True)
            self.builder.edge(middle, up)
            moved = tokens * (m.ffn_matrices - 1) * ffn_width
            self.builder.edge(up, down, data_bytes=_BYTES * moved)
            reduced.append(down)
        return self._all_reduce(tokens, reduced)

    def _attention(
        self, qkv: int, prompts: IntArray, contexts: IntArray
    ) -> list[tuple[int, float]]:
        """Add the kernels for prompts and for decoding sequences; returns them and their tokens."""
        m = self.spec
        shape = Heads(self.heads, self.kv_heads, m.head_dim)
        width = (self.heads + 2 * self.kv_heads) * m.head_dim
        added = []
        if len(prompts):
            stage = self._task(_PREFILL, lambda op: _prefill_s(op, prompts, shape))
            added.append((stage, float(prompts.sum())))
            self.builder.edge(qkv, stage, data_bytes=_BYTES * float(prompts.sum()) * width)
        if len(contexts):
            stage = self._task(_DECODE, lambda op: _decode_s(op, contexts, shape))
            added.append((stage, float(len(contexts))))
            # with the queries would go the KV cache, which is where the sequences ran so far
            cached = 2.0 * float(contexts.sum()) * self.kv_heads * m.head_dim
            self.builder.edge(qkv, stage, data_bytes=_BYTES * (len(contexts) * width + cached))
        return added

    def _gemm(self, label: int, tokens: float, n: int, k: int, *, norms: bool = False) -> int:
        """Add a GEMM, with half of the layer's element-wise kernels if `norms`."""
        m = self.spec
        qk_width, ffn_width = (self.heads + self.kv_heads) * m.head_dim, m.ffn_dim // self.tp

        def seconds(op: CostSource) -> float:
            beside = op.elementwise_s(tokens, m.hidden, qk_width, ffn_width) / 2.0
            return op.gemm_s(tokens, n, k, _BYTES) + (beside if norms else 0.0)

        return self._task(label, seconds)

    def _all_reduce(self, tokens: float, parents: list[int]) -> int:
        size = _BYTES * tokens * self.spec.hidden
        stage = self._task(_REDUCE, lambda op: op.all_reduce_s(size, self.tp))
        for parent in parents:
            self.builder.edge(parent, stage)
        return stage

    def _task(self, label: int, seconds: Callable[[CostSource], float]) -> int:
        return self.builder.task(label, {name: seconds(op) for name, op in self.sources.items()})


@cache
def _source(gpu_name: str) -> CostSource:
    return RooflineSource(gpu(gpu_name))


def _decode_s(op: CostSource, contexts: IntArray, shape: Heads) -> float:
    attend_s = op.decode_attention_s(float(len(contexts)), float(contexts.sum()), shape)
    return op.attention_launch_s() + attend_s


def _prefill_s(op: CostSource, prompts: IntArray, shape: Heads) -> float:
    attend_s = sum(op.prefill_attention_s(float(length), 0.0, shape) for length in prompts)
    return op.attention_launch_s() + attend_s
