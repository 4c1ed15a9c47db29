"""Files of learned orders: `ordering.npz` or `ordering.onnx`, with a manifest beside it."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

import servegym
from servegym.errors import ExportError
from servegym.export.manifest import digest, digest_of, manifest_text
from servegym.policy.learned_ordering import MlpOrdering, OnnxOrdering, OrderingWeights
from servegym.policy.ordering import ORDERING_FEATURES, ORDERING_SCHEMA_VERSION
from servegym.policy.policy import Information
from servegym.typing import FloatArray
from servegym.whole_files import write_whole

ORDERING_NAMES = tuple(f.name for f in ORDERING_FEATURES)
SUFFIXES = (".npz", ".onnx")


class OrderingManifest(BaseModel):
    """Contents of `manifest.json` beside a learned order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ordering"] = "ordering"
    schema_version: int = ORDERING_SCHEMA_VERSION
    features: tuple[str, ...] = ORDERING_NAMES
    information: Information = "predictive"
    sha256: str
    servegym_version: str = ""
    training: dict[str, float | int | str] = {}
    #: 1st and 99th percentile of each feature in training.
    ranges: tuple[tuple[float, float], ...] = ()


def save_ordering(
    weights: OrderingWeights,
    folder: Path,
    samples: FloatArray,
    *,
    information: Information = "predictive",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `ordering.npz` and `manifest.json`.

    Args:
        weights: The network.
        folder: Where to.
        samples: Rows of features from training, `float64[n, NUM_ORDERING_FEATURES]`.
        information: What it may know.
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
    arrays = {f"{kind}{i}": a for i, pair in layers for kind, a in zip("wb", pair, strict=True)}
    np.savez(file, mean=weights.mean, scale=weights.scale, **arrays)  # type: ignore[arg-type]
    content = file.getvalue()
    manifest = _manifest_of(content, samples, information, training)
    write_whole({path: content, folder / "manifest.json": manifest})
    return path


def write_ordering_manifest(
    path: Path,
    samples: FloatArray,
    *,
    information: Information,
    training: dict[str, float | int | str] | None = None,
) -> None:
    """Write the manifest of a learned order; for a graph that was exported elsewhere, too."""
    manifest = _manifest_of(path.read_bytes(), samples, information, training)
    write_whole({path.parent / "manifest.json": manifest})


def _manifest_of(
    content: bytes,
    samples: FloatArray,
    information: Information,
    training: dict[str, float | int | str] | None,
) -> bytes:
    low, high = np.percentile(samples, (1, 99), axis=0)
    manifest = OrderingManifest(
        information=information,
        sha256=digest_of(content),
        servegym_version=servegym.__version__,
        training=training or {},
        ranges=tuple(zip(low.tolist(), high.tolist(), strict=True)),
    )
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def load_ordering(path: Path) -> MlpOrdering | OnnxOrdering:
    """Load a learned order after checking it against its manifest.

    Raises:
        ExportError: If a file is missing, was changed, speaks another schema or cannot be run.
    """
    manifest = _read_manifest(path)
    name = path.resolve().parent.name
    if path.suffix == ".onnx":
        return OnnxOrdering(path, information=manifest.information, name=name)
    return MlpOrdering(_read_weights(path), information=manifest.information, name=name)


def _read_manifest(path: Path) -> OrderingManifest:
    beside = path.parent / "manifest.json"
    if path.suffix not in SUFFIXES:
        raise ExportError(f"a learned order must be a file in .npz or .onnx, got {path}")
    if not path.is_file() or not beside.is_file():
        raise ExportError(f"{path} must exist with a manifest.json beside it")
    try:
        manifest = OrderingManifest.model_validate_json(manifest_text(beside))
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ExportError(f"{beside} is not the manifest of an order: {why}") from error
    if manifest.sha256 != digest(path):
        raise ExportError(f"{path} is not the file its manifest was written for: export again")
    wanted = (ORDERING_SCHEMA_VERSION, ORDERING_NAMES)
    if (manifest.schema_version, manifest.features) != wanted:
        raise ExportError(
            f"{path} speaks ordering schema {manifest.schema_version}, this version of servegym "
            f"{ORDERING_SCHEMA_VERSION}: train and export the order again"
        )
    return manifest


def _read_weights(path: Path) -> OrderingWeights:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float32) for name in file.files}
        num_layers = (len(arrays) - 2) // 2
        return OrderingWeights(
            mean=arrays["mean"],
            scale=arrays["scale"],
            weights=tuple(arrays[f"w{i}"] for i in range(num_layers)),
            biases=tuple(arrays[f"b{i}"] for i in range(num_layers)),
        )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"{path} cannot be read as an order: {error}") from error
