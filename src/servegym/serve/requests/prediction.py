"""How long an answer will be, from the answers so far."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

#: What clients and engines say beyond this is no length.
_MAX_TOKENS = 2**31


class LengthPrediction(BaseModel):
    """How output lengths are predicted.

    Attributes:
        kind: `mean` is the moving average of the tenant's answers in this service class (of the
            class, or of all, while there are too few); `quantile` a moving quantile of the same;
            `max-tokens` what the client allows. None exceeds what the client allows.
        quantile: For `quantile`.
        weight: Of the newest answer.
        min_answers: Fewer are too few.
        initial_tokens: Before the first answer.
        max_groups: Pairs of tenant and class remembered.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["mean", "quantile", "max-tokens"] = "mean"
    quantile: float = Field(0.5, gt=0, lt=1)
    weight: float = Field(0.05, gt=0, le=1)
    min_answers: int = Field(10, ge=1)
    initial_tokens: float = Field(256.0, ge=1)
    max_groups: int = Field(10_000, ge=1)


@dataclass(slots=True)
class _Group:
    """Answers of one group."""

    count: int = 0
    mean: float = 0.0
    quantile: float = 0.0


class LengthPredictor:
    """Learns from finished answers.

    Args:
        config: How.
    """

    def __init__(self, config: LengthPrediction) -> None:
        self.config = config
        self._groups: OrderedDict[tuple[str | None, int], _Group] = OrderedDict()

    def predict(self, tenant: str, slo_class: int, max_tokens: int | None = None) -> float:
        """Predict an output length in tokens, at least 1.

        Args:
            tenant: Who asks.
            slo_class: In which service class.
            max_tokens: What the client allows, if it says so.
        """
        config = self.config
        limit = float(min(max_tokens, _MAX_TOKENS)) if max_tokens is not None else math.inf
        if config.kind == "max-tokens" and max_tokens is not None:
            return max(1.0, limit)
        for key in _keys(tenant, slo_class):
            group = self._groups.get(key)
            if group is not None and group.count >= config.min_answers:
                value = group.quantile if config.kind == "quantile" else group.mean
                return max(1.0, min(value, limit))
        return max(1.0, min(config.initial_tokens, limit))

    def learn(self, tenant: str, slo_class: int, output_tokens: int) -> None:
        """Count a finished answer."""
        output_tokens = min(output_tokens, _MAX_TOKENS)
        for key in _keys(tenant, slo_class):
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = _Group()
                if len(self._groups) > self.config.max_groups:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            group.count += 1
            # a plain average of the first answers, then a moving one
            weight = max(self.config.weight, 1.0 / group.count)
            group.mean += weight * (output_tokens - group.mean)
            if group.count == 1:
                group.quantile = float(output_tokens)
            # Robbins and Monro: up by q, down by 1 - q, in steps of the size of the answers
            step = 2.0 * weight * group.mean
            below = output_tokens <= group.quantile
            group.quantile += step * (self.config.quantile - below)


def _keys(tenant: str, slo_class: int) -> tuple[tuple[str | None, int], ...]:
    """From the most to the least special group."""
    return (tenant, slo_class), (None, slo_class), (None, -1)
