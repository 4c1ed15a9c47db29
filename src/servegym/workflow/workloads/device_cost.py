"""Durations of whole passes and training steps of a model on a node, from the kernel costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from servegym.assets.specs import gpu, model
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.typing import FloatArray, IntArray

#: Tokens that a forward pass without decoding takes at once.
_PASS_TOKENS = 16384.0
#: Of a parameter in training: weights and gradients in two bytes each, master weights and both
#: moments of Adam in four.
TRAINING_BYTES = 16.0
WEIGHT_BYTES = 2.0
_MEMORY_SHARE = 0.9
#: Steps of decoding at which a batch whose sequences end one after the other is sampled.
_DECODE_SAMPLES = 24


@dataclass(frozen=True)
class DeviceCost:
    """A model on a node of some GPUs, tensor parallel."""

    step: StepCost

    def forward_s(self, lengths: IntArray) -> float:
        """Seconds of a forward pass over sequences of these lengths, 16,384 tokens at once."""
        known, seconds = self._attention_s
        total = float(np.interp(lengths, known, seconds).sum())
        left = float(lengths.sum())
        while left > 0.0:
            tokens = min(left, _PASS_TOKENS)
            total += self.step.dense_s(tokens) + self.step.operators.cpu_s()
            left -= tokens
        return total

    def generation_s(self, prompt_tokens: int, output_tokens: IntArray) -> float:
        """Seconds to generate outputs of these lengths, as many at once as there is memory for."""
        longest = prompt_tokens + int(output_tokens.max())
        at_once = self.step.kv_capacity_tokens() // longest
        total = 0.0
        for first in range(0, len(output_tokens), at_once):
            outputs = np.sort(output_tokens[first : first + at_once])
            total += self.forward_s(np.full(len(outputs), prompt_tokens))
            # the first token comes with the prompt
            steps = np.linspace(0.0, float(outputs[-1] - 1), _DECODE_SAMPLES)
            alive = len(outputs) - np.searchsorted(outputs, steps, side="right")
            step_s = [
                sum(self.step.terms(n, batch=n, kv_tokens=n * (prompt_tokens + done)).values())
                for n, done in zip(alive.tolist(), steps.tolist(), strict=True)
            ]
            total += float(np.trapezoid(step_s, steps))
        return total

    def training_s(self, lengths: IntArray) -> float:
        """Seconds of an optimiser step: forward, backward of twice the work, and the update."""
        state_bytes = TRAINING_BYTES * self.step.model.num_params / self.step.tp
        return 3.0 * self.forward_s(lengths) + state_bytes / self.step.gpu.memory_bytes_per_s

    def can_train(self) -> bool:
        """Whether weights, gradients and the optimiser's state fit."""
        memory_bytes = _MEMORY_SHARE * self.step.gpu.memory_bytes * self.step.tp
        return TRAINING_BYTES * self.step.model.num_params <= memory_bytes

    def can_hold(self, tokens: int) -> bool:
        """Whether the weights and the KV cache of a sequence of `tokens` fit."""
        try:
            return self.step.kv_capacity_tokens() >= tokens
        except ConfigError:
            return False

    @cached_property
    def _attention_s(self) -> tuple[FloatArray, FloatArray]:
        """Seconds of attention over whole prompts of sampled lengths."""
        lengths = np.unique(np.round(np.geomspace(1, 131072, 120)))
        seconds = [self.step.terms(n, chunk=n)["prefill attention"] for n in lengths.tolist()]
        return lengths, np.array(seconds)


@cache
def device_cost(gpu_name: str, model_name: str, num_gpus: int) -> DeviceCost:
    """Return the costs of a model on a node.

    Raises:
        ConfigError: If a name is unknown, or the model cannot be split over that many GPUs.
    """
    return DeviceCost(StepCost(gpu(gpu_name), model(model_name), num_gpus))
