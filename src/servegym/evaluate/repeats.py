"""Seeds and loads that play the same episode again: they are no repeats, and give no interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from servegym.problems.problem import P, Problem, S


class Plan(NamedTuple):
    """What is played of the seeds and loads asked for.

    Attributes:
        seeds: Those whose episodes differ.
        loads: Likewise.
        notes: What was left out and why, in sentences.
    """

    seeds: list[int]
    loads: list[float]
    notes: list[str]


def plan(
    problem: Problem[S, P],
    scenario: S,
    seeds: Sequence[int],
    loads: Sequence[float],
    num_units: int | None = None,
) -> Plan:
    """Leave out the seeds and loads that play an episode again.

    Args:
        problem: Draws episodes and names them.
        scenario: What is played.
        seeds: As asked for.
        loads: As asked for; where they make no difference, load 1 stays if it is among them.
        num_units: Requests or jobs per episode, else the scenario's own.
    """

    def key(seed: int, load: float) -> bytes:
        return problem.key(scenario, seed, load, num_units)

    notes = []
    at = 1.0 if 1.0 in loads else loads[0]
    by_seed = [key(seed, at) for seed in seeds]
    kept = [seed for i, seed in enumerate(seeds) if by_seed[i] not in by_seed[:i]]
    if len(kept) < len(seeds):
        each = "it is played once, and there is no interval"
        if len(kept) > 1:
            each = "each is played once"
        what = "one episode" if len(kept) == 1 else f"{len(kept)} different episodes"
        notes.append(f"the {len(seeds)} seeds make {what}: {each}")
    played = list(loads)
    if len(loads) > 1 and all(key(seeds[0], load) == by_seed[0] for load in loads):
        played = [at]
        notes.append(
            f"the {len(loads)} loads make the same episodes, as none changes an arrival:"
            f" load {at:g} stands for them"
        )
    notes += problem.notes(scenario, kept, played, num_units)
    return Plan(kept, played, notes)
