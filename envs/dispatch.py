"""`servegym/Dispatch-v0`: which replica gets an arriving request."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from servegym.cluster.spec import Episode
from servegym.envs.batch import EpisodeBatch
from servegym.errors import ConfigError, ResetNeeded
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Feature,
)
from servegym.scenario import Scenario
from servegym.typing import BoolArray


def feature_table(features: tuple[Feature, ...]) -> str:
    """Render features as a Markdown table."""
    rows = ["| Num | Feature | Min | Max | Unit | Meaning |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {i} | `{f.name}` | {f.low:g} | {f.high:g} | {f.unit} | {f.meaning} |"
        for i, f in enumerate(features)
    ]
    return "\n".join(rows)


class DispatchEnv(gymnasium.Env[dict[str, Any], Any]):
    __doc__ = f"""Dispatch requests of an LLM serving cluster to its replicas.

## Description
A router in front of vLLM-like engines of different speed. Each step is one decision: a request
has arrived (or its hold has expired) and goes to a replica. Engines are simulated iteration by
iteration; see `docs/simulator.md`.

## Action Space
`Discrete`: the replicas, then *hold* and *reject* if the scenario allows them. Actions outside
`action_mask` raise `InvalidAction`.

## Observation Space
A `Dict` with `replicas` (`float32[R, {NUM_OBSERVED_FEATURES}]`, rows of absent replicas are 0),
`request` (`float32[{len(REQUEST_FEATURES)}]`) and `action_mask` (`int8`, 1 is allowed), in raw units.

Columns of `replicas`:

{feature_table(REPLICA_FEATURES[:NUM_OBSERVED_FEATURES])}

Entries of `request`:

{feature_table(REQUEST_FEATURES)}

## Rewards
`latency`: minus the integral of the requests in the system since the last decision, so the sum
over an episode is exactly minus the sum of all times in the system. `goodput`: the weight of the
requests that ended within all their limits since the last decision. Both divided by `reward_scale`.

## Starting State
The first arrival of an episode drawn from the scenario, all replicas idle and empty.

## Episode End
Terminated when all requests have ended: after the last decision the cluster is run dry, and what
happens then is rewarded in the last step. Never truncated.

## Arguments
`scenario` (name, path or `Scenario`), `load` (factor on the arrival rate, or a range drawn per
episode), `num_requests`, `r_max` (rows of `replicas`), `objective`, `reward_scale`.
`reset(options={{"episode": Episode(...)}})` plays a given episode.

## Version History
v0: first version.
"""

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's convention

    def __init__(
        self,
        scenario: Scenario | str = "mixed-chat",
        *,
        load: float | tuple[float, float] = 1.0,
        num_requests: int | None = None,
        r_max: int | None = None,
        objective: str | None = None,
        reward_scale: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None:
            raise ConfigError(f"render_mode must be None, got {render_mode!r}")
        self._batch = EpisodeBatch(
            scenario,
            1,
            load=load,
            num_requests=num_requests,
            r_max=r_max,
            objective=objective,
            reward_scale=reward_scale,
        )
        self.render_mode = render_mode
        self.observation_space = self._batch.observation_space()
        self.action_space = gymnasium.spaces.Discrete(self._batch.num_actions)
        self._ready = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Restarts the sequence of episodes.
            options: `{"episode": Episode}` to play that one.
        """
        super().reset(seed=seed)
        if seed is not None or not self._ready:
            self._batch.seed(int(self.np_random.integers(1 << 62)))
        episode = (options or {}).get("episode")
        given = [episode] if isinstance(episode, Episode) else None
        self._batch.reset(np.zeros(1, np.int64), given)
        self._ready = True
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Dispatch the pending request and run to the next decision."""
        if not self._ready or self._batch.done[0]:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        self._batch.step(np.array([action], np.int64), np.ones(1, np.bool_))
        info = self._info()
        done = bool(self._batch.done[0])
        if done:
            info["episode_metrics"] = self._batch.summary(0)
        return self._observation(), float(self._batch.reward[0]), done, False, info

    def action_masks(self) -> BoolArray:
        """Allowed actions, `bool[num_actions]`, as sb3-contrib asks for them."""
        return self._batch.mask[0].astype(np.bool_)

    def _observation(self) -> dict[str, Any]:
        return {name: value[0] for name, value in self._batch.observation().items()}

    def _info(self) -> dict[str, Any]:
        env = self._batch.simulator.state.env[0]
        return {
            "action_mask": self._batch.mask[0].copy(),
            "dt_s": float(self._batch.dt_s[0]),
            "now_s": float(env["now_s"]),
        }

    def close(self) -> None:
        """Release threads."""
        self._batch.close()
