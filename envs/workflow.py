"""`servegym/Workflow-v0`: which ready stage of the jobs in the system starts where."""

from __future__ import annotations

from servegym.envs.observation import column_table
from servegym.envs.single import BatchEnv
from servegym.envs.vector import BatchVectorEnv
from servegym.envs.workflow_batch import WorkflowBatch
from servegym.envs.workflow_features import (
    DEVICE_COLUMNS,
    GLOBAL_COLUMNS,
    NODE_COLUMNS,
    PAIR_COLUMNS,
    STAGE_COLUMNS,
)


class WorkflowEnv(BatchEnv[WorkflowBatch]):
    __doc__ = f"""Schedule the stages of jobs that arrive over time on heterogeneous devices.

## Description
Jobs are DAGs of tasks, LLM requests and tool calls. Each step is one decision: a stage that is ready
can start on a device with a free slot. See `docs/workflow-online.md` for the simulator.

## Action Space
`Discrete(K * D + 1)`: action `k * D + d` starts the stage of row k on device d, the last action waits
until something has happened. With `placement="eft"`, `Discrete(K + 1)`: the stage of row k starts where
it is expected to end first. Actions outside `action_mask` raise `InvalidAction` unless
`invalid_action` says otherwise; `action_space.sample()` draws from those that are allowed.

## Observation Space
A `Dict` with `stages` (`float32[K, {len(STAGE_COLUMNS)}]`), `pairs` (`float32[K, D, {len(PAIR_COLUMNS)}]`),
`devices` (`float32[D, {len(DEVICE_COLUMNS)}]`), `global` (`float32[{len(GLOBAL_COLUMNS)}]`) and `action_mask`
(`int8`, 1 is allowed), in raw units; absent rows are 0. K is `max_stages`: of the stages that can start,
those of the first order by `shortlist`; D is the largest fleet of the scenario. With `graph=True` also the
known stages of all jobs in the system that have not ended, in order of arrival: `nodes`
(`float32[max_nodes, {len(NODE_COLUMNS)}]`), `edges` (`int32[max_edges, 2]`, parent and child as rows of `nodes`),
`node_mask`, `edge_mask` (`int8`) and `stage_nodes` (`int64[K]`, the row of each stage shown, -1: none).

Columns of `stages`:

{column_table(STAGE_COLUMNS, "Column")}

Columns of `pairs`:

{column_table(PAIR_COLUMNS, "Column")}

Columns of `devices`:

{column_table(DEVICE_COLUMNS, "Column")}

Entries of `global`:

{column_table(GLOBAL_COLUMNS, "Column")}

Columns of `nodes`:

{column_table(NODE_COLUMNS, "Column")}

## Rewards
`jct`: minus the integral of the weights of the jobs in the system since the last decision, so the sum over an
episode is exactly minus the weighted sum of all times in the system. `makespan`: minus the increase of a lower
bound on when the jobs that have arrived can end (each longest way on the fastest devices), so the sum is the
first bound minus the end of the last job. `deadline`: the weight of the jobs that ended in time since the last
decision. All divided by `reward_scale`.

## Starting State
The first decision of an episode drawn from the scenario, all devices idle.

## Episode End
Terminated when all jobs have ended: after the last decision the fleet is run dry, and what happens then is
rewarded in the last step. With
`episode_end="last-arrival"` truncated at the first decision after the last arrival instead.

## Arguments
`scenario` (name, path or `WorkflowScenario`), `num_jobs` (a number, or a range drawn per episode), `max_stages`,
`placement` (`agent`, `eft`), `shortlist` (`work-left`, `arrival`, `rank`, `slack`), `graph`, `max_nodes`,
`max_edges`. Episodes draw their jobs from a pool of `pool_size` jobs that `pool_seed` makes; with
`pool_size=None` every episode has new ones, which takes time to draw;
`load` (factor on the arrival rate, or a range drawn per episode), `objective`, `reward_scale`,
`shaping`, `warmup`, `episode_end`, `invalid_action` and `invalid_penalty`, `normalise`, `flat`;
see `docs/env-workflow.md` and `docs/environments.md`.
`reset(options={{"episode": Episode(...)}})` plays a given episode.

## Version History
v0: first version.

`servegym/WorkflowShaped-v0` is the same with `shaping="cost-to-go"`, `reward_scale="auto"`, `normalise`, `flat`, `invalid_action="resample"`.
"""

    batch_type = WorkflowBatch
    batch: WorkflowBatch


class WorkflowVectorEnv(BatchVectorEnv[WorkflowBatch]):
    """`num_envs` environments as `WorkflowEnv`, stepped in one compiled call; see `BatchVectorEnv`."""

    batch_type = WorkflowBatch
    batch: WorkflowBatch
