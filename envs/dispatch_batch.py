"""A batch of dispatch episodes: which replica gets an arriving request."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.jit import fixed
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.envs.costs import COST_FEATURES, cost_features
from servegym.envs.dispatch_kernels import KernelSettings, Output, begin, step_range
from servegym.envs.observation import Table
from servegym.envs.request_batch import RequestBatch
from servegym.envs.request_scene import dispatch_deed, dispatch_scene
from servegym.envs.scene import Scene
from servegym.envs.settings import DispatchSettings
from servegym.errors import ConfigError
from servegym.policy.contract import (
    NUM_REQUEST_FEATURES,
    OUTSTANDING_REQUESTS,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    observed,
    observed_groups,
)
from servegym.policy.layout import scenario_actions
from servegym.policy.observe import prepare
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class DispatchBatch(RequestBatch):
    """`num_envs` environments that dispatch requests; see `RequestBatch`.

    Args:
        num_envs: Environments.
        settings: What it was told.

    Attributes:
        width: Replica rows; fleets may be smaller.
        num_actions: Replicas, then hold and reject where the scenario allows them.
        replicas: Features of the contract, `float32[num_envs, width, F]`; see `contract.observed`.
        request: Observation, `float32[num_envs, G]`.
    """

    settings_type = DispatchSettings
    settings: DispatchSettings

    def __init__(self, num_envs: int, settings: DispatchSettings) -> None:
        super().__init__(num_envs, settings)
        self._shows_costs = settings.features == "costs"
        extended = settings.features == "extended"
        self._groups = observed_groups(extended=extended)
        self.width = settings.r_max or self.scenario.max_replicas
        if self.width < self.scenario.max_replicas:
            raise ConfigError(
                f"r_max ({settings.r_max}) must be at least the {self.scenario.max_replicas}"
                f" replicas of scenario {self.scenario.name}"
            )
        actions = self.scenario.actions
        own = scenario_actions(self.width, hold=actions.hold, reject=actions.reject)
        shape = observed(extended=extended)
        shown = COST_FEATURES if self._shows_costs else REPLICA_FEATURES[: shape.replicas]
        self._allocate(
            len(own),
            {
                "replicas": Table(shown, (self.width, len(shown))),
                "request": Table(REQUEST_FEATURES[: shape.request], (shape.request,)),
            },
            {},
        )
        self.replicas: Float32Array = np.zeros((num_envs, self.width, shape.replicas), np.float32)
        self.request: Float32Array = np.zeros((num_envs, shape.request), np.float32)
        self._kernel_settings = KernelSettings(
            needs=int(self._groups),
            goodput=self.objective == "goodput",
            scale=float(self.reward_scale),
        )
        self._output = Output(
            self.replicas, self.request, self.mask, self.reward, self.done, self.dt_s
        )

    def _make_simulator(self, episodes: list[Episode]) -> Simulator:
        simulator = Simulator(self.scenario.spec, episodes, max_replicas=self.width)
        prepare(simulator, self._groups)
        return simulator

    def _begin(self, env: int, episode: Episode) -> bool:
        self.simulator.load(env, episode)
        p, s = self.simulator.params, self.simulator.state
        return begin(p, s, self._kernel_settings, self._output, env, _memory())

    def _no_decision(self, drawn: bool) -> str:
        return "an episode needs at least one decision"

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        p, s = self.simulator.params, self.simulator.state
        c, o = self._kernel_settings, self._output
        arguments = (p, s, c, o, first, stop, actions, active, _memory())
        fixed(step_range, *arguments)(*arguments)

    def _parts(self) -> dict[str, NDArray[Any]]:
        return self._parts_of(self.replicas, self.request, self.mask)

    def _parts_of(
        self, replicas: Float32Array, request: Float32Array, mask: Int8Array
    ) -> dict[str, NDArray[Any]]:
        if self._shows_costs:
            replicas = cost_features(replicas, request)
        return {"replicas": replicas, "request": request, "action_mask": mask}

    def seen(self, replicas: Float32Array, request: Float32Array, mask: Int8Array) -> Any:
        """Return how this batch's agents see decisions from elsewhere.

        Args:
            replicas: Features of the contract, `float32[n, width, F]`.
            request: Features of the contract, `float32[n, G]`.
            mask: Allowed actions, `int8[n, num_actions]`.
        """
        return self.observer(self._parts_of(replicas, request, mask))

    def _rule_action(self, env: int) -> int:
        """Least outstanding requests; the first of equals."""
        outstanding = self.replicas[env, :, OUTSTANDING_REQUESTS]
        load = np.where(self.mask[env, : self.width] == 1, outstanding, np.inf)
        best = int(load.argmin())
        return best if load[best] < np.inf else int(self.mask[env].argmax())

    def _deed(self, env: int, action: int) -> str:
        return dispatch_deed(self.simulator, env, action, self.width)

    def scene(self, env: int) -> Scene:
        """Show the replicas, what they run and what waits for them."""
        return dispatch_scene(self.scenario, self.simulator, env)


def _memory() -> FloatArray:
    """Make working memory for one thread."""
    return np.empty(NUM_REQUEST_FEATURES)
