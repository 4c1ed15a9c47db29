"""What stands beside an exported policy, of whatever problem: `manifest.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import servegym
from servegym.errors import ExportError
from servegym.policy.contract import REPLICA_FEATURES, REQUEST_FEATURES, SCHEMA_VERSION, observed
from servegym.policy.numpy_network import NetworkShape
from servegym.policy.ordering import ORDERING_FEATURES, ORDERING_SCHEMA_VERSION
from servegym.policy.policy import Information
from servegym.policy.turn_scores import TURN_SCHEMA_VERSION, TURN_TERMS
from servegym.whole_files import write_whole

NAME = "manifest.json"
#: Weights of our own networks, beside their graph.
WEIGHTS = "weights.npz"
#: `kind` of manifests that had no `problem`; those of dispatchers had neither.
_OLDER_KINDS = {"ordering": "order", "workflow": "workflow"}
#: What problems' schemas are called in sentences.
_SCHEMAS = {
    "dispatch": "observation",
    "kept": "retaining",
    "migrating": "moving",
    "order": "ordering",
    "placed": "placing",
    "workflow": "job",
}
#: Their names of groups of features, and today's.
_OLDER_GROUPS = {"replica": "replicas", "request": "request", "pair": "pairs", "stage": "stages"}
Ranges = tuple[tuple[float, float], ...]


class Contract(NamedTuple):
    """What a policy sees at a decision.

    Attributes:
        schema_version: Raised whenever a feature changes.
        features: Names of the columns of each table of the observation, by table.
    """

    schema_version: int
    features: dict[str, tuple[str, ...]]


def contract_of(problem: str, *, extended: bool = False) -> Contract:
    """Return a problem's contract.

    Args:
        problem: Its name.
        extended: Of a dispatcher: whether it sees what is inferred, too.

    Raises:
        ExportError: If no policy of such a problem can be exported.
    """
    if problem == "dispatch":
        shape = observed(extended=extended)
        replicas = tuple(f.name for f in REPLICA_FEATURES[: shape.replicas])
        request = tuple(f.name for f in REQUEST_FEATURES[: shape.request])
        return Contract(SCHEMA_VERSION, {"replicas": replicas, "request": request})
    if problem == "order":
        names = tuple(f.name for f in ORDERING_FEATURES)
        return Contract(ORDERING_SCHEMA_VERSION, {"requests": names})
    if problem == "placed":
        # compiled when it is imported: not for those who place nothing
        from servegym.policy import placed_scores

        return Contract(placed_scores.PLACED_SCHEMA_VERSION, {"choice": placed_scores.TERMS})
    if problem == "kept":
        return Contract(TURN_SCHEMA_VERSION, {"turn": TURN_TERMS})
    if problem == "migrating":
        from servegym.policy import move_scores as moves

        terms = {"replica": moves.REPLICA_TERMS, "moved": moves.REQUEST_TERMS}
        return Contract(moves.MOVE_SCHEMA_VERSION, terms)
    if problem == "workflow":
        # compiled when it is imported: not for those who only dispatch
        from servegym.agents import workflow_features

        pairs, stages = workflow_features.PAIR_FEATURES, workflow_features.STAGE_FEATURES
        return Contract(workflow_features.SCHEMA_VERSION, {"pairs": pairs, "stages": stages})
    raise ExportError(f"there are no exported policies of problem {problem}")


class LinearShape(BaseModel):
    """What the scores of a scheduler of jobs are besides its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    eta: float = Field(ge=0)
    #: Mean duration of a stage in training: the unit of all times.
    tau_s: float = Field(gt=0)


class Manifest(BaseModel):
    """Contents of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problem: str = "dispatch"
    schema_version: int = SCHEMA_VERSION
    #: Names of what the policy sees, in order, of each group.
    features: dict[str, tuple[str, ...]] = {}
    #: 1st and 99th percentile of each of them in training.
    ranges: dict[str, Ranges] = {}
    #: Of a dispatcher: hold, reject.
    num_extra_actions: int = Field(0, ge=0, le=2)
    information: Information = "predictive"
    scenario: str = ""
    objective: str = ""
    #: Of the policy's file.
    sha256: str
    #: Of `weights.npz`; the network it is for. Absent for orders and graphs of other families.
    weights_sha256: str = ""
    network: NetworkShape | LinearShape | None = None
    servegym_version: str = ""
    training: dict[str, float | int | str] = {}

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, data: Any) -> Any:
        """Take what manifests had before they named their problem."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("kind") in _OLDER_KINDS and "problem" not in data:
            data["problem"] = _OLDER_KINDS[data.pop("kind")]
        if data.get("problem") == "workflow":
            data.setdefault("schema_version", 1)
            parts = {key: data.pop(key) for key in ("base", "eta", "tau_s") if key in data}
            if parts:
                data["network"] = parts
        for key in ("features", "ranges"):
            groups = data.get(key, {})
            groups = {"requests": groups} if isinstance(groups, list | tuple) else dict(groups)
            for older, group in _OLDER_GROUPS.items():
                if f"{older}_{key}" in data:
                    groups[group] = data.pop(f"{older}_{key}")
            data[key] = groups
        return data

    @property
    def extended(self) -> bool:
        """Whether a dispatcher sees what is inferred, too."""
        return (
            self.features.get("replicas")
            == contract_of("dispatch", extended=True).features["replicas"]
        )

    def require_contract(self, path: Path) -> None:
        """Check that the policy sees what this version of servegym shows it.

        Raises:
            ExportError: If it does not.
        """
        if self.problem == "dispatch":
            wanted = contract_of(self.problem, extended=self.extended)
            # the rows of older schemas are still there, and first
            first = 2 if self.extended else 1
            known = range(first, wanted.schema_version + 1)
        else:
            wanted = contract_of(self.problem)
            known = range(wanted.schema_version, wanted.schema_version + 1)
        if self.schema_version not in known or self.features != wanted.features:
            schema = f"{_SCHEMAS[self.problem]} schema {self.schema_version}"
            raise ExportError(
                f"{path} speaks {schema}, this version of servegym {wanted.schema_version}: train"
                " and export the policy again"
            )


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


def ranges_of(samples: Mapping[str, np.ndarray]) -> dict[str, Ranges]:
    """Return the 1st and 99th percentile of each feature, of rows of each group."""
    return {group: _ranges(rows) for group, rows in samples.items()}


def _ranges(rows: np.ndarray) -> Ranges:
    low, high = np.quantile(rows, (0.01, 0.99), axis=0)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


def write_policy(
    path: Path,
    problem: str,
    content: bytes,
    samples: Mapping[str, np.ndarray],
    *,
    weights: bytes = b"",
    extended: bool = False,
    **described: Any,
) -> Path:
    """Write a policy with its manifest and weights, all of them or none.

    Args:
        path: The policy's file.
        problem: Its problem.
        content: What is in it.
        samples: Rows of features from training, of the groups whose ranges are to be stated.
        weights: Contents of `weights.npz`; empty for none.
        extended: Whether a dispatcher sees what is inferred, too.
        described: Other fields of `Manifest`.

    Returns:
        The path.

    Raises:
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    contract = contract_of(problem, extended=extended)
    manifest = Manifest(
        problem=problem,
        schema_version=contract.schema_version,
        features=contract.features,
        ranges=ranges_of(samples),
        sha256=digest_of(content),
        weights_sha256=digest_of(weights) if weights else "",
        servegym_version=servegym.__version__,
        **described,
    )
    files = {path: content}
    if weights:
        files[path.parent / WEIGHTS] = weights
    text = manifest.model_dump_json(indent=2) + "\n"
    write_whole({**files, path.parent / NAME: text.encode()})
    return path


def read_manifest(path: Path, problem: str = "") -> Manifest:
    """Read and check the manifest beside a policy's file.

    Args:
        path: The policy's file.
        problem: What the policy must be for; anything if it is empty.

    Raises:
        ExportError: If one is missing, the file was changed, the policy is one of another problem
            or the schema is another.
    """
    beside = path.parent / NAME
    if not path.is_file() or not beside.is_file():
        raise ExportError(f"{path} must exist with a {NAME} beside it")
    try:
        manifest = Manifest.model_validate_json(_text(beside))
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ExportError(f"{beside} is not a policy manifest: {why}") from error
    if problem and manifest.problem != problem:
        raise ExportError(
            f"{path} is a policy of problem {manifest.problem}, and this is problem {problem}:"
            " choose another policy or scenario"
        )
    if manifest.sha256 != digest(path):
        raise ExportError(f"{path} is not the file its manifest was written for: export again")
    manifest.require_contract(path)
    return manifest


def policy_name(path: Path) -> str:
    """Return what a policy's file is called in tables: its folder, or its run's."""
    # training writes <run>/policy/policy.onnx: the run's name says more than "policy"
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "policy" else folder.name


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not a manifest: it is not text") from error
