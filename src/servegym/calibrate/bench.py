"""Time kernels with torch: warm-up, CUDA events, medians and their spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from servegym.calibrate.machine import Device
from servegym.calibrate.plan import Kernel, Shapes

#: What one sample lasts at least, and all samples of a kernel at most.
_SAMPLE_S = {"cuda": 1e-3, "cpu": 2e-3}
_KERNEL_S = 1.0
_MIN_SAMPLES, _MAX_SAMPLES = 5, 50
_MAX_COPIES = 64

#: Runs a kernel; the number tells which copy of its weights or KV it reads.
Call = Callable[[int], object]


class Timing(NamedTuple):
    """What a kernel took.

    Attributes:
        median_s: Of all samples.
        spread: Distance of the quartiles over the median.
        samples: Their number.
    """

    median_s: float
    spread: float
    samples: int


class KernelTimer(Protocol):
    """What measures how long kernels take."""

    def __call__(self, kernel: Kernel) -> Timing:
        """Return how long it takes."""
        ...


class Bench:
    """Kernels of a model on one device, in bf16.

    An engine streams its weights and KV through the cache between two uses. So that a benchmark
    does not find them there, each call reads the next of as many copies as fill the cache twice.

    Args:
        device: Where to run.
        shapes: Of the model's operators.
        cache_bytes: Last cache of the device.
    """

    def __init__(self, device: Device, shapes: Shapes, cache_bytes: float) -> None:
        self.device: Device = device
        self.shapes = shapes
        self.cache_bytes = cache_bytes

    def __call__(self, kernel: Kernel) -> Timing:
        """Time a GEMM or an attention kernel."""
        import torch

        with torch.inference_mode():
            if kernel.operator == "gemm":
                m, n, k = kernel.shape
                return timed(self.device, self._gemm(m, n, k))
            x, y = kernel.shape
            call = self._prefill(x, y) if kernel.operator == "prefill" else self._decode(x, y)
            return timed(self.device, call)

    def _copies(self, num_bytes: float) -> int:
        return max(1, min(_MAX_COPIES, math.ceil(2.0 * self.cache_bytes / num_bytes)))

    def _gemm(self, m: int, n: int, k: int) -> Call:
        import torch

        x = torch.randn(m, k, device=self.device, dtype=torch.bfloat16)
        count = self._copies(2.0 * n * k)
        weights = torch.randn(count, n, k, device=self.device, dtype=torch.bfloat16)
        return lambda i: torch.nn.functional.linear(x, weights[i % count])

    def _prefill(self, chunk: int, context: int) -> Call:
        import torch
        from torch.nn.attention.bias import causal_lower_right

        if not context:
            return self._attention(1, chunk, chunk, is_causal=True)
        # new tokens see all cached ones, and each other causally: aligned at the lower right
        if self.device == "cuda":
            mask: object = causal_lower_right(chunk, chunk + context)
        else:
            mask = torch.ones(chunk, chunk + context, dtype=torch.bool).tril(context)
        return self._attention(1, chunk, chunk + context, attn_mask=mask)

    def _decode(self, batch: int, kv_tokens: int) -> Call:
        return self._attention(batch, 1, kv_tokens // batch)

    def _attention(
        self,
        batch: int,
        queries: int,
        keys: int,
        attn_mask: Any = None,
        is_causal: bool = False,
    ) -> Call:
        """Attention of `[batch, heads, queries, head_dim]` to as many `keys` of each sequence."""
        import torch

        s = self.shapes
        half = partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        query = half(batch, s.heads, queries, s.head_dim)
        count = self._copies(4.0 * batch * s.kv_heads * keys * s.head_dim)
        cache = half(count, 2, batch, s.kv_heads, keys, s.head_dim)
        return lambda i: torch.nn.functional.scaled_dot_product_attention(
            query,
            cache[i % count, 0],
            cache[i % count, 1],
            attn_mask=attn_mask,
            is_causal=is_causal,
            enable_gqa=True,
        )


def timed(device: Device, call: Call) -> Timing:
    """Warm up, then sample a call; short ones many to a sample."""
    for i in range(3):
        call(i)
    once_s = max(_clock(device, call, 1), 1e-7)
    calls = max(1, math.ceil(_SAMPLE_S[device] / once_s))
    fits = int(_KERNEL_S / (calls * once_s))
    samples = max(_MIN_SAMPLES, min(_MAX_SAMPLES, fits))
    if device == "cuda":
        seconds = np.array(_cuda_samples(call, calls, samples))
    else:
        seconds = np.array([_clock(device, call, calls) for _ in range(samples)])
    low, middle, high = np.percentile(seconds, (25, 50, 75))
    return Timing(float(middle), float((high - low) / middle), samples)


def _clock(device: Device, call: Call, calls: int) -> float:
    """Seconds a call, by the clock of the host."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _cuda_samples(call: Call, calls: int, samples: int) -> list[float]:
    """Seconds a call between CUDA events; a graph keeps launches by the host out, as engines do."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    found = []
    for _ in range(samples):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e-3 * start.elapsed_time(end) / calls)
    return found
