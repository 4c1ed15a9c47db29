"""Exporting a network to ONNX, checked against PyTorch before anything is kept."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from servegym.agents.network import DispatchNetwork
from servegym.errors import ExportError
from servegym.export.manifest import write_policy
from servegym.export.weights import NUM_PROBES, weights_file
from servegym.policy.contract import NUM_EXTENDED_FEATURES
from servegym.policy.layout import GRAPH_INPUTS
from servegym.typing import Float32Array

OPSET = 17
#: Logits that differ by less are the same but for rounding.
_TIE = 1e-5


def export_policy(
    network: DispatchNetwork,
    folder: Path,
    samples: tuple[Float32Array, Float32Array, Float32Array],
    *,
    scenario: str = "",
    objective: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `policy.onnx`, `weights.npz` and `manifest.json`.

    Args:
        network: What to export.
        folder: Where to.
        samples: Observations from training (replicas, request, mask), to check the file with and
            to state the range of each feature.
        scenario: What it was trained on.
        objective: What for.
        training: Summary for the manifest.

    Returns:
        Path of the ONNX file.

    Raises:
        ExportError: If the exported file does not answer as the network does.
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    network = network.cpu().eval()
    few = tuple(torch.from_numpy(a[:2]) for a in samples)
    axes = {
        "replicas": {0: "batch", 1: "R"},
        "request": {0: "batch"},
        "mask": {0: "batch", 1: "A"},
        "logits": {0: "batch", 1: "A"},
    }
    graph = graph_of(network, few, GRAPH_INPUTS, "logits", axes)
    _check(network, graph, samples)
    shape = network.shape
    replicas, request, _ = samples
    return write_policy(
        folder / "policy.onnx",
        "dispatch",
        graph,
        {"replicas": replicas[replicas[..., 0] > 0], "request": request},
        weights=weights_file(shape, _weights(network), _probes(network, samples)),
        extended=replicas.shape[-1] == NUM_EXTENDED_FEATURES,
        num_extra_actions=network.config.num_extra,
        scenario=scenario,
        objective=objective,
        network=shape,
        training=training or {},
    )


def graph_of(
    network: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    output: str,
    axes: Mapping[str, Mapping[int, str]],
) -> bytes:
    """Return a network as an ONNX graph.

    Args:
        network: What to export.
        example: Its arguments.
        inputs: Their names.
        output: Name of what it returns.
        axes: Names of the axes of each that have any length.
    """
    graph = io.BytesIO()
    # the exporter of torch.export unrolls the variable number of rows; this one keeps it
    torch.onnx.export(
        network,
        example,
        graph,  # type: ignore[arg-type]  # this exporter takes files, too
        input_names=list(inputs),
        output_names=[output],
        dynamic_axes=axes,
        opset_version=OPSET,
        dynamo=False,
    )
    return graph.getvalue()


def _weights(network: DispatchNetwork) -> dict[str, Float32Array]:
    """All but the critic's: nobody asks for values after training."""
    kept = ("actor.", "score.", "extra.", "hold.")
    state = network.state_dict()
    return {name: state[name].numpy() for name in state if name.startswith(kept)}


def _probes(
    network: DispatchNetwork, samples: tuple[Float32Array, Float32Array, Float32Array]
) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
    few = np.linspace(0, len(samples[0]) - 1, min(NUM_PROBES, len(samples[0]))).astype(int)
    replicas, request, mask = (a[few] for a in samples)
    with torch.inference_mode():
        logits = network(*(torch.from_numpy(a) for a in (replicas, request, mask)))
    return replicas, request, mask, logits.numpy()


def _check(
    network: DispatchNetwork,
    graph: bytes,
    samples: tuple[Float32Array, Float32Array, Float32Array],
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    got = session.run(None, dict(zip(GRAPH_INPUTS, samples, strict=True)))[0]
    with torch.inference_mode():
        want = network(*(torch.from_numpy(a) for a in samples)).numpy()
    allowed = samples[2] > 0
    worst = float(np.abs((got - want)[allowed]).max())
    # of replicas that are alike, idle ones say, either runtime may take any
    taken = np.take_along_axis(want, got.argmax(-1)[:, None], -1)[:, 0]
    agree = float((want.max(-1) - taken <= _TIE).mean())
    if worst > 1e-2 or agree < 0.999:
        raise ExportError(
            f"the exported graph differs from the network: largest logit error {worst:g}, "
            f"same action in {agree:.4%} of {len(got)} observations"
        )
