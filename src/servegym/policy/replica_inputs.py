"""Inputs of the dispatchers' network in compiled code, for searches that play whole episodes.

The same numbers as `agents.features.replica_inputs` makes of a plain observation or an extended
one, in its order; tests hold them equal.
"""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    ARRIVAL_RATE_RPS,
    DECODE_SEQ_S,
    DECODE_STEP_S,
    EXPECTED_TOKENS,
    EXPECTED_TOKENS_LEFT,
    EXPECTED_TOKENS_SPREAD,
    GENERATED_TOKENS,
    KV_CACHE_USAGE,
    KV_CAPACITY_TOKENS,
    MARGINS,
    MAX_NUM_SEQS,
    METRICS_AGE_S,
    NUM_HELD,
    NUM_RUNNING,
    NUM_WAITING,
    OUTSTANDING_AS_TIGHT,
    OUTSTANDING_PREDICTED_TOKENS,
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    PUSHED_OVER_40,
    RECENT_ITL_S,
    RECENT_TPOT_S,
    RECENT_TTFT_S,
    RELATIVE_SPEED,
    SINCE_DISPATCH_S,
    STEP_TIME_RATIO,
    TPOT_SLO_S,
    TTFT_SLO_S,
    UP,
    WAITED_S,
)
from servegym.policy.costs import step_s
from servegym.policy.numpy_network import num_inputs
from servegym.typing import FloatArray

#: How many a replica has, and with those of what a router infers.
NUM_INPUTS, NUM_EXTENDED_INPUTS = num_inputs(extended=False), num_inputs(extended=True)
#: And where the network decides about holds.
NUM_HELD_INPUTS = num_inputs(extended=True, holds=True)
#: Of the inputs of what a router infers, those that learnt lengths alone make.
LENGTH_INPUTS = (27, 28, 31)
#: Of the outstanding requests: their logarithm, and their share of the slots; and of the share of
#: KV blocks in use.
OUTSTANDING_INPUT, OUTSTANDING_SHARE_INPUT, KV_USAGE_INPUT = 0, 1, 11


@inlined
def write_inputs(replicas: FloatArray, request: FloatArray, r: int, out: FloatArray) -> None:
    """Write what the network reads of one replica.

    Args:
        replicas: Features, `float64[>= NUM_OBSERVED_FEATURES, R]`.
        request: Features, `float64[>= NUM_OBSERVED_REQUEST_FEATURES]`.
        r: The replica.
        out: `float64[NUM_INPUTS]`.
    """
    outstanding = replicas[OUTSTANDING_REQUESTS, r]
    rate = max(replicas[PREFILL_TOKENS_PER_S, r], 1.0)
    max_seqs = max(replicas[MAX_NUM_SEQS, r], 1.0)
    capacity = max(replicas[KV_CAPACITY_TOKENS, r], 1.0)
    prompt, predicted = request[PROMPT_TOKENS], request[PREDICTED_OUTPUT_TOKENS]
    hit, seq_s = replicas[PREFIX_HIT_TOKENS, r], replicas[DECODE_SEQ_S, r]
    pending_s = replicas[PENDING_PREFILL_TOKENS, r] / rate
    new_s = max(prompt - hit, 0.0) / rate
    batch = min(outstanding + 1.0, max_seqs)
    each_s = step_s(replicas[DECODE_STEP_S, r], seq_s, batch - 1.0)
    left = max(replicas[OUTSTANDING_PREDICTED_TOKENS, r] - replicas[GENERATED_TOKENS, r], 0.0)
    out[0] = math.log1p(outstanding)
    out[1] = outstanding / max_seqs
    out[2] = math.log1p(10.0 * pending_s)
    out[3] = math.log1p(10.0 * new_s)
    out[4] = math.log1p(left / batch * each_s)
    out[5] = math.log1p(10.0 * predicted * each_s) - 3.0
    out[6] = hit / max(prompt, 1.0)
    out[7] = 100.0 * replicas[DECODE_STEP_S, r]
    out[8] = replicas[RELATIVE_SPEED, r]
    out[9] = math.log1p(replicas[NUM_WAITING, r])
    out[10] = replicas[NUM_RUNNING, r] / max_seqs
    out[11] = replicas[KV_CACHE_USAGE, r]
    out[12] = replicas[OUTSTANDING_PROMPT_TOKENS, r] / capacity
    out[13] = (prompt + predicted) / capacity
    out[14] = math.log1p(10.0 * replicas[RECENT_TTFT_S, r])
    out[15] = math.log1p(100.0 * replicas[RECENT_TPOT_S, r])
    out[16] = min(math.log1p(replicas[SINCE_DISPATCH_S, r]), 3.0)
    out[17] = min(replicas[METRICS_AGE_S, r], 2.0)
    out[18] = min((pending_s + new_s) / max(request[TTFT_SLO_S], 1e-3), 4.0)
    out[19] = min(each_s / max(request[TPOT_SLO_S], 1e-4), 4.0)
    out[20] = math.log1p(outstanding * new_s)
    out[21] = math.log1p(outstanding * seq_s * predicted)
    out[22] = math.log1p(pending_s + new_s + predicted * each_s) - 1.0
    out[23] = math.log1p(prompt) - 6.0
    out[24] = math.log1p(predicted) - 5.0


@inlined
def write_inferred_inputs(
    replicas: FloatArray, request: FloatArray, r: int, out: FloatArray
) -> None:
    """Write what the network reads besides where it sees what a router infers.

    Args:
        replicas: Features, `float64[>= NUM_EXTENDED_FEATURES, R]`.
        request: Features, `float64[G]`.
        r: The replica.
        out: `float64[NUM_EXTENDED_INPUTS]`, of which those after `NUM_INPUTS` are written.
    """
    outstanding, seq_s = replicas[OUTSTANDING_REQUESTS, r], replicas[DECODE_SEQ_S, r]
    batch = min(outstanding + 1.0, max(replicas[MAX_NUM_SEQS, r], 1.0))
    each_s = step_s(replicas[DECODE_STEP_S, r], seq_s, batch - 1.0)
    itl_s, expected = replicas[RECENT_ITL_S, r], request[EXPECTED_TOKENS]
    out[25] = math.log(min(max(replicas[STEP_TIME_RATIO, r], 0.05), 20.0))
    out[26] = min(itl_s / max(request[TPOT_SLO_S], 1e-4), 4.0)
    out[27] = min(request[EXPECTED_TOKENS_SPREAD], 4.0)
    out[28] = math.log1p(expected) - 5.0
    out[29] = math.log1p(100.0 * itl_s)
    out[30] = math.log1p(replicas[EXPECTED_TOKENS_LEFT, r] / batch * each_s)
    out[31] = math.log1p(outstanding * seq_s * expected)
    out[32] = math.log1p(replicas[OUTSTANDING_AS_TIGHT, r])
    for k in range(len(MARGINS)):
        out[33 + k] = math.log1p(replicas[PUSHED_OVER_40 + k, r])


@inlined
def write_router_inputs(replicas: FloatArray, request: FloatArray, out: FloatArray) -> None:
    """Write what a network that decides about holds reads besides, the same for all replicas.

    Args:
        replicas: Features, `float64[>= NUM_OBSERVED_FEATURES, R]`.
        request: Features, `float64[>= NUM_OBSERVED_REQUEST_FEATURES]`.
        out: `float64[NUM_HELD_INPUTS]`, of which those after `NUM_EXTENDED_INPUTS` are written.
    """
    count, prompts, outputs, prefill_rate, decode_rate = 1.0, 0.0, 0.0, 0.0, 0.0
    for r in range(replicas.shape[1]):
        if replicas[UP, r] > 0.0:
            count += replicas[OUTSTANDING_REQUESTS, r]
            prompts += replicas[OUTSTANDING_PROMPT_TOKENS, r]
            outputs += replicas[OUTSTANDING_PREDICTED_TOKENS, r]
            prefill_rate += replicas[PREFILL_TOKENS_PER_S, r]
            decode_rate += 1.0 / max(replicas[DECODE_SEQ_S, r], 1e-6)
    rate_rps = request[ARRIVAL_RATE_RPS]
    prompt = (prompts + request[PROMPT_TOKENS]) / count
    output = (outputs + request[PREDICTED_OUTPUT_TOKENS]) / count
    out[38] = min(rate_rps * prompt / max(prefill_rate, 1.0), 4.0)
    out[39] = min(rate_rps * output / max(decode_rate, 1.0), 4.0)
    out[40] = math.log1p(request[NUM_HELD])
    out[41] = math.log1p(request[WAITED_S])
