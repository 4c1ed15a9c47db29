"""What a choice costs, replica by replica: an observation that small networks learn from.

The contract's features are physical, over six orders of magnitude; what matters to a dispatcher are
products and quotients of them, which a multilayer perceptron must find first. Here they are formed:
seconds that the choice costs the request and the others there, and shares of what there is.
"""

from __future__ import annotations

import numpy as np

from servegym.policy.contract import Feature, Group, ReplicaFeature, RequestFeature
from servegym.policy.costs import added_delay_s, delay_s, step_s
from servegym.typing import Float32Array

#: Seconds are shown as log(1 + x / first) / log(1 + last / first), at most 1.
_FIRST_S, _LAST_S = 0.1, 200.0
#: Times the least cost beyond which one is as good as another: as bad as can be.
_MOST = 4.0


def _share(name: str, group: Group, meaning: str) -> Feature:
    return Feature(name, 0.0, 1.0, "-", group, meaning)


#: Columns of the observation, all within 0 to 1.
COST_FEATURES: tuple[Feature, ...] = (
    _share("up", Group.COUNTERS, "1 if the replica takes requests"),
    _share("seats", Group.COUNTERS, "outstanding requests over `max_num_seqs`, at most 1"),
    _share("kv_cache_usage", Group.METRICS, "share of KV blocks held"),
    _share("queue", Group.COUNTERS, "seconds of prefill that wait there, logarithmic"),
    _share("prefill", Group.PREFIX, "seconds of this request's prefill less the prefix hit"),
    _share("decode", Group.COUNTERS, "seconds to decode its predicted tokens beside the others"),
    _share("delay", Group.PREFIX, "seconds that it delays the others, all together"),
    _share("cost", Group.PREFIX, "sum of these seconds: what rule `added-delay` minimises"),
    _share("excess", Group.PREFIX, "that cost against the least of any replica: 1 at 4 times it"),
    _share("ttft", Group.PREFIX, "half of expected TTFT over its limit, at most 1"),
    _share("tpot", Group.COUNTERS, "half of expected TPOT over its limit, at most 1"),
)

_R = {f.name: int(f) for f in ReplicaFeature}
_Q = {f.name: int(f) for f in RequestFeature}


def cost_features(replicas: Float32Array, request: Float32Array) -> Float32Array:
    """Form the costs of all choices.

    Args:
        replicas: Raw features, `float32[num_envs, R, NUM_OBSERVED_FEATURES]`.
        request: Raw features, `float32[num_envs, NUM_OBSERVED_REQUEST_FEATURES]`.

    Returns:
        `float32[num_envs, R, len(COST_FEATURES)]`; rows of absent replicas are 0.
    """

    def column(name: str) -> Float32Array:
        found: Float32Array = replicas[..., _R[name]]
        return found

    def entry(name: str) -> Float32Array:
        found: Float32Array = request[:, _Q[name], None]
        return found

    others = column("OUTSTANDING_REQUESTS")
    rate = np.maximum(column("PREFILL_TOKENS_PER_S"), 1.0)
    predicted, seq_s = entry("PREDICTED_OUTPUT_TOKENS"), column("DECODE_SEQ_S")
    queue_s = column("PENDING_PREFILL_TOKENS") / rate
    prefill_s = np.maximum(entry("PROMPT_TOKENS") - column("PREFIX_HIT_TOKENS"), 0.0) / rate
    each_s = step_s(column("DECODE_STEP_S"), seq_s, others)
    decode_s = predicted * each_s
    others_s = delay_s(others, prefill_s, seq_s, predicted)
    cost_s = added_delay_s(queue_s, prefill_s, decode_s, others_s)
    up = column("UP") > 0.0
    least_s = np.where(up, cost_s, np.inf).min(-1, keepdims=True)
    seconds = np.stack([queue_s, prefill_s, decode_s, others_s, cost_s], -1)
    found = np.empty((*others.shape, len(COST_FEATURES)), np.float32)
    found[..., 0] = column("UP")
    found[..., 1] = others / np.maximum(column("MAX_NUM_SEQS"), 1.0)
    found[..., 2] = column("KV_CACHE_USAGE")
    found[..., 3:8] = np.log1p(seconds / _FIRST_S) / np.log1p(_LAST_S / _FIRST_S)
    found[..., 8] = np.log(np.maximum(cost_s, 1e-9) / np.clip(least_s, 1e-9, 1e9)) / np.log(_MOST)
    found[..., 9] = (
        0.5 * (entry("WAITED_S") + queue_s + prefill_s) / np.maximum(entry("TTFT_SLO_S"), 1e-3)
    )
    found[..., 10] = 0.5 * each_s / np.maximum(entry("TPOT_SLO_S"), 1e-4)
    np.clip(found, 0.0, 1.0, out=found)
    found *= up[..., None]
    return found
