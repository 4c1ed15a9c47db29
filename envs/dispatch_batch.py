"""A batch of dispatch episodes: which replica gets an arriving request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.kernels import advance
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import DONE
from servegym.envs.batch import one_of
from servegym.envs.costs import COST_FEATURES, cost_features
from servegym.envs.kernels import step_range, write_observation
from servegym.envs.observation import Table
from servegym.envs.request_batch import RequestBatch
from servegym.envs.request_scene import dispatch_scene
from servegym.envs.scene import Scene
from servegym.errors import ConfigError
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_REQUEST_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
    ReplicaFeature,
)
from servegym.policy.layout import scenario_actions
from servegym.scenario import Scenario
from servegym.typing import BoolArray, Float32Array, Int8Array, IntArray

Features = Literal["contract", "costs"]

_OUTSTANDING = int(ReplicaFeature["OUTSTANDING_REQUESTS"])
_NEEDS = int(Group.COUNTERS | Group.METRICS | Group.PREFIX)


class DispatchBatch(RequestBatch):
    """`num_envs` environments that dispatch requests; see `RequestBatch`.

    Args:
        num_envs: Environments.
        scenario: A name, a path or a `Scenario`.
        r_max: Replica rows, if there are to be more than the scenario's largest fleet has.
        features: What is observed of replicas: the `contract`'s features, or the `costs` of
            choosing them, all within 0 to 1; see `envs.costs`.
        settings: See `RequestBatch`.

    Attributes:
        width: Replica rows; fleets may be smaller.
        num_actions: Replicas, then hold and reject where the scenario allows them.
        replicas: Features of the contract, `float32[num_envs, width, NUM_OBSERVED_FEATURES]`.
        request: Observation, `float32[num_envs, NUM_REQUEST_FEATURES]`.
    """

    def __init__(
        self,
        num_envs: int,
        scenario: Scenario | str = "mixed-chat",
        *,
        r_max: int | None = None,
        features: Features = "contract",
        **settings: Any,
    ) -> None:
        super().__init__(num_envs, scenario, **settings)
        one_of(features=(features, get_args(Features)))
        self._shows_costs = features == "costs"
        self.width = r_max or self.scenario.max_replicas
        if self.width < self.scenario.max_replicas:
            raise ConfigError(
                f"r_max ({r_max}) must be at least the {self.scenario.max_replicas} replicas "
                f"of scenario {self.scenario.name}"
            )
        actions = self.scenario.actions
        own = scenario_actions(self.width, hold=actions.hold, reject=actions.reject)
        replicas = (self.width, NUM_OBSERVED_FEATURES)
        shown = COST_FEATURES if self._shows_costs else REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]
        self._allocate(
            len(own),
            {
                "replicas": Table(shown, (self.width, len(shown))),
                "request": Table(REQUEST_FEATURES, (NUM_REQUEST_FEATURES,)),
            },
            {},
        )
        self.replicas: Float32Array = np.zeros((num_envs, *replicas), np.float32)
        self.request: Float32Array = np.zeros((num_envs, NUM_REQUEST_FEATURES), np.float32)

    def _reset(self, envs: IntArray, episodes: Sequence[Episode] | None) -> None:
        drawn = episodes or [self.draw(env) for env in envs.tolist()]
        if self._simulator is None:
            first = drawn if len(envs) == self.num_envs else [drawn[0]] * self.num_envs
            self._simulator = Simulator(self.scenario.spec, first, max_replicas=self.width)
        for env, episode in zip(envs.tolist(), drawn, strict=True):
            self.simulator.load(env, episode)
            if advance(self.simulator.params, self.simulator.state, env) == DONE:
                raise ConfigError("an episode needs at least one decision")
            write_observation(
                self.simulator.params,
                self.simulator.state,
                env,
                _NEEDS,
                NUM_OBSERVED_FEATURES,
                np.empty(NUM_REQUEST_FEATURES),
                self.replicas,
                self.request,
                self.mask,
            )

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        step_range(
            self.simulator.params,
            self.simulator.state,
            first,
            stop,
            actions,
            active,
            _NEEDS,
            NUM_OBSERVED_FEATURES,
            self.objective == "goodput",
            self.reward_scale,
            np.empty(NUM_REQUEST_FEATURES),
            self.replicas,
            self.request,
            self.mask,
            self.reward,
            self.done,
            self.dt_s,
        )

    def _parts(self) -> dict[str, NDArray[Any]]:
        return self._shown(self.replicas, self.request, self.mask)

    def _shown(
        self, replicas: Float32Array, request: Float32Array, mask: Int8Array
    ) -> dict[str, NDArray[Any]]:
        if self._shows_costs:
            replicas = cost_features(replicas, request)
        return {"replicas": replicas, "request": request, "action_mask": mask}

    def seen(self, replicas: Float32Array, request: Float32Array, mask: Int8Array) -> Any:
        """Return how this batch's agents see decisions from elsewhere.

        Args:
            replicas: Features of the contract, `float32[n, width, NUM_OBSERVED_FEATURES]`.
            request: Features of the contract, `float32[n, NUM_REQUEST_FEATURES]`.
            mask: Allowed actions, `int8[n, num_actions]`.
        """
        return self.view(self._shown(replicas, request, mask))

    def _rule_action(self, env: int) -> int:
        """Least outstanding requests; the first of equals."""
        outstanding = self.replicas[env, :, _OUTSTANDING]
        load = np.where(self.mask[env, : self.width] == 1, outstanding, np.inf)
        best = int(load.argmin())
        return best if load[best] < np.inf else int(self.mask[env].argmax())

    def scene(self, env: int) -> Scene:
        """Show the replicas, what they run and what waits for them."""
        return dispatch_scene(self.scenario, self.simulator, env)
