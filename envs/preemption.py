"""`servegym/Preemption-v0`: whom an engine admits next, whom it preempts."""

from __future__ import annotations

from servegym.envs.observation import column_table
from servegym.envs.preemption_batch import ENGINE_FEATURES, PreemptionBatch
from servegym.envs.single import BatchEnv
from servegym.envs.vector import BatchVectorEnv
from servegym.policy.ordering import NUM_ORDERING_FEATURES, ORDERING_FEATURES


class PreemptionEnv(BatchEnv[PreemptionBatch]):
    __doc__ = f"""Admit and preempt the requests of one engine.

## Description
vLLM V1 in priority mode, simulated step by step (`docs/simulator.md`). Each step of the
environment is one choice: an engine with a free slot and room for one of several waiting requests
asks whom to admit next; an engine whose running requests want more KV blocks than are free asks
whom to preempt. Where there is nothing to choose nobody is asked. What is learned can be
exported as an order and run in vLLM; see `docs/preemption.md`.

## Action Space
`Discrete`: the rows of `requests`, then, with `allow_none`, *nobody* (only to admit, and while
others run). To admit a request that does not fit ends admission in this engine step, as the head
of vLLM's queue does. Actions outside `action_mask` raise `InvalidAction` unless
`invalid_action` says otherwise; `action_space.sample()` draws from those inside.

## Observation Space
A `Dict` with `requests` (`float32[max_waiting + max_num_seqs, {NUM_ORDERING_FEATURES}]`: the
waiting ones, of a longer queue the first `max_waiting` by `queue_order`, then from row
`max_waiting` on the running ones; rows of absent requests are 0), `engine`
(`float32[{len(ENGINE_FEATURES)}]`, the last columns of each row), `kind` (0 to admit, 1 to preempt)
and `action_mask` (`int8`, 1 is allowed), in raw units.

Columns of `requests`:

{column_table(ORDERING_FEATURES, "Feature")}

## Rewards
`latency`: minus the integral of the requests in the system since the last choice, at first since
the beginning, so the sum over an episode is exactly minus the sum of all times in the system.
`goodput`: the weight of the requests that ended within all their limits since then. Both divided
by `reward_scale`. Choices are not evenly spaced, and several may fall into one instant:
`info["dt_s"]` is the time since the last.

## Starting State
The first choice of an episode drawn from the scenario; episodes without any are passed over.

## Episode End
Terminated when all requests have ended: after the last choice the engine is run dry, and what
happens then is rewarded in the last step. With
`episode_end="last-arrival"` truncated at the first decision after the last arrival instead.

## Arguments
`scenario` (name, path or `Scenario`, of one replica with `engine: vllm-priority`), `num_requests`,
`max_waiting`, `queue_order` (`shortest` by predicted tokens left, or `arrival`), `allow_none`;
`load` (factor on the arrival rate, or a range drawn per episode), `objective`, `reward_scale`,
`shaping`, `warmup`, `episode_end`, `invalid_action` and `invalid_penalty`, `normalise`, `flat`;
see `docs/env-preemption.md` and `docs/environments.md`.
`reset(options={{"episode": Episode(...)}})` plays a given episode.

## Version History
v0: first version.

`servegym/PreemptionShaped-v0` is the same with `shaping="cost-to-go"`, `reward_scale="auto"`, `normalise`, `flat`, `invalid_action="resample"`.
"""

    batch_type = PreemptionBatch
    batch: PreemptionBatch


class PreemptionVectorEnv(BatchVectorEnv[PreemptionBatch]):
    """`num_envs` environments as `PreemptionEnv`, stepped in one compiled call; see `BatchVectorEnv`."""

    batch_type = PreemptionBatch
    batch: PreemptionBatch
