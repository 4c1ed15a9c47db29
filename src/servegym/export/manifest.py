"""What stands beside an exported policy."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servegym.errors import ExportError
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    SCHEMA_VERSION,
)
from servegym.policy.numpy_network import NetworkShape
from servegym.policy.policy import Information

REPLICA_NAMES = tuple(f.name for f in REPLICA_FEATURES[:NUM_OBSERVED_FEATURES])
REQUEST_NAMES = tuple(f.name for f in REQUEST_FEATURES)


class Manifest(BaseModel):
    """Contents of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    replica_features: tuple[str, ...] = REPLICA_NAMES
    request_features: tuple[str, ...] = REQUEST_NAMES
    num_extra_actions: int = Field(0, ge=0, le=2)
    information: Information = "predictive"
    scenario: str = ""
    sha256: str
    #: Of `weights.npz`; the network it is for. Absent for graphs of other families.
    weights_sha256: str = ""
    network: NetworkShape | None = None
    servegym_version: str = ""
    training: dict[str, float | int | str] = {}
    #: 1st and 99th percentile of each feature in training.
    replica_ranges: tuple[tuple[float, float], ...] = ()
    request_ranges: tuple[tuple[float, float], ...] = ()


def digest(path: Path) -> str:
    """Return a file's SHA-256.

    Raises:
        ExportError: If it cannot be read.
    """
    try:
        return digest_of(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def manifest_text(path: Path) -> str:
    """Read a manifest.

    Raises:
        ExportError: If it cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not a manifest: it is not text") from error


def read_manifest(onnx_path: Path) -> Manifest:
    """Read and check the manifest beside a policy file.

    Raises:
        ExportError: If one is missing, the file was changed, or the schema is another.
    """
    path = onnx_path.parent / "manifest.json"
    if not onnx_path.is_file() or not path.is_file():
        raise ExportError(f"{onnx_path} must exist with a manifest.json beside it")
    try:
        manifest = Manifest.model_validate_json(manifest_text(path))
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ExportError(f"{path} is not a policy manifest: {why}") from error
    if manifest.sha256 != digest(onnx_path):
        raise ExportError(f"{onnx_path} is not the file its manifest was written for: export again")
    wanted = (SCHEMA_VERSION, REPLICA_NAMES, REQUEST_NAMES)
    if (manifest.schema_version, manifest.replica_features, manifest.request_features) != wanted:
        raise ExportError(
            f"{onnx_path} speaks observation schema {manifest.schema_version}, this version of "
            f"servegym {SCHEMA_VERSION}: train and export the policy again"
        )
    return manifest
