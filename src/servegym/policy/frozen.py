"""Exported policies: our own network family in NumPy, any other graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from servegym.cluster.state import HOLD, REJECT
from servegym.errors import ExportError
from servegym.policy.contract import NUM_OBSERVED_FEATURES, NUM_REQUEST_FEATURES, Group
from servegym.policy.numpy_network import NumpyNetwork
from servegym.policy.policy import Information, Observations
from servegym.typing import BoolArray, IntArray

_NEEDS = Group.COUNTERS | Group.METRICS | Group.PREFIX


def shown_actions(mask: BoolArray, num_extra: int) -> list[int]:
    """Columns of the mask that a policy with `num_extra` actions besides the replicas is shown.

    With one it is hold where a hold is possible, else reject.

    Args:
        mask: `bool[batch, R + 2]`.
        num_extra: 0, 1 or 2.
    """
    width = mask.shape[1] - 2
    if num_extra == 0:
        return list(range(width))
    if num_extra == 2:
        return list(range(width + 2))
    return [*range(width), width if mask[:, width].any() else width + 1]


def _to_core(chosen: IntArray, mask: BoolArray) -> IntArray:
    """Translate indices of `shown_actions` to replicas, `HOLD` and `REJECT`."""
    width = mask.shape[1] - 2
    other = np.where((chosen == width) & mask[:, width].any(), HOLD, REJECT)
    return np.where(chosen < width, chosen, other).astype(np.int64)


class NumpyPolicy:
    """`weights.npz` as a `Policy`; needs nothing but NumPy."""

    needs = _NEEDS

    def __init__(self, network: NumpyNetwork, *, information: Information, name: str) -> None:
        self._network = network
        self.information: Information = information
        self.name = name

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the network has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        replicas, request, mask = observations
        keep = shown_actions(mask, self._network.shape.num_extra)
        shown = mask[:, keep]
        chosen = np.empty(len(request), np.int64)
        for row in range(len(request)):
            logits = self._network.logits(replicas[row], request[row], shown[row])
            # NaN would win an argmax and pass for a choice
            chosen[row] = logits.argmax() if np.isfinite(logits).all() else REJECT
        return _to_core(chosen, mask)


class FrozenPolicy:
    """`policy.onnx` as a `Policy`."""

    needs = _NEEDS

    def __init__(self, path: Path, *, num_extra: int, information: Information, name: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError(
                "running an exported policy needs onnxruntime: pip install 'servegym[serve]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self._check_actions(num_extra)
        except Exception as error:  # onnxruntime's own have no common base
            raise ExportError(f"{path} cannot be run: {str(error).splitlines()[0]}") from error
        self._num_extra = num_extra
        self.information: Information = information
        self.name = name

    def _check_actions(self, num_extra: int) -> None:
        """Decide about two replicas, to see whether the graph has the actions it should."""
        feeds = {
            "replicas": np.zeros((1, 2, NUM_OBSERVED_FEATURES), np.float32),
            "request": np.zeros((1, NUM_REQUEST_FEATURES), np.float32),
            "mask": np.ones((1, 2 + num_extra), np.float32),
        }
        shape = self._session.run(None, feeds)[0].shape
        if shape != (1, 2 + num_extra):
            raise ExportError(f"it gives {shape[-1] - 2} extra actions, its manifest {num_extra}")

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the graph has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        replicas = observations.replicas[:, :NUM_OBSERVED_FEATURES].transpose(0, 2, 1)
        keep = shown_actions(observations.mask, self._num_extra)
        feeds = {
            "replicas": np.ascontiguousarray(replicas, np.float32),
            "request": observations.request.astype(np.float32),
            "mask": observations.mask[:, keep].astype(np.float32),
        }
        chosen = self._session.run(None, feeds)[0].argmax(-1)
        return _to_core(chosen, observations.mask)
