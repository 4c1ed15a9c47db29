"""Exported policies: our own network family in NumPy, any other graph in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from servegym.errors import ExportError
from servegym.policy.contract import observed, observed_groups
from servegym.policy.layout import GRAPH_INPUTS, agent_actions, agent_arrays
from servegym.policy.numpy_network import HELD_FAMILY, NumpyNetwork
from servegym.policy.policy import Information, Observations
from servegym.typing import BoolArray, FloatArray, IntArray

#: Is no action, and so refused by whoever checks it.
_NO_CHOICE = -1


class NumpyPolicy:
    """`weights.npz` as a `Policy`; needs nothing but NumPy."""

    def __init__(
        self,
        network: NumpyNetwork,
        *,
        information: Information,
        name: str,
        extended: bool = False,
    ) -> None:
        self._network = network
        self.needs = observed_groups(extended=extended)
        self.information: Information = information
        self.name = name

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the network has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        replicas, request, mask = observations
        actions = self._actions(mask)
        shown = mask.take(actions, axis=1)
        chosen = np.empty(len(request), np.int64)
        for row in range(len(request)):
            logits = self._network.logits(replicas[row], request[row], shown[row])
            best = int(logits.argmax())
            # a NaN wins every argmax: it must not pass for a choice
            chosen[row] = actions[best] if math.isfinite(logits[best]) else _NO_CHOICE
        return chosen

    def _actions(self, mask: BoolArray) -> IntArray:
        shape = self._network.shape
        return agent_actions(mask, shape.num_extra, holds=shape.family == HELD_FAMILY)

    def scores(self, observations: Observations) -> FloatArray:
        """Score all actions; see `Scoring`."""
        replicas, request, mask = observations
        actions = self._actions(mask)
        shown = mask[0].take(actions)
        scores = np.full(mask.shape[1], -math.inf)
        logits = self._network.logits(replicas[0], request[0], shown)
        scores[actions] = np.where(shown, logits, -math.inf)
        return scores


class FrozenPolicy:
    """`policy.onnx` as a `Policy`."""

    def __init__(
        self,
        path: Path,
        *,
        num_extra: int,
        information: Information,
        name: str,
        extended: bool = False,
        holds: bool = False,
    ) -> None:
        self.needs = observed_groups(extended=extended)
        self._extended, self._holds = extended, holds
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
        shape = observed(extended=self._extended)
        arrays = (
            np.zeros((1, 2, shape.replicas), np.float32),
            np.zeros((1, shape.request), np.float32),
            np.ones((1, 2 + num_extra), np.float32),
        )
        shape = self._session.run(None, dict(zip(GRAPH_INPUTS, arrays, strict=True)))[0].shape
        if shape != (1, 2 + num_extra):
            raise ExportError(f"it gives {shape[-1] - 2} extra actions, its manifest {num_extra}")

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the graph has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        actions = agent_actions(observations.mask, self._num_extra, holds=self._holds)
        arrays = agent_arrays(observations, actions, extended=self._extended)
        logits = self._session.run(None, dict(zip(GRAPH_INPUTS, arrays, strict=True)))[0]
        finite = np.isfinite(logits).all(-1)
        return np.where(finite, actions[logits.argmax(-1)], _NO_CHOICE)
