"""Files of learned orders: `ordering.npz` or `ordering.onnx`, with a manifest beside it."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from servegym.errors import ExportError
from servegym.export.manifest import Manifest, policy_name, read_manifest, write_policy
from servegym.policy.learned_ordering import MlpOrdering, OnnxOrdering, OrderingWeights
from servegym.policy.policy import Information
from servegym.typing import Float32Array, FloatArray

SUFFIXES = (".npz", ".onnx")


def save_ordering(
    weights: OrderingWeights,
    folder: Path,
    samples: FloatArray,
    *,
    information: Information = "predictive",
    scenario: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `ordering.npz` and `manifest.json`.

    Args:
        weights: The network.
        folder: Where to.
        samples: Rows of features from training, `float64[n, NUM_ORDERING_FEATURES]`.
        information: What it may know.
        scenario: What it was trained on.
        training: Summary for the manifest.

    Returns:
        Path of the `.npz` file.

    Raises:
        ExportError: If the network's layers do not fit together.
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    weights.require_consistent()
    path, file = folder / "ordering.npz", io.BytesIO()
    layers = enumerate(zip(weights.weights, weights.biases, strict=True))
    arrays: dict[str, Float32Array | FloatArray] = {
        f"{kind}{i}": a for i, pair in layers for kind, a in zip("wb", pair, strict=True)
    }
    if weights.powers.any():
        arrays["powers"] = weights.powers
    np.savez(file, mean=weights.mean, scale=weights.scale, **arrays)  # type: ignore[arg-type]
    return write_policy(
        path,
        "order",
        file.getvalue(),
        {"requests": samples},
        information=information,
        scenario=scenario,
        training=training or {},
    )


def write_ordering_manifest(path: Path, samples: FloatArray, *, information: Information) -> None:
    """Write the manifest of a graph that was exported elsewhere."""
    write_policy(path, "order", path.read_bytes(), {"requests": samples}, information=information)


def load_ordering(path: Path) -> MlpOrdering | OnnxOrdering:
    """Load a learned order after checking it against its manifest.

    Raises:
        ExportError: If a file is missing, was changed, speaks another schema or cannot be run.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError(f"a learned order must be a file in .npz or .onnx, got {path}")
    return exported_ordering(path, read_manifest(path, "order"))


def exported_ordering(path: Path, manifest: Manifest) -> MlpOrdering | OnnxOrdering:
    """Return the order of a verified manifest.

    Raises:
        ExportError: If the file cannot be run.
    """
    name = policy_name(path)
    if path.suffix == ".onnx":
        return OnnxOrdering(path, information=manifest.information, name=name)
    return MlpOrdering(_read_weights(path), information=manifest.information, name=name)


def _read_weights(path: Path) -> OrderingWeights:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float32) for name in file.files}
            given = {"powers": np.asarray(file["powers"], np.float64)} if "powers" in file else {}
        num_layers = (len(arrays) - 2) // 2
        return OrderingWeights(
            mean=arrays["mean"],
            scale=arrays["scale"],
            weights=tuple(arrays[f"w{i}"] for i in range(num_layers)),
            biases=tuple(arrays[f"b{i}"] for i in range(num_layers)),
            **given,
        )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"{path} cannot be read as an order: {error}") from error
