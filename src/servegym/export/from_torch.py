"""Exporting a network to ONNX, checked against PyTorch before anything is kept."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

import servegym
from servegym.agents.network import DispatchNetwork
from servegym.errors import ExportError
from servegym.export.manifest import Manifest, digest_of
from servegym.export.weights import NAME as WEIGHTS
from servegym.export.weights import NUM_PROBES, weights_file
from servegym.policy.layout import GRAPH_INPUTS
from servegym.policy.numpy_network import FAMILY, NetworkShape
from servegym.typing import Float32Array
from servegym.whole_files import write_whole

OPSET = 17


def export_policy(
    network: DispatchNetwork,
    folder: Path,
    samples: tuple[Float32Array, Float32Array, Float32Array],
    *,
    scenario: str = "",
    training: dict[str, float | int | str] | None = None,
) -> Path:
    """Write `policy.onnx`, `weights.npz` and `manifest.json`.

    Args:
        network: What to export.
        folder: Where to.
        samples: Observations from training (replicas, request, mask), to check the file with and
            to state the range of each feature.
        scenario: What it was trained on.
        training: Summary for the manifest.

    Returns:
        Path of the ONNX file.

    Raises:
        ExportError: If the exported file does not answer as the network does.
        OutputError: If the files cannot be written; those that were there are untouched.
    """
    network = network.cpu().eval()
    path, graph = folder / "policy.onnx", io.BytesIO()
    few = tuple(torch.from_numpy(a[:2]) for a in samples)
    # the exporter of torch.export unrolls the variable number of replicas; this one keeps it
    torch.onnx.export(
        network,
        few,
        graph,  # type: ignore[arg-type]  # this exporter takes files, too
        input_names=list(GRAPH_INPUTS),
        output_names=["logits"],
        dynamic_axes={
            "replicas": {0: "batch", 1: "R"},
            "request": {0: "batch"},
            "mask": {0: "batch", 1: "A"},
            "logits": {0: "batch", 1: "A"},
        },
        opset_version=OPSET,
        dynamo=False,
    )
    _check(network, graph.getvalue(), samples)
    shape = _shape(network)
    weights = weights_file(shape, _weights(network), _probes(network, samples))
    replicas, request, _ = samples
    present = replicas[replicas[..., 0] > 0]
    manifest = Manifest(
        num_extra_actions=network.config.num_extra,
        scenario=scenario,
        sha256=digest_of(graph.getvalue()),
        weights_sha256=digest_of(weights),
        network=shape,
        servegym_version=servegym.__version__,
        training=training or {},
        replica_ranges=_ranges(present),
        request_ranges=_ranges(request),
    )
    described = manifest.model_dump_json(indent=2) + "\n"
    write_whole(
        {
            path: graph.getvalue(),
            folder / WEIGHTS: weights,
            folder / "manifest.json": described.encode(),
        }
    )
    return path


def _shape(network: DispatchNetwork) -> NetworkShape:
    config = network.config
    return NetworkShape(
        FAMILY, config.context, config.base, config.base_params, config.eta, config.num_extra
    )


def _weights(network: DispatchNetwork) -> dict[str, Float32Array]:
    """All but the critic's: nobody asks for values after training."""
    kept = ("actor.", "score.", "extra.")
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


def _ranges(values: Float32Array) -> tuple[tuple[float, float], ...]:
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


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
    agree = float((got.argmax(-1) == want.argmax(-1)).mean())
    if worst > 1e-2 or agree < 0.999:
        raise ExportError(
            f"the exported graph differs from the network: largest logit error {worst:g}, "
            f"same action in {agree:.4%} of {len(got)} observations"
        )
