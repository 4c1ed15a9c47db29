"""Long sessions of a coding agent, fitted to recorded ones."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.family import Family, draw_tokens
from servegym.workloads import fitted_sessions as fitted
from servegym.workloads.mixtures import LengthConfig, Seconds

CALL, TOOL, PAUSE, SUB_CALL, SUB_TOOL = range(5)


class CodingAgent(fitted.AgentSession, Family):
    """One session: calls of a model, with tools or a person's answer between them.

    Each prompt is the one before and what came since, so that a call shares all of the prompt of
    the one before; now and then the agent rewrites its context and shares only its beginning. Some
    sessions hand work to sub-agents, with a context of their own, and wait for them. No call but
    the first is known beforehand.

    The numbers are fitted to recorded sessions; `AgentSession` has those of the main agent. What a
    session starts with and how long it lasts, answers and growth are drawn independently; in the
    trace sessions that start with a long context have fewer calls (rank correlation -0.40), and a
    call's growth depends a little on the answer before it (0.32).

    Attributes:
        growth: What a prompt has more than the one before.
        spawn_probability: That a session uses sub-agents.
        spawn_rate: That a call of such a session starts some.
        spawn_weights: How likely it starts one, two, ... of them at once.
        sub_calls: Calls of a sub-agent.
        sub_first_prompt: With which it starts.
        sub_output: Length of its answers.
        sub_tool: Time between its calls.
        max_context_tokens: A prompt and answer beyond it make the agent rewrite its context, and a
            sub-agent stop.
    """

    labels: ClassVar[tuple[str, ...]] = (
        "call",
        "tool",
        "pause",
        "sub-agent call",
        "sub-agent tool",
    )

    kind: Literal["coding-agent"] = "coding-agent"
    growth: LengthConfig = fitted.GROWTH
    spawn_probability: float = Field(0.048, ge=0, le=1)
    spawn_rate: float = Field(0.0123, ge=0, le=1)
    spawn_weights: tuple[float, ...] = (0.55, 0.24, 0.21)
    sub_calls: LengthConfig = LengthConfig(medians_tokens=(9.56,), sigmas=(0.501,), max_tokens=50)
    sub_first_prompt: LengthConfig = LengthConfig(
        medians_tokens=(10760.0,), sigmas=(0.153,), max_tokens=50000
    )
    sub_output: LengthConfig = LengthConfig(
        medians_tokens=(217.0, 2971.0), sigmas=(0.384, 0.382), weights=(0.907, 0.093)
    )
    sub_tool: Seconds = Seconds(
        medians_s=(3.64, 35.1), sigmas=(0.428, 0.572), weights=(0.841, 0.159), max_s=600.0
    )
    max_context_tokens: int = Field(200000, ge=2000)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw one session."""
        builder = JobBuilder("coding-agent")
        spawns = rng.random() < self.spawn_probability
        prompt = draw_tokens(rng, self.first_prompt)
        previous: int | None = None
        waits: list[int] = []
        before, shared = 0, 0
        num_calls = draw_tokens(rng, self.calls)
        for k in range(num_calls):
            output = draw_tokens(rng, self.output)
            if prompt + output > self.max_context_tokens:
                prompt, shared = self._rewritten(rng, prompt, shrinks=True)
                shared = min(shared, before)
                output = min(output, self.max_context_tokens - prompt)
            call = self._call(rng, builder, CALL, prompt, output, self.output.mean_tokens, previous)
            if previous is not None:
                builder.edge(previous, call, shared_tokens=shared)
            for stage in waits:
                builder.edge(stage, call)
            if k + 1 == num_calls:
                break
            previous = call
            if spawns and rng.random() < self.spawn_rate:
                waits = self._sub_agents(rng, builder, call)
            elif rng.random() < self.pause_probability:
                pause_s = min(self.max_pause_s, self.pause.draw(rng))
                expected_s = min(self.max_pause_s, self.pause.mean_s)
                waits = [self._wait(builder, PAUSE, call, pause_s, expected_s)]
            else:
                tool_s = self.tool.draw(rng)
                waits = [self._wait(builder, TOOL, call, tool_s, self.tool.mean_s)]
            before = prompt
            if rng.random() < self.rewrite_probability:
                shrinks = rng.random() < self.rewrite_shrinks
                prompt, shared = self._rewritten(rng, before, shrinks=shrinks)
            else:
                prompt, shared = before + draw_tokens(rng, self.growth), before
        return builder.build()

    def _rewritten(
        self, rng: np.random.Generator, prompt: int, *, shrinks: bool
    ) -> tuple[int, int]:
        """Return the length of a rewritten prompt and how much of the old one it begins with."""
        limit = self.max_context_tokens
        new = prompt + draw_tokens(rng, self.growth)
        if shrinks or new > 0.9 * limit:
            new = int(min(prompt, limit) * rng.uniform(*fitted.REWRITE_KEEPS))
        new = max(new, 1)
        return new, int(min(prompt, new) * rng.beta(*fitted.REWRITE_SHARES))

    def _sub_agents(self, rng: np.random.Generator, builder: JobBuilder, parent: int) -> list[int]:
        """Add chains of calls that run at once; returns the last call of each."""
        weights = np.array(self.spawn_weights)
        ends = []
        for _ in range(1 + int(rng.choice(len(weights), p=weights / weights.sum()))):
            prompt = min(draw_tokens(rng, self.sub_first_prompt), self.max_context_tokens // 2)
            shared = 0
            previous, mean = parent, self.sub_output.mean_tokens
            for k in range(draw_tokens(rng, self.sub_calls)):
                output = draw_tokens(rng, self.sub_output)
                if k and prompt + output > self.max_context_tokens:
                    break  # a sub-agent hands in what it has
                output = min(output, self.max_context_tokens - prompt)
                waits = []
                if k:
                    tool_s = self.sub_tool.draw(rng)
                    waits = [self._wait(builder, SUB_TOOL, previous, tool_s, self.sub_tool.mean_s)]
                call = self._call(rng, builder, SUB_CALL, prompt, output, mean, previous)
                builder.edge(previous, call, shared_tokens=shared)
                for wait in waits:
                    builder.edge(wait, call)
                previous, shared = call, prompt
                prompt += draw_tokens(rng, self.growth)
            ends.append(previous)
        return ends

    def _call(
        self,
        rng: np.random.Generator,
        builder: JobBuilder,
        label: int,
        prompt_tokens: int,
        output_tokens: int,
        mean: float,
        previous: int | None,
    ) -> int:
        expected = self.expected_tokens(rng, output_tokens, mean)
        hidden = previous is not None
        return builder.llm(label, prompt_tokens, output_tokens, expected, hidden=hidden)

    @staticmethod
    def _wait(builder: JobBuilder, label: int, call: int, takes_s: float, mean_s: float) -> int:
        stage = builder.tool(label, takes_s, mean_s, hidden=True)
        builder.edge(call, stage)
        return stage
