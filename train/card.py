"""What a trained dispatcher is, for people: `card.md` beside the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

import servegym
from servegym.train.mix import Part
from servegym.typing import FloatArray

NAME = "card.md"
#: What validation measures under an objective.
_SAID = {"latency": "mean E2E latency", "tail": "p99 TTFT", "goodput": "share within limits"}


def card(
    *,
    name: str,
    learner: str,
    settings: Mapping[str, Any],
    parts: Sequence[Part],
    first_scores: FloatArray,
    best_scores: FloatArray,
    updates: int,
    minutes: float,
) -> str:
    """Describe a run.

    Args:
        name: Of what is trained on.
        learner: What trained.
        settings: That differ from the learner's own.
        parts: Scenarios that are trained on.
        first_scores: Of the rule that it begins as, on the validation episodes of one part after
            the other, as many of each; see `Validation.play`.
        best_scores: Of what was found, on the same.
        updates: Made.
        minutes: Wall-clock minutes after compilation.
    """
    in_time = parts[0].scenario.objective == "goodput"
    said = _SAID[parts[0].scenario.objective]
    given = ", ".join(f"{key} {value}" for key, value in sorted(settings.items()))
    lines = [
        f"# {name}",
        "",
        f"A dispatcher trained by `--learner {learner}` with servegym {servegym.__version__}:"
        f" {updates} updates in {minutes:.1f} minutes.",
        "",
        f"Settings that are not the learner's own: {given or 'none'}.",
        "",
        f"Validation episodes, which are neither trained nor judged on: {said}, "
        + ("more than" if in_time else "over that of")
        + " the rule it begins as.",
        "",
        "| scenario | replicas | load | " + ("more |" if in_time else "ratio |"),
        "|---|---|---|---:|",
    ]
    each = zip(
        parts,
        np.split(first_scores, len(parts)),
        np.split(best_scores, len(parts)),
        strict=True,
    )
    for part, first, best in each:
        change = float((best - first).mean())
        fleet = ", ".join(f"{_count(e.count)} {e.gpu}" for e in part.scenario.fleet)
        shown = f"{-change:+.4f}" if in_time else f"{np.exp(change):.4f}"
        loads = f"{part.load[0]:g} to {part.load[1]:g}"
        lines.append(f"| {part.scenario.name} | {fleet} | {loads} | {shown} |")
    return "\n".join(lines) + "\n"


def changed(config: Any) -> dict[str, Any]:
    """Return the settings of a trainer that are not its own, those of its network among them."""
    usual = type(config)()
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, BaseModel):
            own = getattr(usual, field.name)
            found |= {k: v for k, v in value if v != getattr(own, k)}
        elif value != getattr(usual, field.name):
            found[field.name] = value
    return found


def _count(count: int | tuple[int, int]) -> str:
    return str(count) if isinstance(count, int) else f"{count[0]} to {count[1]}"
