"""An exported policy, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from servegym.cluster.state import HOLD, REJECT
from servegym.errors import ExportError
from servegym.policy.contract import NUM_OBSERVED_FEATURES, NUM_REQUEST_FEATURES, Group
from servegym.policy.policy import Information, Observations
from servegym.typing import IntArray


class FrozenPolicy:
    """`policy.onnx` as a `Policy`; the file and its manifest are verified when it is loaded."""

    needs = Group.COUNTERS | Group.METRICS | Group.PREFIX

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
        width = replicas.shape[1]
        can_hold = bool(observations.mask[:, width].any())
        extra = [width, width + 1] if self._num_extra == 2 else [width if can_hold else width + 1]
        keep = [*range(width), *(extra if self._num_extra else [])]
        feeds = {
            "replicas": np.ascontiguousarray(replicas, np.float32),
            "request": observations.request.astype(np.float32),
            "mask": observations.mask[:, keep].astype(np.float32),
        }
        chosen = self._session.run(None, feeds)[0].argmax(-1)
        other = np.where((chosen == width) & can_hold, HOLD, REJECT)
        return np.where(chosen < width, chosen, other).astype(np.int64)
