"""Exporting a scheduler of jobs: ONNX for others, weights for the compiled rule, a manifest."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from servegym.agents.workflow_policy import LearnedRule, WorkflowWeights, learned_rule
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import (
    WEIGHTS,
    LinearShape,
    Manifest,
    digest,
    policy_name,
    read_manifest,
    write_policy,
)
from servegym.typing import Float32Array, IntArray

if TYPE_CHECKING:
    from servegym.agents.workflow_network import WorkflowNetwork

#: Inputs of the graph, in order.
INPUTS = ("features", "base", "stage", "job", "stages", "children", "members")


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

    from servegym.export.from_torch import graph_of

    network, arrays = network.cpu().eval(), io.BytesIO()
    axes = {
        "features": {0: "P"},
        "base": {0: "P"},
        "stage": {0: "P"},
        "job": {0: "P"},
        "stages": {0: "S"},
        "children": {0: "S", 1: "S"},
        "members": {0: "J", 1: "S"},
        "scores": {0: "P"},
    }
    example = tuple(torch.from_numpy(a) for a in samples[0])
    graph = graph_of(network, example, INPUTS, "scores", axes)
    _check(network, graph, samples)
    weights = network.weights()
    np.savez(arrays, **_arrays(weights))  # type: ignore[arg-type]
    return write_policy(
        folder / "policy.onnx",
        "workflow",
        graph,
        {"pairs": np.concatenate([sample.features for sample in samples])},
        weights=arrays.getvalue(),
        network=LinearShape(base=weights.base, eta=weights.eta, tau_s=weights.tau_s),
        scenario=scenario,
        objective=objective,
        training=training or {},
    )


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
    return exported_scheduler(path, read_manifest(path, "workflow"))


def exported_scheduler(path: Path, manifest: Manifest) -> LearnedRule:
    """Return the scheduler of a verified manifest.

    Raises:
        ExportError: If its weights are missing, were changed or cannot be run.
    """
    weights_path = path.parent / WEIGHTS
    if not weights_path.is_file():
        raise ExportError(f"{path} must exist with {WEIGHTS} beside it: {WEIGHTS} is missing")
    if manifest.weights_sha256 != digest(weights_path):
        raise ExportError(f"{weights_path} was changed after its manifest: export again")
    try:
        shape = LinearShape.model_validate(manifest.network)
        with np.load(weights_path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        weights = WorkflowWeights(shape.base, shape.eta, shape.tau_s, **arrays)
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
    return learned_rule(weights, name=policy_name(path), information=manifest.information)
