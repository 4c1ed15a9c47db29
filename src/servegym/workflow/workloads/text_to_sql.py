"""Questions to a database: schema linking, candidate queries, corrections and tests."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.family import Family, draw_around


class Step(IntEnum):
    """Steps of a job by their labels."""

    RETRIEVE = 0
    KEYWORDS = 1
    CANDIDATE = 2
    REVISE = 3
    TEST = 4
    WRITE_TESTS = 5
    EVALUATE = 6


class Figures(NamedTuple):
    """Means of a step: lengths, and seconds on one engine of Llama-3.1-70B."""

    prompt_tokens: int
    output_tokens: int
    a100_s: float
    a6000_s: float
    l40_s: float

    @property
    def mean_s(self) -> float:
        """Mean over the three types of engines."""
        return (self.a100_s + self.a6000_s + self.l40_s) / 3.0


#: From the tables in the simulator of HexGen-Text2SQL (Relaxed-System-Lab/Hexgen-Flow), which the
#: authors took from runs of the CHESS pipeline on BIRD.
FIGURES = {
    Step.RETRIEVE: Figures(308, 5, 0.2253, 0.4869, 0.4003),
    Step.KEYWORDS: Figures(667, 45, 1.1359, 2.1088, 2.0330),
    Step.CANDIDATE: Figures(11748, 678, 18.2363, 34.2747, 32.6221),
    Step.REVISE: Figures(5963, 79, 3.3314, 8.0309, 5.8850),
    Step.TEST: Figures(275, 4, 0.1735, 0.3907, 0.3077),
    Step.WRITE_TESTS: Figures(1109, 103, 2.5385, 4.5617, 4.5497),
    Step.EVALUATE: Figures(961, 22, 0.8670, 1.7923, 1.5440),
}
#: How often a typical question takes each step; those of a kind that run at once count once.
TYPICAL = {
    Step.RETRIEVE: 4,
    Step.KEYWORDS: 1,
    Step.CANDIDATE: 1,
    Step.REVISE: 4,
    Step.TEST: 3,
    Step.WRITE_TESTS: 1,
    Step.EVALUATE: 1,
}
#: Seconds of a typical question on engines without other load, the unit of deadlines.
NOMINAL_S = sum(count * FIGURES[step].mean_s for step, count in TYPICAL.items())
_MIN_EVALUATIONS = 2


class TextToSql(Family):
    """One question: link it to the schema, write candidates at once, correct, test and judge them.

    How often a query must be corrected, and how many groups of candidates are left to judge, shows
    only as the job goes on: those stages are hidden. Counts are drawn as in HexGen's generator.

    Attributes:
        candidates: Queries written at once.
        max_revisions: Corrections, one after the other, 0 to this many alike likely.
        max_evaluations: Judgements at once, 2 to this many alike likely.
        prompt_sigma: Spread of the size of schemas, one draw a job; an assumption.
        output_sigma: Spread of outputs around the mean of their step; an assumption.
        repeated_share: Leading share of a correction's prompt that repeats the one before; an
            assumption.
        deadline_scales: Deadline of each class, in multiples of `NOMINAL_S`; HexGen's two tenants.
        class_shares: Shares of the classes.
    """

    labels: ClassVar[tuple[str, ...]] = tuple(step.name.lower() for step in Step)

    kind: Literal["text-to-sql"] = "text-to-sql"
    candidates: int = Field(8, ge=1)
    max_revisions: int = Field(10, ge=0)
    max_evaluations: int = Field(7, ge=_MIN_EVALUATIONS)
    prompt_sigma: float = Field(0.4, ge=0)
    output_sigma: float = Field(0.4, ge=0)
    repeated_share: float = Field(0.8, ge=0, le=1)
    deadline_scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0)
    class_shares: tuple[Annotated[float, Field(ge=0)], ...] = (0.5, 0.5)

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if len(self.deadline_scales) != len(self.class_shares) or not any(self.class_shares):
            raise ValueError(
                "deadline_scales and class_shares need one number a class each, and one share above"
                f" 0, got {len(self.deadline_scales)} and {len(self.class_shares)} numbers"
            )
        return self

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the job of one question."""
        builder = JobBuilder("text-to-sql")
        scale = draw_around(rng, 1.0, self.prompt_sigma)

        def ask(
            step: Step, parents: list[int], *, shared: float = 0.0, hidden: bool = False
        ) -> int:
            mean = FIGURES[step]
            prompt = max(1, round(scale * mean.prompt_tokens))
            output = max(1, round(draw_around(rng, mean.output_tokens, self.output_sigma)))
            expected = self.expected_tokens(rng, output, mean.output_tokens)
            stage = builder.llm(step, prompt, output, expected, hidden=hidden)
            for parent in parents:
                builder.edge(parent, stage, shared_tokens=int(shared * prompt))
            return stage

        stage = ask(Step.RETRIEVE, [])
        stage = ask(Step.KEYWORDS, [stage])
        for _ in range(TYPICAL[Step.RETRIEVE] - 1):
            stage = ask(Step.RETRIEVE, [stage])
        candidates = [ask(Step.CANDIDATE, [stage]) for _ in range(self.candidates)]
        revised: list[int] = []
        for _ in range(int(rng.integers(0, self.max_revisions + 1))):
            if revised:
                last = ask(Step.REVISE, revised[-1:], shared=self.repeated_share, hidden=True)
            else:
                last = ask(Step.REVISE, candidates, hidden=True)
            revised.append(last)
        # what is known beforehand: that tests follow the candidates
        stage = ask(Step.TEST, [*candidates, *revised[-1:]])
        stage = ask(Step.WRITE_TESTS, [stage])
        tested = ask(Step.TEST, [stage])
        evaluations = int(rng.integers(_MIN_EVALUATIONS, self.max_evaluations + 1))
        judged = [
            ask(Step.EVALUATE, [tested], hidden=i >= _MIN_EVALUATIONS) for i in range(evaluations)
        ]
        ask(Step.TEST, judged)
        shares = np.array(self.class_shares) / sum(self.class_shares)
        slo_class = rng.choice(len(shares), p=shares)
        return builder.build(deadline_s=self.deadline_scales[slo_class] * NOMINAL_S)
