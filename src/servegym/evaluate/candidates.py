"""Scores from outside: a file of candidates in, what each is worth on training episodes out.

Whoever proposes scores, a program or a person, needs nothing of this package but two files of JSON
lines. A candidate that is none costs one line with a sentence, not the others their results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.baselines.score import score_policy
from servegym.documents import load_json
from servegym.errors import ConfigError
from servegym.evaluate.compare import paired_difference, paired_ratio
from servegym.policy.expression import parse
from servegym.problems.problem import AnyProblem
from servegym.typing import FloatArray

_SCORE, _ID = "score", "id"
#: A file has no more lines.
MAX_CANDIDATES = 100_000


@dataclass(frozen=True)
class Proposed:
    """A line of a file of candidates.

    Attributes:
        name: What the proposer calls it, `None` if nothing.
        text: The score, empty if there is none.
        error: What is wrong with the line, empty if nothing is.
    """

    name: str | int | None
    text: str
    error: str = ""


def read_candidates(path: Path) -> list[Proposed]:
    """Read a file of candidates: lines of `{"score": "...", "id": ...}`, the id if wanted.

    Raises:
        ConfigError: If there is no such file, or it has no or too many lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be a text file of JSON lines: it is not UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name a file") from error
    lines = [line for line in lines if line.strip()]
    if not 0 < len(lines) <= MAX_CANDIDATES:
        raise ConfigError(
            f"{path} must have from 1 to {MAX_CANDIDATES:,} candidates, got {len(lines):,}: write"
            f' one on each line, as {{"{_SCORE}": "outstanding_requests"}}'
        )
    return [_proposed(line) for line in lines]


def _proposed(line: str) -> Proposed:
    wanted = f'a line must be {{"{_SCORE}": "..."}}, with an "{_ID}" if wanted'
    try:
        found = load_json(line)
    except ValueError as error:
        return Proposed(None, "", f"{wanted}, and this is no JSON: {error}")
    if not isinstance(found, dict):
        return Proposed(None, "", f"{wanted}, got {type(found).__name__}")
    name, text = found.get(_ID), found.get(_SCORE)
    if not (name is None or (isinstance(name, str | int) and not isinstance(name, bool))):
        return Proposed(None, "", f'{wanted}, and "{_ID}" is no text or whole number')
    others = sorted(set(found) - {_SCORE, _ID})
    if others:
        return Proposed(name, "", f"{wanted}, got {', '.join(others)}")
    if not isinstance(text, str):
        return Proposed(name, "", f'{wanted}, and "{_SCORE}" is no text')
    return Proposed(name, text)


def judge_candidates(
    problem: AnyProblem,
    scenario: Any,
    proposed: Sequence[Proposed],
    reference: Any,
    *,
    loads: Sequence[float],
    num_seeds: int,
    num_units: int | None = None,
    track: Callable[[Sequence[Proposed]], Iterable[Proposed]] = lambda proposed: proposed,
) -> list[dict[str, Any]]:
    """Play candidates on training episodes.

    Args:
        problem: Dispatch.
        scenario: What is played; its objective judges.
        proposed: The candidates.
        reference: Policy that they are compared with, on the same episodes.
        loads: Load factors.
        num_seeds: Training episodes per load, seeds 0, 1, ...; held-out ones have other seeds.
        num_units: Requests per episode, else the scenario's own.
        track: Passes the candidates on one by one, to show progress.

    Returns:
        A line for each: `id` (if given), `score`, and either `error`, or `parts` of the score, the
        mean `objective`, and its comparison with the reference, `compared` within `low` and
        `high` (95 %, `null` if there is one episode): a ratio, or a difference of shares.
    """
    objective = problem.objective(scenario)
    drawn = [
        problem.episodes(scenario, range(num_seeds), load=load, num_units=num_units)
        for load in loads
    ]
    compare = paired_difference if objective.is_share else paired_ratio

    def measured(policy: Any) -> FloatArray:
        return objective.sign * np.concatenate([episodes.losses(policy) for episodes in drawn])

    usual = measured(reference)
    lines = []
    for candidate in track(proposed):
        line: dict[str, Any] = {} if candidate.name is None else {_ID: candidate.name}
        line[_SCORE] = candidate.text
        lines.append(line)
        try:
            if candidate.error:
                raise ConfigError(candidate.error)
            expression = parse(candidate.text)
        except ConfigError as error:
            line["error"] = str(error)
            continue
        values = measured(score_policy(expression))
        found = compare(values, usual)
        line |= {
            "parts": expression.size,
            "objective": float(values.mean()),
            "compared": found.value,
            "low": found.low,
            "high": found.high,
        }
    return lines
