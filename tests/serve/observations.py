"""Observations made by hand."""

from __future__ import annotations

import numpy as np

from servegym.policy.contract import (
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.policy import Observations

#: Of an H100 or so.
REPLICA = {
    "up": 1.0,
    "relative_speed": 1.0,
    "prefill_tokens_per_s": 20000.0,
    "decode_step_s": 0.01,
    "decode_seq_s": 0.0001,
    "kv_capacity_tokens": 100000.0,
    "max_num_seqs": 256.0,
    "max_num_batched_tokens": 2048.0,
}
REQUEST = {
    "prompt_tokens": 500.0,
    "predicted_output_tokens": 100.0,
    "ttft_slo_s": 2.0,
    "tpot_slo_s": 0.1,
    "slo_weight": 1.0,
    "arrival_rate_rps": 10.0,
}


def observe(
    outstanding, *, hold=False, reject=False, replica=None, request=None, **rows
) -> Observations:
    """One request before replicas with so many outstanding requests each.

    Rows are given for all replicas by feature name; `replica` and `request` change defaults.
    """
    width = len(outstanding)
    view = np.zeros((NUM_REPLICA_FEATURES, width))
    for name, value in (REPLICA | (replica or {}) | rows).items():
        view[ReplicaFeature[name.upper()]] = value
    view[ReplicaFeature["OUTSTANDING_REQUESTS"]] = outstanding
    asked = np.zeros(NUM_REQUEST_FEATURES)
    for name, value in (REQUEST | {"num_up": width} | (request or {})).items():
        asked[RequestFeature[name.upper()]] = value
    mask = np.array([*(view[0] > 0), hold, reject])
    return Observations(view[None], asked[None], mask[None])
