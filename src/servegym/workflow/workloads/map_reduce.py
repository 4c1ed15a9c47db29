"""Summaries of long documents: chunks at once, then summaries of summaries."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.family import Family, draw_tokens
from servegym.workloads.mixtures import LengthConfig

_MAP, _REDUCE = 0, 1
#: Text that goes from one request to the next.
_BYTES_PER_TOKEN = 4.0


class MapReduce(Family):
    """One document: summarise each chunk, then `fan_in` summaries at a time until one is left.

    A reducing prompt is as long as the summaries in it turned out.

    Attributes:
        document: Length of documents; an assumption.
        chunk_tokens: Of the document in one request; the last chunk may be shorter.
        instruction_tokens: Ahead of every prompt.
        fan_in: Summaries in one reducing request.
        summary: Length of summaries, fitted to 14,128 abstracts of arXiv-summarization as used by
            Vidur (Kolmogorov distance 0.008).
    """

    labels: ClassVar[tuple[str, ...]] = ("map", "reduce")

    kind: Literal["map-reduce"] = "map-reduce"
    document: LengthConfig = LengthConfig(
        medians_tokens=(30000.0,), sigmas=(0.7,), max_tokens=400000
    )
    chunk_tokens: int = Field(4000, ge=1)
    instruction_tokens: int = Field(150, ge=1)
    fan_in: int = Field(8, ge=2)
    summary: LengthConfig = LengthConfig(
        medians_tokens=(153.9, 162.5, 2700.5),
        sigmas=(0.828, 0.446, 0.256),
        weights=(0.302, 0.658, 0.040),
        max_tokens=4096,
    )

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the job of one document."""
        builder = JobBuilder("map-reduce")
        mean = self.summary.mean_tokens

        def ask(label: int, prompt_tokens: int, parents: list[tuple[int, int]]) -> tuple[int, int]:
            output = draw_tokens(rng, self.summary)
            stage = builder.llm(
                label, prompt_tokens, output, self.expected_tokens(rng, output, mean)
            )
            for parent, length in parents:
                builder.edge(parent, stage, data_bytes=_BYTES_PER_TOKEN * length)
            return stage, output

        left = draw_tokens(rng, self.document)
        parts = []
        while left > 0:
            chunk = min(left, self.chunk_tokens)
            parts.append(ask(_MAP, self.instruction_tokens + chunk, []))
            left -= chunk
        while len(parts) > 1:
            groups = [parts[i : i + self.fan_in] for i in range(0, len(parts), self.fan_in)]
            # a summary that is alone waits for the next round
            parts = [
                group[0]
                if len(group) == 1
                else ask(
                    _REDUCE, self.instruction_tokens + sum(length for _, length in group), group
                )
                for group in groups
            ]
        return builder.build()
