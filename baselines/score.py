"""Policies that are one closed-form score: the replica with the lowest is chosen.

An expression becomes a program of a stack machine, and the program the parameters of one compiled
rule, so that no expression is ever compiled by itself: a search plays thousands of them. A word of
the program works on all replicas at once. Arithmetic is that of floating point, without
exceptions; a score that is no number, such as 0 / 0, counts as the worst.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.cluster.jit import helper
from servegym.policy.contract import (
    FIRST_NOMINAL,
    NUM_NOMINAL,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
)
from servegym.policy.expression import (
    NUMBER,
    REPLICA_FIELDS,
    REQUEST_FIELDS,
    Expression,
    check_limits,
    parse,
)
from servegym.policy.policy import Heuristic, Information
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: Words of a program by what they do; a word's second number is a value, or a feature's row.
_WORDS = {
    name: word
    for word, name in enumerate(
        f"{NUMBER} replica request + - * / < <= > >= negative abs sqrt log exp lowest highest mean"
        " min max pow where".split()
    )
}
_NUMBER, _REPLICA, _REQUEST, _ADD, _SUBTRACT, _MULTIPLY, _DIVIDE = range(7)
_BELOW, _AT_MOST, _ABOVE, _AT_LEAST = range(7, 11)
_NEGATIVE, _ABS, _SQRT, _LOG, _EXP, _LOWEST, _HIGHEST, _MEAN = range(11, 19)
_MIN, _MAX, _POW, _WHERE = range(19, 23)

#: What a router is told of lengths, not measures.
_PREDICTED = {"predicted_output_tokens", "outstanding_predicted_tokens"}


@helper
def _unary(word: int, x: FloatArray, allowed: BoolArray) -> None:
    """Apply a function of one argument in place, `x: float64[R]`."""
    if word >= _LOWEST:
        found, seen = 0.0, 0
        for r in range(x.shape[0]):
            if allowed[r]:
                if word == _MEAN:
                    found += x[r]
                elif seen == 0 or (x[r] < found) == (word == _LOWEST):
                    found = x[r]
                seen += 1
        if word == _MEAN:
            found = np.divide(found, seen)
        for r in range(x.shape[0]):
            x[r] = found
        return
    for r in range(x.shape[0]):
        if word == _NEGATIVE:
            x[r] = -x[r]
        elif word == _ABS:
            x[r] = abs(x[r])
        elif word == _SQRT:
            x[r] = np.sqrt(x[r])
        elif word == _LOG:
            x[r] = np.log(x[r])
        else:
            x[r] = np.exp(x[r])


@helper
def _binary(word: int, x: FloatArray, y: FloatArray) -> None:
    """Put the result of an operator or function of two arguments in place of the first."""
    for r in range(x.shape[0]):
        if word == _ADD:
            x[r] = x[r] + y[r]
        elif word == _SUBTRACT:
            x[r] = x[r] - y[r]
        elif word == _MULTIPLY:
            x[r] = x[r] * y[r]
        elif word == _DIVIDE:
            x[r] = np.divide(x[r], y[r])
        elif word == _BELOW:
            x[r] = 1.0 if x[r] < y[r] else 0.0
        elif word == _AT_MOST:
            x[r] = 1.0 if x[r] <= y[r] else 0.0
        elif word == _ABOVE:
            x[r] = 1.0 if x[r] > y[r] else 0.0
        elif word == _AT_LEAST:
            x[r] = 1.0 if x[r] >= y[r] else 0.0
        elif word == _MIN:
            x[r] = y[r] if y[r] < x[r] else x[r]
        elif word == _MAX:
            x[r] = y[r] if y[r] > x[r] else x[r]
        else:
            x[r] = np.power(x[r], y[r])


@helper
def _evaluate(
    program: FloatArray,
    replicas: FloatArray,
    request: FloatArray,
    allowed: BoolArray,
    stack: FloatArray,
) -> None:
    """Work a program out for all replicas; the result is `stack[0]`.

    Args:
        program: Depth of the stack that it needs, then its words, `float64[1 + 2 n]`.
        replicas: Features, `float64[F, R]`.
        request: Features, `float64[G]`.
        allowed: Which replicas may be chosen, `bool[>= R]`.
        stack: Scratch, `float64[depth, R]`.
    """
    top = -1
    for at in range(1, program.shape[0], 2):
        word, value = int(program[at]), program[at + 1]
        if word <= _REQUEST:
            top += 1
            if word == _REQUEST:
                value = request[int(value)]
            for r in range(stack.shape[1]):
                stack[top, r] = replicas[int(value), r] if word == _REPLICA else value
        elif _NEGATIVE <= word <= _MEAN:
            _unary(word, stack[top], allowed)
        elif word == _WHERE:
            top -= 2
            for r in range(stack.shape[1]):
                stack[top, r] = stack[top + 1, r] if stack[top, r] > 0.0 else stack[top + 2, r]
        else:
            top -= 1
            _binary(word, stack[top], stack[top + 1])


@rule
def decide(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `policy.rule`."""
    # not `memory`: policies that keep some are taken to remember replicas by their places
    stack = np.empty((int(params[0]), num_replicas(mask)))
    _evaluate(params, replicas, request, mask, stack)
    best, least = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            score = math.inf if math.isnan(stack[0, r]) else stack[0, r]
            if better(score, r, least, best):
                best, least = r, score
    return best if best >= 0 else no_replica(mask)


def program_of(expression: Expression) -> FloatArray:
    """Return an expression as a program, see `_evaluate`."""
    words: list[float] = []
    deepest = height = 0

    def add(part: Expression) -> None:
        nonlocal deepest, height
        for inner in part.parts:
            add(inner)
        name, value = part.name, part.value
        if name in REPLICA_FIELDS:
            name, value = "replica", float(REPLICA_FIELDS[name])
        elif name in REQUEST_FIELDS:
            name, value = "request", float(REQUEST_FIELDS[name])
        words.extend((float(_WORDS[name]), value))
        height += 1 - len(part.parts)
        deepest = max(deepest, height)

    add(expression)
    return np.array([deepest, *words])


@dataclass
class Score(Heuristic):
    """A policy that is a closed-form score; `Heuristic` says what it has besides.

    Attributes:
        expression: The score.
    """

    expression: Expression = field(default_factory=lambda: Expression(NUMBER))


def score_policy(expression: Expression | str, name: str = "score") -> Score:
    """Return the policy that chooses the replica with the lowest score.

    Args:
        expression: The score, or its text.
        name: Name in tables.

    Raises:
        ConfigError: If the text is no score, or the score is too large.
    """
    if isinstance(expression, str):
        expression = parse(expression)
    check_limits(expression)
    fields = expression.fields()
    needs = Group.COUNTERS
    for known, rows in ((REPLICA_FIELDS, REPLICA_FEATURES), (REQUEST_FIELDS, REQUEST_FEATURES)):
        for name_read in fields & known.keys():
            needs |= rows[known[name_read]].group
    return Score(
        name=name,
        information=_information(fields, needs),
        needs=needs,
        decide=decide,
        params=program_of(expression),
        learned=True,
        expression=expression,
    )


def _information(fields: set[str], needs: Group) -> Information:
    if fields & _PREDICTED or needs & (Group.LENGTHS | Group.LIMITS):
        return "predictive"
    nominal = range(FIRST_NOMINAL, FIRST_NOMINAL + NUM_NOMINAL)
    known = {REPLICA_FEATURES[row].name for row in nominal}
    return "metric" if needs != Group.COUNTERS or fields & known else "blind"


#: Rules as scores: where a search begins, and what outside proposers may look at.
RULES_AS_SCORES: dict[str, str] = {
    "least-outstanding": "outstanding_requests",
    "speed-family": "(outstanding_requests + 1) / relative_speed",
    "token-least-load": "pending_prefill_tokens + outstanding_requests",
    "min-kv": "kv_cache_usage + 1e-06 * outstanding_requests",
    "least-tpot": "decode_step_s + decode_seq_s * outstanding_requests",
    "prefix-load": (
        "(pending_prefill_tokens + max(0, prompt_tokens - prefix_hit_tokens)) /"
        " prefill_tokens_per_s + 0.05 * (outstanding_requests + 1) / relative_speed"
    ),
    "least-work-left": (
        "pending_prefill_tokens / prefill_tokens_per_s +"
        " max(0, outstanding_predicted_tokens - generated_tokens) * (decode_step_s + decode_seq_s *"
        " (min(max(1, outstanding_requests), max_num_seqs) - 1))"
    ),
    "mct": (
        "(pending_prefill_tokens + max(0, prompt_tokens - prefix_hit_tokens)) /"
        " prefill_tokens_per_s + max(0, outstanding_requests + 1 - max_num_seqs) /"
        " min(outstanding_requests + 1, max_num_seqs) *"
        " max(0, outstanding_predicted_tokens - generated_tokens) /"
        " min(outstanding_requests + 1, max_num_seqs) * (decode_step_s + decode_seq_s *"
        " (min(outstanding_requests + 1, max_num_seqs) - 1)) + predicted_output_tokens *"
        " (decode_step_s + decode_seq_s * (min(outstanding_requests + 1, max_num_seqs) - 1))"
    ),
    "added-delay": (
        "pending_prefill_tokens / prefill_tokens_per_s +"
        " max(0, prompt_tokens - prefix_hit_tokens) / prefill_tokens_per_s +"
        " predicted_output_tokens * (decode_step_s + decode_seq_s * outstanding_requests) +"
        " outstanding_requests * (1 * (max(0, prompt_tokens - prefix_hit_tokens) /"
        " prefill_tokens_per_s) + 1 * decode_seq_s * predicted_output_tokens)"
    ),
    "added-delay-inferred": (
        "(pending_prefill_tokens / prefill_tokens_per_s +"
        " max(0, prompt_tokens - prefix_hit_tokens) / prefill_tokens_per_s +"
        " expected_tokens * (decode_step_s + decode_seq_s * outstanding_requests) +"
        " outstanding_requests * (1 * (max(0, prompt_tokens - prefix_hit_tokens) /"
        " prefill_tokens_per_s) + 1 * decode_seq_s * expected_tokens)) * step_time_ratio"
    ),
}
