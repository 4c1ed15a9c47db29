"""`weights.npz`: a network for NumPy, with observations and the logits they must give."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from servegym.errors import ExportError
from servegym.export.manifest import WEIGHTS, Manifest, digest
from servegym.policy.numpy_network import NetworkShape, NumpyNetwork
from servegym.typing import Float32Array

#: Observations kept in the file.
NUM_PROBES = 16
#: Largest error of a logit, absolute and as a share of it.
_TOLERANCE = 1e-2
_PROBES = ("probe.replicas", "probe.request", "probe.mask", "probe.logits")


def weights_file(
    shape: NetworkShape,
    weights: Mapping[str, Float32Array],
    probes: tuple[Float32Array, Float32Array, Float32Array, Float32Array],
) -> bytes:
    """Make the file that stands beside a policy, if it answers the probes as it should.

    Args:
        shape: Kind of network.
        weights: By PyTorch's names.
        probes: Replicas `[n, R, F]`, request `[n, G]`, mask `[n, A]` and the logits they give.

    Raises:
        ExportError: If NumPy gives other logits.
    """
    _check(NumpyNetwork(shape, weights), probes, "the network in NumPy")
    file = io.BytesIO()
    np.savez(file, **{**weights, **dict(zip(_PROBES, probes, strict=True))})  # type: ignore[arg-type]
    return file.getvalue()


def read_network(folder: Path, manifest: Manifest) -> NumpyNetwork | None:
    """Read and check the network beside a policy; without the file there is none.

    Raises:
        ExportError: If the file is not the manifest's, or does not answer its own probes.
    """
    path = folder / WEIGHTS
    if not isinstance(manifest.network, NetworkShape) or not path.is_file():
        return None
    if manifest.weights_sha256 != digest(path):
        raise ExportError(f"{path} is not the file its manifest was written for: export again")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        probes = tuple(arrays.pop(name) for name in _PROBES)
        network = NumpyNetwork(manifest.network, arrays)
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ExportError(f"{path} cannot be run: {error}") from error
    if manifest.network.num_extra != manifest.num_extra_actions:
        raise ExportError(
            f"{path} has {manifest.network.num_extra} extra actions, its manifest "
            f"{manifest.num_extra_actions}: export again"
        )
    _check(network, probes, str(path))
    return network


def _check(network: NumpyNetwork, probes: tuple[Float32Array, ...], what: str) -> None:
    replicas, request, mask, logits = probes
    for row in range(len(request)):
        got = network.logits(replicas[row].T, request[row], mask[row])
        if not np.allclose(got, logits[row], rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ExportError(
                f"{what} answers {np.abs(got - logits[row]).max():g} off the exported network: "
                "export again"
            )
