"""What the token streams of a replica show whoever passes them on.

A router sees when the tokens of its streams come: how long they take from one to the next, and, if
all requests that are there decode, how long a step takes that does nothing else. What such a step
should have taken it works out from how many they are. Of a step in which a prompt may have been
computed, too, it knows only what that takes at most: such a step says something if it took longer.
All is counted here while steps end, in sums that whole stretches of decodes add to at once, if
somebody has asked for it; `policy.inferred` makes features of them.
"""

from __future__ import annotations

from servegym.cluster.entry import INFER
from servegym.cluster.jit import helper, inlined
from servegym.cluster.state import (
    DECODE,
    OBSERVED_DECODE_SEQ,
    OBSERVED_DECODE_STEP,
    OBSERVED_MAX_NUM_BATCHED_TOKENS,
    OBSERVED_PENDING_PREFILL,
    OBSERVED_PREFILL_RATE,
    Params,
    State,
)


@inlined
def longest_step_s(
    alone_s: float, seq_s: float, num_decodes: float, pending: float, budget: float, rate: float
) -> float:
    """Seconds that a step should take at most.

    Args:
        alone_s: Known time of a step that decodes one sequence, seconds.
        seq_s: Known time that each further one adds.
        num_decodes: Requests that decode.
        pending: Prompt tokens that are not known to be computed.
        budget: Tokens of a step.
        rate: Known prefill rate, tokens/s.
    """
    return alone_s + seq_s * (num_decodes - 1) + min(pending, budget) / rate


@inlined
def see_steps(p: Params, s: State, e: int, r: int, end_s: float, num_steps: int) -> None:
    """Count the time until `end_s` of steps in progress, which gave decoding requests a token.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica; its decoding requests are those that took part, or paused meanwhile.
        end_s: When the last of them ended, seconds.
        num_steps: How many; 0 for one in which they paused.
    """
    if p.entries[INFER] != 0 and s.replica[e, r].num_decodes > 0:
        _count(s, e, r, end_s - s.replica[e, r].stretch_begin_s, num_steps)


@helper
def _count(s: State, e: int, r: int, span_s: float, num_steps: int) -> None:
    v, w = s.replica[e, r], s.stream[e, r]
    w.seen_s += span_s
    w.seen_steps += num_steps
    if v.is_pure and v.mode == DECODE:
        w.pure_s += span_s
        w.pure_steps += num_steps
        w.pure_others += num_steps * (v.num_decodes - 1)
    elif num_steps > 0:
        most_s = num_steps * longest_step_s(
            s.observation[e, OBSERVED_DECODE_STEP, r],
            s.observation[e, OBSERVED_DECODE_SEQ, r],
            v.num_decodes,
            s.observation[e, OBSERVED_PENDING_PREFILL, r],
            s.observation[e, OBSERVED_MAX_NUM_BATCHED_TOKENS, r],
            s.observation[e, OBSERVED_PREFILL_RATE, r],
        )
        if span_s > most_s:
            w.late_s += span_s
            w.late_expected_s += most_s


@helper
def forget_all(s: State, e: int) -> None:
    """Begin anew; an environment that nobody has watched has nothing to forget."""
    for r in range(s.env[e].num_replicas):
        w = s.stream[e, r]
        w.seen_s = 0.0
        w.seen_steps = 0
        w.pure_s = 0.0
        w.pure_steps = 0
        w.pure_others = 0
        w.late_s = 0.0
        w.late_expected_s = 0.0
        w.itl_s = 0.0
        w.itl_steps = 0.0
        w.observed_s = 0.0
        w.expected_s = 0.0
    for i in range(s.env[e].num_requests):
        s.length[e, i].expected = 0.0


@inlined
def note_ended(p: Params, s: State, e: int, request: int) -> None:
    """Put a request at the end of those that have finished, in order."""
    if p.entries[INFER] == 0:
        return
    env = s.env[e]
    last = env.last_ended
    env.last_ended = request
    s.length[e, request].next_ended = -1
    if last >= 0:
        s.length[e, last].next_ended = request
    else:
        env.first_ended = request
