"""Files of what a search has found for a fleet in which two kinds of decisions are taken.

One `.npz` file holds both: `placed.npz` where requests are placed, `migrating.npz` where they
migrate, `kept.npz` where it is decided what becomes of the KV of ended turns.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from servegym.baselines.registry import policy
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import Manifest, policy_name, write_policy
from servegym.policy.migrating import Migrating
from servegym.policy.placed import Placed
from servegym.policy.retention import Kept
from servegym.policy.turn_scores import NUM_TURN_TERMS, TurnWeights, scored_turns
from servegym.typing import FloatArray

#: Problems whose policies these files are.
FLEET_PROBLEMS = ("placed", "migrating", "kept")


class FleetWeights(NamedTuple):
    """What a search has found.

    Attributes:
        problem: Of `FLEET_PROBLEMS`.
        arrays: Weights of scores, by what they are of, `float64[n]` each.
        dispatch: The rule that dispatches, as `baselines.registry.policy` takes it; empty where
            weights are of dispatches, too.
    """

    problem: str
    arrays: Mapping[str, FloatArray]
    dispatch: str = ""


def fleet_policy(weights: FleetWeights, name: str) -> Placed | Migrating | Kept:
    """Return the policy that takes both decisions by weights."""
    # compiled when they are imported: not for those who do without
    if weights.problem == "placed":
        from servegym.policy.placed_scores import PlacedWeights, placed_policy

        return placed_policy(PlacedWeights(**weights.arrays), name)
    if weights.problem == "kept":
        turns = scored_turns(TurnWeights(**weights.arrays), f"{name}, turns")
        return Kept(policy(weights.dispatch), turns, name)
    from servegym.policy.move_scores import MoveWeights, scored_moves

    rule = scored_moves(MoveWeights(**weights.arrays), f"{name}, moves")
    return Migrating(policy(weights.dispatch), rule, name)


def _sizes(problem: str) -> dict[str, int]:
    """How many weights there must be, by what they are of."""
    if problem == "placed":
        from servegym.policy.placed_scores import NUM_TERMS

        return {"dispatch": NUM_TERMS + 1, "place": NUM_TERMS}
    if problem == "kept":
        return dict.fromkeys(TurnWeights._fields, NUM_TURN_TERMS)
    from servegym.policy.move_scores import NUM_MOVE_WEIGHTS, MoveWeights

    flat = MoveWeights.of(np.zeros(NUM_MOVE_WEIGHTS))
    return {name: len(array) for name, array in flat._asdict().items()}


def save_fleet(
    weights: FleetWeights,
    folder: Path,
    *,
    scenario: str = "",
    objective: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `PROBLEM.npz` and `manifest.json`.

    Args:
        weights: Of both decisions.
        folder: Where to.
        scenario: What it was trained on.
        objective: Of that.
        training: Summary for the manifest.

    Returns:
        Path of the `.npz` file.

    Raises:
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    file = io.BytesIO()
    rule = {"rule": np.array(weights.dispatch)} if weights.dispatch else {}
    np.savez(file, allow_pickle=False, **weights.arrays, **rule)
    return write_policy(
        folder / f"{weights.problem}.npz",
        weights.problem,
        file.getvalue(),
        {},
        scenario=scenario,
        objective=objective,
        training=training or {},
    )


def exported_fleet(path: Path, manifest: Manifest) -> Placed | Migrating | Kept:
    """Return the policy of a verified manifest.

    Raises:
        ExportError: If the file cannot be read, or does not hold what it should.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"{path} cannot be read as weights of both decisions: {error}") from error
    rule = str(arrays.pop("rule", ""))
    wanted = _sizes(manifest.problem)
    known = {name: array.shape for name, array in arrays.items()}
    if known != {name: (size,) for name, size in wanted.items()} or not all(
        array.dtype == np.float64 and np.isfinite(array).all() for array in arrays.values()
    ):
        must = ", ".join(f"{size} of {name}" for name, size in wanted.items())
        raise ExportError(f"{path} must have finite weights, {must}; got {known}")
    try:
        return fleet_policy(FleetWeights(manifest.problem, arrays, rule), policy_name(path))
    except ConfigError as error:
        raise ExportError(f"{path} must name a rule that dispatches, got {rule!r}") from error
