"""Exporting a scheduler of jobs: ONNX for others, weights for the compiled rule, a manifest."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import servegym
from servegym.agents.workflow_features import PAIR_FEATURES, STAGE_FEATURES
from servegym.agents.workflow_policy import LearnedRule, WorkflowWeights, learned_rule
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import digest, digest_of, manifest_text
from servegym.typing import Float32Array, IntArray
from servegym.whole_files import write_whole
from servegym.workflow.online.policy import Information

if TYPE_CHECKING:
    from servegym.agents.workflow_network import WorkflowNetwork

OPSET = 17
WEIGHTS = "weights.npz"
#: Inputs of the graph, in order.
INPUTS = ("features", "base", "stage", "job", "stages", "children", "members")


class WorkflowManifest(BaseModel):
    """Contents of `manifest.json` beside a scheduler of jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["workflow"] = "workflow"
    pair_features: tuple[str, ...] = PAIR_FEATURES
    stage_features: tuple[str, ...] = STAGE_FEATURES
    base: str
    eta: float = Field(ge=0)
    #: Mean duration of a stage in training: the unit of all times.
    tau_s: float = Field(gt=0)
    information: Information = "predictive"
    scenario: str = ""
    objective: str = ""
    sha256: str
    weights_sha256: str
    servegym_version: str = ""
    training: dict[str, float | int | str] = {}
    #: 1st and 99th percentile of each pair feature in training.
    pair_ranges: tuple[tuple[float, float], ...] = ()


class DecisionSample(NamedTuple):
    """What one decision was made from, as the exported graph takes it; axes as in `INPUTS`."""

    features: Float32Array  # [P, NUM_PAIR_FEATURES]
    base: Float32Array  # [P]
    stage: IntArray  # [P]
    job: IntArray  # [P]
    stages: Float32Array  # [S, NUM_STAGE_FEATURES]
    children: Float32Array  # [S, S]
    members: Float32Array  # [J, S]


def export_scheduler(
    network: WorkflowNetwork,
    folder: Path,
    samples: Sequence[DecisionSample],
    *,
    scenario: str = "",
    objective: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `policy.onnx`, `weights.npz` and `manifest.json`.

    Args:
        network: What to export.
        folder: Where to.
        samples: Decisions from training, to check the file with.
        scenario: What it was trained on.
        objective: What for.
        training: Summary for the manifest.

    Returns:
        Path of the ONNX file.

    Raises:
        ExportError: If the exported file does not answer as the network does.
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    import torch

    network = network.cpu().eval()
    path, graph, arrays = folder / "policy.onnx", io.BytesIO(), io.BytesIO()
    torch.onnx.export(
        network,
        tuple(torch.from_numpy(a) for a in samples[0]),
        graph,  # type: ignore[arg-type]  # this exporter takes files, too
        input_names=list(INPUTS),
        output_names=["scores"],
        dynamic_axes={
            "features": {0: "P"},
            "base": {0: "P"},
            "stage": {0: "P"},
            "job": {0: "P"},
            "stages": {0: "S"},
            "children": {0: "S", 1: "S"},
            "members": {0: "J", 1: "S"},
            "scores": {0: "P"},
        },
        opset_version=OPSET,
        dynamo=False,
    )
    _check(network, graph.getvalue(), samples)
    weights = network.weights()
    np.savez(arrays, **_arrays(weights))  # type: ignore[arg-type]
    seen = np.concatenate([sample.features for sample in samples])
    low, high = np.quantile(seen, (0.01, 0.99), axis=0)
    manifest = WorkflowManifest(
        base=weights.base,
        eta=weights.eta,
        tau_s=weights.tau_s,
        scenario=scenario,
        objective=objective,
        sha256=digest_of(graph.getvalue()),
        weights_sha256=digest_of(arrays.getvalue()),
        servegym_version=servegym.__version__,
        training=training or {},
        pair_ranges=tuple((float(a), float(b)) for a, b in zip(low, high, strict=True)),
    )
    described = manifest.model_dump_json(indent=2) + "\n"
    write_whole(
        {
            path: graph.getvalue(),
            folder / WEIGHTS: arrays.getvalue(),
            folder / "manifest.json": described.encode(),
        }
    )
    return path


def _arrays(weights: WorkflowWeights) -> dict[str, np.ndarray]:
    """All weights that are arrays, by name."""
    found = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def _check(network: WorkflowNetwork, graph: bytes, samples: Sequence[DecisionSample]) -> None:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    known = {given.name for given in session.get_inputs()}
    worst = 0.0
    for sample in samples:
        feeds = {name: value for name, value in sample._asdict().items() if name in known}
        got = session.run(None, feeds)[0]
        with torch.inference_mode():
            want = network(*(torch.from_numpy(a) for a in sample)).numpy()
        # relative to their size: scores may be in the thousands
        worst = max(worst, float((np.abs(got - want) / (1.0 + np.abs(want))).max()))
    if worst > 1e-4:
        raise ExportError(
            "the exported graph differs from the network: largest relative error of a score"
            f" {worst:g} in {len(samples)} decisions"
        )


def read_scheduler(path: Path) -> LearnedRule:
    """Read an exported scheduler of jobs as a compiled rule.

    Args:
        path: Of `policy.onnx`; its manifest and weights are beside it.

    Raises:
        ExportError: If a file is missing, broken or not what the manifest was written for.
    """
    folder = path.resolve().parent
    manifest_path, weights_path = folder / "manifest.json", folder / WEIGHTS
    for file in (path, manifest_path, weights_path):
        if not file.is_file():
            raise ExportError(
                f"{path} must exist with manifest.json and {WEIGHTS} beside it: {file.name} is"
                " missing"
            )
    try:
        manifest = WorkflowManifest.model_validate_json(manifest_text(manifest_path))
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ExportError(
            f"{manifest_path} is not the manifest of a scheduler of jobs: {why}"
        ) from error
    if (manifest.pair_features, manifest.stage_features) != (PAIR_FEATURES, STAGE_FEATURES):
        raise ExportError(
            f"{path} was trained on other features than this version of servegym has: train and"
            " export it again"
        )
    if (manifest.sha256, manifest.weights_sha256) != (digest(path), digest(weights_path)):
        raise ExportError(f"{path} or its {WEIGHTS} was changed after its manifest: export again")
    try:
        with np.load(weights_path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        weights = WorkflowWeights(manifest.base, manifest.eta, manifest.tau_s, **arrays)
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
        ConfigError,
    ) as error:
        raise ExportError(f"{weights_path} cannot be run: {error}") from error
    # training writes <run>/policy/policy.onnx: the run's name says more than "policy"
    name = folder.parent.name if folder.name == "policy" else folder.name
    return learned_rule(weights, name=name, information=manifest.information)
