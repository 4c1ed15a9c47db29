"""`servegym/Dispatch-v1`: which replica gets an arriving request."""

from __future__ import annotations

from servegym.envs.dispatch_batch import DispatchBatch
from servegym.envs.observation import column_table
from servegym.envs.single import BatchEnv
from servegym.envs.vector import BatchVectorEnv
from servegym.policy.contract import (
    NUM_EXTENDED_FEATURES,
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
)


class DispatchEnv(BatchEnv[DispatchBatch]):
    __doc__ = f"""Dispatch requests of an LLM serving cluster to its replicas.

## Description
A router in front of vLLM-like engines of different speed. Each step is one decision: a request
has arrived (or its hold has expired) and goes to a replica. Engines are simulated iteration by
iteration; see `docs/simulator.md`.

## Action Space
`Discrete`: the replicas, then *hold* and *reject* if the scenario allows them. Actions outside
`action_mask` raise `InvalidAction` unless `invalid_action` says otherwise; `action_space.sample()`
draws from those inside.

## Observation Space
A `Dict` with `replicas` (`float32[R, {NUM_OBSERVED_FEATURES}]`, rows of absent replicas are 0),
`request` (`float32[{NUM_OBSERVED_REQUEST_FEATURES}]`) and `action_mask` (`int8`, 1 is allowed), in raw units.

Columns of `replicas`:

{column_table(REPLICA_FEATURES[:NUM_OBSERVED_FEATURES], "Feature")}

Entries of `request`:

{column_table(REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES], "Feature")}

With `features="extended"`, which takes longer, these columns of `replicas` follow:

{column_table(REPLICA_FEATURES[NUM_OBSERVED_FEATURES:NUM_EXTENDED_FEATURES], "Feature")}

and these entries of `request`:

{column_table(REQUEST_FEATURES[NUM_OBSERVED_REQUEST_FEATURES:], "Feature")}

## Rewards
`latency`: minus the integral of the requests in the system since the last decision, so the sum
over an episode is exactly minus the sum of all times in the system. `goodput`: the weight of the
requests that ended within all their limits since the last decision. Both divided by `reward_scale`.

## Starting State
The first arrival of an episode drawn from the scenario, all replicas idle and empty.

## Episode End
Terminated when all requests have ended: after the last decision the cluster is run dry, and what
happens then is rewarded in the last step. With
`episode_end="last-arrival"` truncated at the first decision after the last arrival instead.

## Arguments
`scenario` (name, path or `Scenario`), `num_requests`, `r_max` (rows of `replicas`), `features`
(`contract`, `extended`, or `costs` of choosing each replica);
`load` (factor on the arrival rate, or a range drawn per episode), `objective`, `reward_scale`,
`shaping`, `warmup`, `episode_end`, `invalid_action` and `invalid_penalty`, `normalise`, `flat`;
see `docs/env-dispatch.md` and `docs/environments.md`.
`reset(options={{"episode": Episode(...)}})` plays a given episode.

## Version History
v1: users of scenarios with sessions wait for their answers before they go on. v0: sessions went on without (`docs/evaluation.md` has results of both).

`servegym/DispatchShaped-v1` is the same with `shaping="cost-to-go"`, `reward_scale="auto"`, `features="costs"`, `num_requests=1024`, `normalise`,
`flat`, `invalid_action="resample"`: what stock algorithms learn from.
"""

    batch_type = DispatchBatch
    batch: DispatchBatch


class DispatchVectorEnv(BatchVectorEnv[DispatchBatch]):
    """`num_envs` environments as `DispatchEnv`, stepped in one compiled call; see `BatchVectorEnv`."""

    batch_type = DispatchBatch
    batch: DispatchBatch
