"""Tuning a rule: the same settings, budget and training seeds for every rival of a learned one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from servegym.baselines.parts import join_parts
from servegym.baselines.rules import Rules
from servegym.errors import ConfigError, unknown_name
from servegym.problems.problem import P, Problem, S

#: What `NAME:tuned` stands for: settings tried, and training episodes per load for each.
BUDGET = 40
NUM_SEEDS = 4

#: End of the text of a rule that is tuned first.
TUNED = ":tuned"


class Tuned(NamedTuple):
    """The best setting.

    Attributes:
        text: The rule with its parameters.
        loss: Average of `Episodes.losses`.
    """

    text: str
    loss: float


def candidates(parts: Sequence[tuple[Rules[Any], str]], budget: int) -> list[str]:
    """Spread parameter settings of a policy evenly over their ranges, the defaults first.

    Args:
        parts: The rules it is put together of, as `Problem.parts` says, and the name of each; at
            least one has tunable parameters.
        budget: How many settings.

    Returns:
        Policies in text form.

    Raises:
        ConfigError: If there is no such rule, or none has anything to tune.
    """
    ranges = [rules.tunable().get(name, {}) for rules, name in parts]
    if not any(ranges):
        rules, name = parts[0]
        raise ConfigError(unknown_name(f"tunable {rules.kind}", name, rules.tunable()))
    for (rules, name), own in zip(parts, ranges, strict=True):
        if not own:
            rules.make(name)  # refuses an unknown one
    # Kronecker sequence: low discrepancy in any dimension without a library
    root = 2.0
    for _ in range(40):
        root = (1.0 + root) ** (1.0 / (sum(map(len, ranges)) + 1))
    texts = [join_parts(name for _, name in parts)]
    for i in range(1, budget):
        made, k = [], 0
        for (_, name), own in zip(parts, ranges, strict=True):
            values = []
            for key, (low, high, logarithmic) in own.items():
                k += 1
                u = (0.5 + i * root**-k) % 1.0
                if logarithmic:
                    value = math.exp(math.log(low) + u * math.log(high / low))
                else:
                    value = low + u * (high - low)
                values.append(f"{key}={value:.4g}")
            made.append(f"{name}:{','.join(values)}" if values else name)
        texts.append(join_parts(made))
    return texts


def tune(
    problem: Problem[S, P],
    scenario: S,
    name: str,
    loads: Sequence[float],
    *,
    budget: int = BUDGET,
    num_seeds: int = NUM_SEEDS,
    num_units: int | None = None,
    track: Callable[[list[str]], Iterable[str]] = lambda texts: texts,
) -> Tuned:
    """Try settings of a rule's parameters on training episodes and return the best.

    Args:
        problem: What is decided.
        scenario: What is played; its objective judges.
        name: The rule.
        loads: Load factors over which the objective is averaged.
        budget: How many settings are tried, the defaults first.
        num_seeds: Training episodes per load, seeds 0, 1, ...; held-out ones have other seeds.
        num_units: Requests or jobs per episode, else the scenario's own.
        track: Passes the settings on one by one, to show progress.

    Raises:
        ConfigError: If the rule has nothing to tune, or a number is too small.
    """
    for what, value in (("seeds", num_seeds), ("budget", budget)):
        if value < 1:
            raise ConfigError(f"{what} must be at least 1, got {value}")
    if not loads:
        raise ConfigError("there must be at least one load, got none")
    texts = candidates(problem.parts(name), budget)
    drawn = [
        problem.episodes(scenario, range(num_seeds), load=load, num_units=num_units)
        for load in loads
    ]
    best = Tuned("", math.inf)
    for text in track(texts):
        policy = problem.resolve(text)
        losses = [loss for episodes in drawn for loss in episodes.losses(policy).tolist()]
        loss = sum(losses) / len(losses)
        if loss < best.loss:
            best = Tuned(text, loss)
    return best


def resolve(
    problem: Problem[S, P],
    scenario: S,
    text: str,
    loads: Sequence[float],
    num_units: int | None = None,
) -> P:
    """Return a policy by its text; `NAME:tuned` is tuned on training episodes of the scenario.

    Args:
        problem: What is decided.
        scenario: What is played.
        text: As `Problem.resolve` takes it, or `NAME:tuned`.
        loads: Load factors that tuning averages over.
        num_units: Requests or jobs per episode, else the scenario's own.

    Raises:
        ConfigError: If there is no such rule or parameter, or it has nothing to tune.
        ExportError: If the file is not a valid policy.
    """
    if text.endswith(TUNED):
        text = tune(problem, scenario, text.removesuffix(TUNED), loads, num_units=num_units).text
    return problem.resolve(text)
