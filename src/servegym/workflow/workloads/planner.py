"""A planner that calls functions in parallel and looks at what they return."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.family import (
    Family,
    draw_tokens,
)
from servegym.workloads.mixtures import LengthConfig, Seconds, WorkloadPart

_PLAN, _JOIN, _ANSWER, _FIRST_TOOL = 0, 1, 2, 3


class Tool(WorkloadPart):
    """A function: how often it is called, how long it takes, how much it returns."""

    share: float = Field(ge=0)
    takes: Seconds
    result: LengthConfig


def _tool(share: float, median_s: float, sigma: float, result_tokens: float) -> Tool:
    return Tool(
        share=share,
        takes=Seconds(medians_s=(median_s,), sigmas=(sigma,), max_s=120.0),
        result=LengthConfig(medians_tokens=(result_tokens,), sigmas=(0.8,), max_tokens=8192),
    )


class PlannerExecutor(Family):
    """One request: plan, call functions at once, look at the results, plan again or answer.

    The plan says which functions are called and which of them wait for each other, as in
    LLMCompiler (Kim et al. 2024): the calls are hidden until it is written, and so is every round
    but the first until the one before has been looked at. Each prompt repeats the whole
    conversation. All figures are assumptions, of the order that such systems report.

    Attributes:
        request: Length of the planner's prompt, descriptions of the functions included.
        tokens_per_call: Of a plan, for each call.
        mean_calls: Calls in a round, geometric.
        max_calls: Calls in a round at most.
        chain_probability: That a call waits for the one before it.
        judgement: Length of what the model writes about the results.
        answer: Length of answers.
        replan_probability: That another round follows.
        max_rounds: Rounds at most.
        search: A function, like the following.
        database: A query.
        code: A program in a sandbox.
        calculator: Next to no time.
    """

    labels: ClassVar[tuple[str, ...]] = (
        *("plan", "join", "answer"),
        *("search", "database", "code", "calculator"),
    )

    kind: Literal["planner-executor"] = "planner-executor"
    request: LengthConfig = LengthConfig(medians_tokens=(1500.0,), sigmas=(0.4,), max_tokens=16384)
    tokens_per_call: int = Field(40, ge=1)
    mean_calls: float = Field(3.0, ge=1)
    max_calls: int = Field(16, ge=1)
    chain_probability: float = Field(0.25, ge=0, le=1)
    judgement: LengthConfig = LengthConfig(medians_tokens=(60.0,), sigmas=(0.6,), max_tokens=1024)
    answer: LengthConfig = LengthConfig(medians_tokens=(250.0,), sigmas=(0.7,), max_tokens=4096)
    replan_probability: float = Field(0.3, ge=0, le=1)
    max_rounds: int = Field(5, ge=1)
    search: Tool = _tool(0.4, 0.8, 0.6, 400.0)
    database: Tool = _tool(0.3, 0.25, 0.8, 150.0)
    code: Tool = _tool(0.2, 2.5, 1.0, 200.0)
    calculator: Tool = _tool(0.1, 0.005, 0.3, 5.0)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw one request."""
        builder = JobBuilder("planner-executor")
        context = draw_tokens(rng, self.request)
        rounds = 1
        while rounds < self.max_rounds and rng.random() < self.replan_probability:
            rounds += 1
        last: int | None = None
        first_join = 0
        for k in range(rounds):
            last, context = self._round(rng, builder, last, context, hidden=k > 0)
            first_join = first_join or last
        assert last is not None
        answer = self._ask(rng, builder, _ANSWER, context, self.answer)[0]
        builder.edge(last, answer, shared_tokens=context)
        if last != first_join:  # what is known beforehand: that an answer follows
            builder.edge(first_join, answer)
        return builder.build()

    def _round(
        self,
        rng: np.random.Generator,
        builder: JobBuilder,
        last: int | None,
        context: int,
        *,
        hidden: bool,
    ) -> tuple[int, int]:
        """Add plan, calls and judgement; returns the latter and the tokens up to its end."""
        count = min(self.max_calls, int(rng.geometric(1.0 / self.mean_calls)))
        plan_tokens = self.tokens_per_call * count
        mean = self.tokens_per_call * self.mean_calls
        expected = self.expected_tokens(rng, plan_tokens, mean)
        plan = builder.llm(_PLAN, context, plan_tokens, expected, hidden=hidden)
        if last is not None:
            builder.edge(last, plan, shared_tokens=context)
        context += plan_tokens
        tools = (self.search, self.database, self.code, self.calculator)
        shares = np.array([tool.share for tool in tools])
        returned, calls = 0, list[int]()
        for _ in range(count):
            which = int(rng.choice(len(tools), p=shares / shares.sum()))
            takes = tools[which].takes
            call = builder.tool(_FIRST_TOOL + which, takes.draw(rng), takes.mean_s, hidden=True)
            waits = calls and rng.random() < self.chain_probability
            builder.edge(calls[-1] if waits else plan, call)
            calls.append(call)
            returned += draw_tokens(rng, tools[which].result)
        join, output = self._ask(
            rng, builder, _JOIN, context + returned, self.judgement, hidden=hidden
        )
        builder.edge(plan, join, shared_tokens=context)
        for call in calls:
            builder.edge(call, join)
        return join, context + returned + output

    def _ask(
        self,
        rng: np.random.Generator,
        builder: JobBuilder,
        label: int,
        prompt_tokens: int,
        lengths: LengthConfig,
        *,
        hidden: bool = False,
    ) -> tuple[int, int]:
        output = draw_tokens(rng, lengths)
        expected = self.expected_tokens(rng, output, lengths.mean_tokens)
        return builder.llm(label, prompt_tokens, output, expected, hidden=hidden), output
