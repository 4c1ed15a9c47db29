"""A model of Stable-Baselines3 as a `Policy`, to be judged like any other."""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.envs.dispatch_batch import DispatchBatch
from servegym.policy.contract import OUTSTANDING_REQUESTS, Group
from servegym.policy.layout import agent_actions, agent_arrays
from servegym.policy.policy import Information, Observations
from servegym.typing import IntArray


class StockPolicy:
    """The actions of a model that was trained on a dispatch environment.

    Args:
        model: Has SB3's `predict`, and `action_masks` in it if it is a masked algorithm.
        batch: Of the environment it was trained on (`env.batch`): says what the model sees.
        name: Name in tables.
        masked: Whether `predict` takes `action_masks`; of other models a forbidden action is
            replaced by the allowed replica with the fewest outstanding requests.
        deterministic: Whether the most probable action is taken, else one is drawn.
    """

    information: Information = "predictive"
    needs = Group.COUNTERS | Group.METRICS | Group.PREFIX

    def __init__(
        self, model: Any, batch: DispatchBatch, name: str, *, masked: bool, deterministic: bool
    ) -> None:
        self.name = name
        self._model, self._batch = model, batch
        self._masked, self._deterministic = masked, deterministic

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the model has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        actions = agent_actions(observations.mask, self._batch.num_actions - self._batch.width)
        replicas, request, mask = agent_arrays(observations, actions)
        seen = self._batch.seen(replicas, request, mask.astype(np.int8))
        given = {"action_masks": mask.astype(np.bool_)} if self._masked else {}
        chosen, _ = self._model.predict(seen, deterministic=self._deterministic, **given)
        forbidden = mask[np.arange(len(mask)), chosen] == 0
        if forbidden.any():
            load = replicas[:, :, OUTSTANDING_REQUESTS]
            outstanding = np.where(mask[:, : load.shape[1]] > 0, load, np.inf)
            chosen = np.where(forbidden, outstanding.argmin(-1), chosen)
        return actions[chosen]
