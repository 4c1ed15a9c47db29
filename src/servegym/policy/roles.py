"""Who prefills, who decodes, and what is on its way between them: the features of `Group.ROLES`."""

from __future__ import annotations

from numba import types

from servegym.cluster.entry import SEE_ROLES, entry
from servegym.cluster.state import (
    DECODE_ONLY,
    OBSERVED_ARRIVING_TOKENS,
    OBSERVED_DECODES,
    OBSERVED_HAS_PREFILL,
    OBSERVED_KV_TOKENS_PER_S,
    OBSERVED_LINK_BUSY_S,
    OBSERVED_NUM_HOLDING,
    OBSERVED_PREFILLS,
    PREFILL_ONLY,
    Params,
    State,
)
from servegym.cluster.transfers import is_prefilled_elsewhere
from servegym.policy.contract import NO_BOUND


@entry(SEE_ROLES, types.void, types.int64)
def see_roles(p: Params, s: State, e: int) -> None:
    """Fill the rows about roles of `s.observation[e]` for the dispatch or placing that is due."""
    env, rows = s.env[e], s.observation[e]
    for r in range(env.num_replicas):
        v, k = s.replica[e, r], s.link[e, r]
        role = p.role[v.type_idx]
        rows[OBSERVED_PREFILLS, r] = role != DECODE_ONLY
        rows[OBSERVED_DECODES, r] = role != PREFILL_ONLY
        rows[OBSERVED_HAS_PREFILL, r] = 0.0
        if not p.disaggregated and p.balancing_threshold == 0.0:
            continue
        rate = NO_BOUND  # of KV without bytes, too
        if p.kv_block_bytes > 0.0:
            token_bytes = p.kv_block_bytes / p.block_size
            rate = min(rate, p.link_bytes_per_s[v.type_idx] / token_bytes)
        rows[OBSERVED_KV_TOKENS_PER_S, r] = rate
        rows[OBSERVED_NUM_HOLDING, r] = k.num_holding
        free_s = max(k.out_free_s, k.in_free_s)
        rows[OBSERVED_LINK_BUSY_S, r] = max(0.0, free_s - env.now_s)
        tokens = 0
        i = k.first_remote
        while i >= 0:
            tokens += s.request[e, i].prompt
            i = s.request[e, i].next_request
        i = v.wait_head
        while i >= 0:
            if is_prefilled_elsewhere(s, e, i):
                tokens += s.request[e, i].prompt
            i = s.request[e, i].next_request
        rows[OBSERVED_ARRIVING_TOKENS, r] = tokens
    if p.disaggregated and env.deciding >= 0:
        t = s.transfer[e, env.deciding]
        at = t.source if t.source >= 0 else t.prefill_on
        if at >= 0:
            rows[OBSERVED_HAS_PREFILL, at] = 1.0
