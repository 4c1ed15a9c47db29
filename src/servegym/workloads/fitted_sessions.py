"""What sessions of a coding agent are made of, fitted to recorded ones.

355 sessions with 20,598 calls (WEKA traces, callanjfox/kv-cache-tester at 94f6046d, first half of
the sessions, duplicates left out). `scripts/fit-sessions` makes the numbers and their errors, which
are in docs/workflow-workloads.md and docs/workloads.md.
"""

from __future__ import annotations

from pydantic import Field

from servegym.workloads.mixtures import LengthConfig, Seconds, WorkloadPart

#: What a prompt has more than the one before, the answer to that one included.
GROWTH = LengthConfig(
    medians_tokens=(441.0, 1656.0),
    sigmas=(0.643, 1.063),
    weights=(0.443, 0.557),
    max_tokens=200000,
)
#: What a prompt has more than the one before and its answer: a tool's output, or what a user says.
ADDED = LengthConfig(
    medians_tokens=(66.8, 409.0, 1639.0),
    sigmas=(1.441, 0.749, 1.176),
    weights=(0.294, 0.272, 0.434),
    max_tokens=200000,
)
#: Range of what a rewritten prompt that shrinks keeps of its length: 0.14 to 1 in the trace.
REWRITE_KEEPS = (0.15, 0.9)
#: Beta distribution of how much of the shorter one a rewritten prompt and the one before begin
#: alike: a mean of 0.24, a deviation of 0.17 in the trace.
REWRITE_SHARES = (1.26, 4.06)


class AgentSession(WorkloadPart):
    """The main agent of a session, whether it is played as requests or as a job.

    Attributes:
        calls: Of a session; a number, not tokens.
        first_prompt: With which a session starts: fresh ones, and ones that were taken up again.
        output: Length of answers.
        tool: Time between an answer that asks for a tool and the next call.
        pause: Time between an answer that ends a turn and the next call.
        pause_probability: That an answer does.
        rewrite_probability: That a prompt is rewritten.
        rewrite_shrinks: That a rewritten prompt is shorter than the one before.
        max_pause_s: Longer pauses are cut to it: who comes back next day is no load until then. A
            choice, not fitted.
    """

    calls: LengthConfig = LengthConfig(
        medians_tokens=(5.32, 40.5),
        sigmas=(0.343, 0.965),
        weights=(0.141, 0.859),
        max_tokens=500,
    )
    first_prompt: LengthConfig = LengthConfig(
        medians_tokens=(17100.0, 100400.0),
        sigmas=(0.196, 0.903),
        weights=(0.321, 0.679),
        min_tokens=1000,
        max_tokens=1000000,
    )
    output: LengthConfig = LengthConfig(
        medians_tokens=(142.0, 258.0, 687.0),
        sigmas=(0.248, 0.616, 0.935),
        weights=(0.190, 0.599, 0.211),
        max_tokens=32000,
    )
    tool: Seconds = Seconds(
        medians_s=(6.11, 12.3, 47.6),
        sigmas=(0.326, 0.535, 1.511),
        weights=(0.344, 0.376, 0.281),
        max_s=10800.0,
    )
    pause: Seconds = Seconds(
        medians_s=(82.3, 1662.0), sigmas=(1.143, 0.994), weights=(0.795, 0.205)
    )
    pause_probability: float = Field(0.193, ge=0, le=1)
    rewrite_probability: float = Field(0.023, ge=0, le=1)
    rewrite_shrinks: float = Field(0.42, ge=0, le=1)
    max_pause_s: float = Field(3600.0, ge=0)
