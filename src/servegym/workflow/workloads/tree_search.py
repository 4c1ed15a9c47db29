"""Sampling with a verifier: best of n, and search over trees of reasoning steps."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.family import Family, draw_tokens
from servegym.workloads.mixtures import LengthConfig

_READ, _SAMPLE, _SCORE, _SELECT = 0, 1, 2, 3
#: A verifier answers with one token, whose probability is the score.
_SCORE_TOKENS = 1


class TreeSearch(Family):
    """One problem: continue the `beam` best partial solutions in `width` ways each, until done.

    The first request stands for the prompt, which engines compute once for all samples. A
    continuation shares all of its parent's prompt and output, its score all of its own. Which
    partial solutions are kept, and after how many steps an answer is found, shows only then:
    everything after the first step is hidden. Beam search as in Snell et al. (2024), whose beam
    and width are 4; lengths and the chance to be done are assumptions.

    Attributes:
        question: Length of prompts.
        step: Length of a step of reasoning.
        beam: Partial solutions kept.
        width: Continuations of each; at the first step `beam * width` of the question.
        max_depth: Steps at most.
        done_probability: That a step completes a solution.
    """

    labels: ClassVar[tuple[str, ...]] = ("read", "sample", "score", "select")

    kind: Literal["tree-search"] = "tree-search"
    question: LengthConfig = LengthConfig(medians_tokens=(200.0,), sigmas=(0.6,), max_tokens=4096)
    step: LengthConfig = LengthConfig(medians_tokens=(80.0,), sigmas=(0.6,), max_tokens=1024)
    beam: int = Field(4, ge=1)
    width: int = Field(4, ge=1)
    max_depth: int = Field(10, ge=1)
    done_probability: float = Field(0.2, gt=0, le=1)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the job of one problem."""
        depth = min(self.max_depth, int(rng.geometric(self.done_probability)))
        return search_job(self, "tree-search", rng, self.question, self.step, self.shape(depth))

    def shape(self, depth: int) -> list[tuple[int, int]]:
        """Return for each step how many solutions are continued and in how many ways."""
        return [(1, self.beam * self.width), *[(self.beam, self.width)] * (depth - 1)]


class BestOfN(Family):
    """One question: `n` whole answers at once, each scored by a verifier; the best is returned.

    Attributes:
        n: Answers.
        question: Length of prompts; an assumption.
        answer: Length of answers; an assumption.
    """

    labels: ClassVar[tuple[str, ...]] = TreeSearch.labels

    kind: Literal["best-of-n"] = "best-of-n"
    n: int = Field(16, ge=1)
    question: LengthConfig = LengthConfig(medians_tokens=(200.0,), sigmas=(0.6,), max_tokens=4096)
    answer: LengthConfig = LengthConfig(medians_tokens=(400.0,), sigmas=(0.7,), max_tokens=4096)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the job of one question."""
        return search_job(self, "best-of-n", rng, self.question, self.answer, [(1, self.n)])


def search_job(
    family: Family,
    template: str,
    rng: np.random.Generator,
    question: LengthConfig,
    step: LengthConfig,
    shape: list[tuple[int, int]],
) -> Job:
    """Draw a search with the given number of kept solutions and continuations at each step.

    Args:
        family: Whose predictions are used.
        template: Name of the job.
        rng: Randomness.
        question: Length of prompts.
        step: Length of a continuation.
        shape: For each step, solutions kept before it and continuations of each.
    """
    builder = JobBuilder(template)
    prompt = draw_tokens(rng, question)
    root = builder.llm(_READ, prompt, 1)
    kept = [(root, prompt)]  # stages, and tokens of the path up to their end that are of use
    mean = step.mean_tokens
    selected: int | None = None
    for depth, (_, width) in enumerate(shape):
        samples, scores = [], []
        for parent, path in kept:
            for _ in range(width):
                output = draw_tokens(rng, step)
                expected = family.expected_tokens(rng, output, mean)
                stage = builder.llm(_SAMPLE, path, output, expected, hidden=depth > 0)
                builder.edge(parent, stage, shared_tokens=path)
                if selected is not None:
                    builder.edge(selected, stage)
                samples.append((stage, path + output))
        for stage, path in samples:
            score = builder.llm(_SCORE, path, _SCORE_TOKENS, hidden=depth > 0)
            builder.edge(stage, score, shared_tokens=path)
            scores.append(score)
        selected = builder.tool(_SELECT, 0.0, hidden=depth > 0)
        for score in scores:
            builder.edge(score, selected)
        if depth + 1 < len(shape):
            best = rng.permutation(len(samples))[: shape[depth + 1][0]]
            kept = [samples[i] for i in sorted(best)]
    return builder.build()
