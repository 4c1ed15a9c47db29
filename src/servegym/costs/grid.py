"""The compiled form of a step cost: piecewise-linear grids of fixed size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import FloatArray

#: Knots per axis. Fixed, so that replicas of different types share one array in the simulator.
NUM_DENSE_KNOTS = 48
NUM_CHUNK_KNOTS = 16
NUM_CONTEXT_KNOTS = 16
NUM_BATCH_KNOTS = 16
NUM_KV_KNOTS = 24


@dataclass(frozen=True)
class CostGrid:
    """Duration of one engine step of one replica type, as sums of piecewise-linear terms.

    `step_s = cpu_s + dense(tokens) + sum over chunks of prefill(chunk, context)
    + decode(batch, kv_tokens) if batch > 0`; in a step with both chunks and decodes
    `mixed + empty_tiles_s * batch * longest chunk` takes the place of `decode`, and no step with
    chunks is shorter than `eager_s`. Between knots each
    term is linear (bilinear for the two-dimensional ones), beyond the last knot it goes on with
    the last slope; below the first knot with the first slope. All knots ascend strictly.

    Attributes:
        cpu_s: Time of a step that is independent of its tokens: scheduler, launch, sampling.
        dense_tokens: Knots of all tokens in the step (decodes + chunks),
            `float64[NUM_DENSE_KNOTS]`.
        dense_s: Seconds of GEMMs, MoE and collectives at those knots, same shape.
        prefill_chunk: Knots of new prompt tokens of one request, `float64[NUM_CHUNK_KNOTS]`.
        prefill_context: Knots of its tokens already in the KV cache,
            `float64[NUM_CONTEXT_KNOTS]`.
        prefill_s: Attention seconds of the chunk,
            `float64[NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS]`.
        decode_batch: Knots of decoding sequences, `float64[NUM_BATCH_KNOTS]`.
        decode_kv: Knots of the tokens all of them attend to, new ones included,
            `float64[NUM_KV_KNOTS]`.
        decode_s: Attention seconds, `float64[NUM_BATCH_KNOTS, NUM_KV_KNOTS]`.
        mixed_s: The same in a step that also prefills, same shape; left out: as `decode_s`.
        empty_tiles_s: Added to such a step for each decode and token of its longest chunk.
        eager_s: Least time of a step with chunks, whose kernels the CPU launches one by one where
            an engine has no CUDA graph for them.
    """

    cpu_s: float
    dense_tokens: FloatArray
    dense_s: FloatArray
    prefill_chunk: FloatArray
    prefill_context: FloatArray
    prefill_s: FloatArray
    decode_batch: FloatArray
    decode_kv: FloatArray
    decode_s: FloatArray
    mixed_s: FloatArray = None  # type: ignore[assignment]  # set below, never None
    empty_tiles_s: float = 0.0
    eager_s: float = 0.0

    def __post_init__(self) -> None:
        if self.mixed_s is None:
            object.__setattr__(self, "mixed_s", self.decode_s)
        expected = {
            "dense_tokens": (NUM_DENSE_KNOTS,),
            "dense_s": (NUM_DENSE_KNOTS,),
            "prefill_chunk": (NUM_CHUNK_KNOTS,),
            "prefill_context": (NUM_CONTEXT_KNOTS,),
            "prefill_s": (NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS),
            "decode_batch": (NUM_BATCH_KNOTS,),
            "decode_kv": (NUM_KV_KNOTS,),
            "decode_s": (NUM_BATCH_KNOTS, NUM_KV_KNOTS),
            "mixed_s": (NUM_BATCH_KNOTS, NUM_KV_KNOTS),
        }
        for name, shape in expected.items():
            values = getattr(self, name)
            if values.shape != shape:
                raise ConfigError(f"{name} must have shape {shape}, got {values.shape}")
            if not np.isfinite(values).all() or (values < 0).any():
                raise ConfigError(f"{name} must be finite and not negative")
            if not name.endswith("_s") and (np.diff(values) <= 0).any():
                raise ConfigError(f"the knots {name} must ascend strictly")
        for name in ("cpu_s", "empty_tiles_s", "eager_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be finite and not negative, got {value}")
        if self.cpu_s + self.dense_s[0] <= 0:
            raise ConfigError("a step must last longer than 0 s: cpu_s and dense_s[0] are both 0")

    def dense(self, tokens: float) -> float:
        """Return the dense term in seconds for `tokens` tokens in the step."""
        return _linear(self.dense_tokens, self.dense_s, tokens)

    def prefill(self, chunk: float, context: float) -> float:
        """Return the attention seconds of `chunk` new tokens over `context` cached ones."""
        i, w = _locate(self.prefill_chunk, chunk)
        low = _linear(self.prefill_context, self.prefill_s[i], context)
        high = _linear(self.prefill_context, self.prefill_s[i + 1], context)
        return low + w * (high - low)

    def decode(self, batch: float, kv_tokens: float) -> float:
        """Return the attention seconds of `batch` sequences attending to `kv_tokens` in all."""
        return self._decode(self.decode_s, batch, kv_tokens)

    def mixed(self, batch: float, kv_tokens: float) -> float:
        """Return the same for a step that also prefills."""
        return self._decode(self.mixed_s, batch, kv_tokens)

    def _decode(self, values: FloatArray, batch: float, kv_tokens: float) -> float:
        i, w = _locate(self.decode_batch, batch)
        low = _linear(self.decode_kv, values[i], kv_tokens)
        high = _linear(self.decode_kv, values[i + 1], kv_tokens)
        return low + w * (high - low)

    def step_s(
        self, chunks: list[tuple[int, int]], num_decodes: int = 0, kv_tokens: int = 0
    ) -> float:
        """Return the duration of one step.

        Args:
            chunks: `(chunk, context)` in tokens of every prefilling request in the step.
            num_decodes: Sequences that decode one token.
            kv_tokens: Tokens these attend to in all, their new ones included.

        Returns:
            Seconds.
        """
        tokens = num_decodes + sum(chunk for chunk, _ in chunks)
        total = self.cpu_s + self.dense(tokens)
        total += sum(self.prefill(chunk, context) for chunk, context in chunks)
        if num_decodes:
            attention = self.mixed if chunks else self.decode
            total += attention(num_decodes, kv_tokens)
            longest = max((chunk for chunk, _ in chunks), default=0)
            total += self.empty_tiles_s * num_decodes * longest
        return max(total, self.eager_s) if chunks else total


def scaled(grid: CostGrid, factor: float) -> CostGrid:
    """Return a grid all of whose times are so many times as long."""
    names = ("cpu_s", "dense_s", "prefill_s", "decode_s", "mixed_s", "empty_tiles_s", "eager_s")
    return replace(grid, **{name: factor * getattr(grid, name) for name in names})


def _locate(knots: FloatArray, x: float) -> tuple[int, float]:
    i = min(max(int(knots.searchsorted(x, side="right")) - 1, 0), len(knots) - 2)
    return i, float((x - knots[i]) / (knots[i + 1] - knots[i]))


def _linear(knots: FloatArray, values: FloatArray, x: float) -> float:
    i, w = _locate(knots, x)
    return float(values[i] + w * (values[i + 1] - values[i]))
