"""Exported policies: our own network family in NumPy, any other graph in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from servegym.cluster.state import HOLD, REJECT
from servegym.errors import ExportError
from servegym.policy.contract import NUM_OBSERVED_FEATURES, NUM_REQUEST_FEATURES, Group
from servegym.policy.numpy_network import NumpyNetwork
from servegym.policy.policy import Information, Observations
from servegym.typing import BoolArray, IntArray

#: Beyond the actions of any fleet, and so refused by whoever checks it.
_NO_CHOICE = 2**31
_NEEDS = Group.COUNTERS | Group.METRICS | Group.PREFIX


def shown_mask(mask: BoolArray, num_extra: int) -> BoolArray:
    """Return the part of a mask that a policy with `num_extra` actions besides replicas is shown.

    With one such action it is hold where a hold is possible, else reject.

    Args:
        mask: `bool[batch, R + 2]`.
        num_extra: 0, 1 or 2.

    Returns:
        `bool[batch, R + num_extra]`.
    """
    width = mask.shape[1] - 2
    if num_extra != 1 or mask[:, width].any():
        return mask[:, : width + num_extra]
    return np.delete(mask, width, axis=1)


def _to_core(chosen: IntArray, mask: BoolArray) -> IntArray:
    """Translate indices of `shown_mask` to replicas, `HOLD` and `REJECT`."""
    width = mask.shape[1] - 2
    if (chosen < width).all():
        return chosen
    other = np.where((chosen == width) & mask[:, width].any(), HOLD, REJECT)
    return np.where((chosen < width) | (chosen == _NO_CHOICE), chosen, other).astype(np.int64)


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
        shown = shown_mask(mask, self._network.shape.num_extra)
        chosen = np.empty(len(request), np.int64)
        for row in range(len(request)):
            logits = self._network.logits(replicas[row], request[row], shown[row])
            best = int(logits.argmax())
            # a NaN wins every argmax: it must not pass for a choice
            chosen[row] = best if math.isfinite(logits[best]) else _NO_CHOICE
        return _to_core(chosen, mask)


class FrozenPolicy:
    """`policy.onnx` as a `Policy`."""

    needs = _NEEDS

    def __init__(self, path: Path, *, num_extra: int, information: Information, name: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError(
                "running an exported policy needs onnxruntime: pip install onnxruntime"
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
        shown = shown_mask(observations.mask, self._num_extra)
        feeds = {
            "replicas": np.ascontiguousarray(replicas, np.float32),
            "request": observations.request.astype(np.float32),
            "mask": shown.astype(np.float32),
        }
        logits = self._session.run(None, feeds)[0]
        finite = np.isfinite(logits).all(-1)
        chosen = np.where(finite, logits.argmax(-1), _NO_CHOICE).astype(np.int64)
        return _to_core(chosen, observations.mask)
