"""Files of what a search has found for fleets in which requests are placed: `placed.npz`."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from servegym.errors import ExportError
from servegym.export.manifest import Manifest, policy_name, write_policy
from servegym.policy.placed import Placed
from servegym.policy.placed_scores import NUM_TERMS, PlacedWeights, placed_policy


def save_placed(
    weights: PlacedWeights,
    folder: Path,
    *,
    scenario: str = "",
    objective: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `placed.npz` and `manifest.json`.

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
    np.savez(file, **weights._asdict())
    return write_policy(
        folder / "placed.npz",
        "placed",
        file.getvalue(),
        {},
        scenario=scenario,
        objective=objective,
        training=training or {},
    )


def exported_placed(path: Path, manifest: Manifest) -> Placed:
    """Return the policy of a verified manifest.

    Raises:
        ExportError: If the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            weights = PlacedWeights(**{name: np.asarray(file[name]) for name in file.files})
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"{path} cannot be read as weights of both decisions: {error}") from error
    shapes = [array.shape for array in weights]
    if shapes != [(NUM_TERMS + 1,), (NUM_TERMS,)] or not all(np.isfinite(w).all() for w in weights):
        raise ExportError(
            f"{path} must have {NUM_TERMS + 1} and {NUM_TERMS} finite weights, got {shapes}"
        )
    return placed_policy(weights, policy_name(path))
