"""`servegym/Cluster-v0`: where requests go, decode and move, whom engines admit, what KV they keep."""

from __future__ import annotations

from servegym.envs.cluster_batch import ClusterBatch
from servegym.envs.migration_kernels import MOVE_FEATURES
from servegym.envs.observation import column_table
from servegym.envs.preemption_batch import ENGINE_FEATURES
from servegym.envs.retention_kernels import TIER_FEATURES, turn_features
from servegym.envs.settings import ClusterSettings
from servegym.envs.single import BatchEnv
from servegym.envs.vector import BatchVectorEnv
from servegym.policy.contract import (
    FIRST_ROLE,
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    NUM_ROLE_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
)
from servegym.policy.ordering import NUM_ORDERING_FEATURES, ORDERING_FEATURES


class ClusterEnv(BatchEnv[ClusterBatch]):
    __doc__ = f"""Dispatch the requests of a fleet, and admit and preempt them in its engines.

## Description
A router and behind it vLLM V1 engines in priority mode, simulated step by step
(`docs/simulator.md`). Each step of the environment is one decision of one agent: the dispatcher
sends a request to a replica, or the scheduler of a replica admits or preempts one of its requests.
Whoever has something to choose is asked, in the order of simulated time. One policy that is told
who asks plays them all; as agents of their own they are in `servegym.envs.cluster_v0`
(`docs/env-cluster.md`).

In a fleet in which some replicas only prefill or decode (`docs/disaggregation.md`) engines have no
orders. There the dispatcher is asked alone, and twice: to whom a request goes, and where it decodes
if that replica only prefills.

Where requests migrate (`docs/migration.md`) a controller is asked, too, whenever a replica is short of
memory: from which replica to which other one a request moves.

Where there are tiers behind the GPUs' KV (`docs/kv-tiers.md`), the scheduler of a replica is asked
what becomes of the KV of each turn that has ended there and that another request waits for.

## Action Space
`Discrete`: first the actions of `Dispatch-v1` (replicas, then *hold* and *reject* if the scenario
allows them), then those of `Preemption-v0` (rows of `requests`, then, with `allow_none`, *nobody*).
The mask allows those of the agent that is asked. Where requests are placed there are only the first;
to dispatch allows replicas that prefill, to place those that decode. Where requests migrate there are
R * R + 1 more, the last: `source * R + target`, then *nobody*. Where it is asked what becomes of KV,
behind the rows (of which there are none unless all engines are `vllm-priority`): *drop*, *leave*,
*offload* (where the replica has tiers), and *keep* for each time of `keep_s`. Actions outside `action_mask` raise
`InvalidAction` unless `invalid_action` says otherwise; `action_space.sample()` draws from those
inside.

## Observation Space
A `Dict`. Of the dispatcher: `replicas` (`float32[R, {NUM_OBSERVED_FEATURES}]`) and `request`
(`float32[{NUM_OBSERVED_REQUEST_FEATURES}]`). Of a scheduler: `requests` (`float32[max_waiting + max_num_seqs,
{NUM_ORDERING_FEATURES}]`, the waiting ones, of a longer queue the first `max_waiting` by
`queue_order`, then from row `max_waiting` on the running ones) and `engine`
(`float32[{len(ENGINE_FEATURES)}]`, the last columns of each row). What the agent that is asked does
not see is 0. Then, one of them 1 and the others 0, `kind` (to dispatch, to admit, to preempt) and
`agent` (the dispatcher, the scheduler of each replica), and `action_mask` (`int8`, 1 is allowed).
All in raw units. Where requests are placed, `replicas` has {NUM_ROLE_FEATURES} columns more, `kind` is to dispatch
or to place, and there are no `requests`, `engine` and `agent`. Where requests migrate there are `moves`
(`float32[R, {len(MOVE_FEATURES)}]`), of the controller, and one more number in `kind` and `agent`, the last; and no
`requests` and `engine` unless all engines are `vllm-priority`. Where it is asked what becomes of KV there are,
of the scheduler that is asked, `turn` (`float32[{len(turn_features(ClusterSettings.keep_s))}]`, one number more or less for each time of `keep_s`) and
`tiers` (`float32[{len(TIER_FEATURES)}]`), and one more number in `kind`, the last.

Columns of `replicas`:

{column_table(REPLICA_FEATURES[:NUM_OBSERVED_FEATURES], "Feature")}

Where requests are placed, behind these:

{column_table(REPLICA_FEATURES[FIRST_ROLE:], "Feature", NUM_OBSERVED_FEATURES)}

Of `moves`:

{column_table(MOVE_FEATURES, "Feature")}

Of `turn`:

{column_table(turn_features(ClusterSettings.keep_s), "Feature")}

Of `tiers`, all of the replica that is asked:

{column_table(TIER_FEATURES, "Feature")}

Of `request`:

{column_table(REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES], "Feature")}

Of `requests`:

{column_table(ORDERING_FEATURES, "Feature")}

## Rewards
`latency`: minus the integral of the requests in the system since the last decision, so the sum over
an episode is exactly minus the sum of all times in the system. `goodput`: the weight of the requests
that ended within all their limits since then. Both divided by `reward_scale`. Decisions are not
evenly spaced: `info["dt_s"]` is the time since the last.

## Starting State
The first request of an episode drawn from the scenario has arrived.

## Episode End
Terminated when all requests have ended: after the last decision the fleet is run dry, and what
happens then is rewarded in the last step. With `episode_end="last-arrival"` truncated at the first
decision after the last arrival instead.

## Arguments
`scenario` (name, path or `Scenario`, of two replicas or more, all with `engine: vllm-priority` or
some with a `role`, or with `migration`, or with tiers of KV), `num_requests`; `retention` (whether it is
asked what becomes of KV; where there are tiers if not given) and `keep_s` (times to keep it for, seconds); of schedulers `max_waiting`, `queue_order` (`shortest` by
predicted tokens left, or `arrival`) and `allow_none`; `load` (factor on the arrival rate, or a range drawn per episode), `objective`,
`reward_scale`, `shaping`, `warmup`, `episode_end`, `invalid_action` and `invalid_penalty`,
`normalise`, `flat`; see `docs/env-cluster.md` and `docs/environments.md`.
`reset(options={{"episode": Episode(...)}})` plays a given episode.

## Version History
v0: first version.

`servegym/ClusterShaped-v0` is the same with `shaping="cost-to-go"`, `reward_scale="auto"`, `normalise`, `flat`, `invalid_action="resample"`.
"""

    batch_type = ClusterBatch
    batch: ClusterBatch


class ClusterVectorEnv(BatchVectorEnv[ClusterBatch]):
    """`num_envs` environments as `ClusterEnv`, stepped in one compiled call; see `BatchVectorEnv`.

    A row of the batch is one agent's decision in one environment: learners whose agents share
    parameters take it as it is, and are told by `agent` and `kind` whose it is.
    """

    batch_type = ClusterBatch
    batch: ClusterBatch
