"""The compiled form of what a pipeline costs: a grid for each stage, and the handovers between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from servegym.costs.grid import NUM_DENSE_KNOTS, CostGrid
from servegym.costs.pipeline import PipelineCost
from servegym.errors import ConfigError
from servegym.typing import FloatArray


@dataclass(frozen=True)
class StageGrids:
    """Durations of the parts of one batch in a pipeline.

    Attributes:
        stages: Step cost of each stage's own layers, in order.
        handover_s: Seconds from the end of one stage to the start of the next, by the tokens of
            the batch, at the knots `dense_tokens` of the first stage;
            `float64[NUM_DENSE_KNOTS]`.
    """

    stages: tuple[CostGrid, ...]
    handover_s: FloatArray

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a pipeline must have at least 1 stage, got none")
        if self.handover_s.shape != (NUM_DENSE_KNOTS,):
            raise ConfigError(
                f"handover_s must have shape ({NUM_DENSE_KNOTS},), got {self.handover_s.shape}"
            )
        if not np.isfinite(self.handover_s).all() or (self.handover_s < 0).any():
            raise ConfigError("handover_s must be finite and not negative")

    @classmethod
    def of(cls, pipeline: PipelineCost, max_tokens: int = 8192) -> StageGrids:
        """Compile the cost of a pipeline.

        Args:
            pipeline: Of a model on its stages.
            max_tokens: Largest token budget of a batch.
        """
        made: dict[tuple[object, ...], CostGrid] = {}
        stages = []
        for number, cost in enumerate(pipeline.stages):
            last = number == pipeline.pp - 1
            model = cost.model
            alike = (model.layers, model.dense_layers, model.window_layers, last)
            if alike not in made:
                grid = cost.compile(max_tokens=max_tokens)
                if not last:
                    head_s = [cost.terms(tokens)["output head"] for tokens in grid.dense_tokens]
                    dense_s = np.maximum(grid.dense_s - np.array(head_s), 0.0)
                    grid = replace(grid, dense_s=dense_s)
                made[alike] = grid
            stages.append(made[alike])
        knots = stages[0].dense_tokens
        return cls(tuple(stages), np.array([pipeline.handover_s(tokens) for tokens in knots]))

    def handover(self, tokens: float) -> float:
        """Return the seconds from the end of one stage to the start of the next."""
        return replace(self.stages[0], dense_s=self.handover_s).dense(tokens)

    def stage_s(
        self, chunks: list[tuple[int, int]], num_decodes: int = 0, kv_tokens: int = 0
    ) -> tuple[float, ...]:
        """Return the seconds of each stage's own work on one batch, see `CostGrid.step_s`."""
        return tuple(one.step_s(chunks, num_decodes, kv_tokens) for one in self.stages)

    def changed(self, change: Callable[[CostGrid], CostGrid]) -> StageGrids:
        """Return the same pipeline with each stage's grid changed."""
        return replace(self, stages=tuple(change(one) for one in self.stages))

    @property
    def shared_round(self) -> CostGrid:
        """The step cost of an engine without stages that is as fast as a full pipeline.

        Its step is a round: as many equal batches as stages share the work, and each takes its
        time on the slowest stage. For whoever states rates, or plans without batches in flight.
        """
        slowest = max(self.stages, key=lambda one: one.cpu_s + float(one.dense_s[0]))
        n = len(self.stages)
        return replace(
            slowest,
            cpu_s=n * slowest.cpu_s,
            dense_tokens=n * slowest.dense_tokens,
            dense_s=n * slowest.dense_s,
            decode_batch=n * slowest.decode_batch,
            decode_kv=n * slowest.decode_kv,
            decode_s=n * slowest.decode_s,
            mixed_s=n * slowest.mixed_s,
            empty_tiles_s=slowest.empty_tiles_s / n,
            eager_s=n * slowest.eager_s,
        )
