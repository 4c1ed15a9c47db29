"""What is known of a replica type without running it: the static rows of the observation."""

from __future__ import annotations

import numpy as np

from servegym.cluster.spec import ClusterSpec, ReplicaType
from servegym.typing import FloatArray

#: The request that relative speeds are stated for, and the batch it shares.
REFERENCE_PROMPT_TOKENS = 512
REFERENCE_OUTPUT_TOKENS = 128
REFERENCE_BATCH = 16
_SEQ_TOKENS = 1024


def nominal_facts(spec: ClusterSpec) -> FloatArray:
    """Derive each type's known rates from its cost grid.

    Args:
        spec: The cluster.

    Returns:
        `float64[T, 7]`: relative speed (fastest type 1), prefill tokens/s at a full budget,
        seconds of a step that decodes one sequence, extra seconds for each further one of 1,024
        tokens, KV tokens, `max_num_seqs`, `max_num_batched_tokens`.
    """
    facts = np.array([_facts(t, spec.block_size) for t in spec.types])
    facts[:, 0] /= facts[:, 0].max()
    return facts


def _facts(replica: ReplicaType, block_size: int) -> list[float]:
    budget = replica.max_num_batched_tokens
    one = replica.step_s([], 1, _SEQ_TOKENS)
    many = min(64, replica.max_num_seqs)
    per_seq = (replica.step_s([], many, many * _SEQ_TOKENS) - one) / max(1, many - 1)
    return [
        1.0 / reference_request_s(replica),
        budget / replica.step_s([(budget, 0)]),
        one,
        max(0.0, per_seq),
        float(replica.capacity_tokens(block_size)),
        float(replica.max_num_running),
        float(budget),
    ]


def request_alone_s(replica: ReplicaType, prompt_tokens: float, output_tokens: float) -> float:
    """Seconds that a request takes about, alone and with nothing cached."""
    budget = replica.max_num_batched_tokens
    prefill_s = prompt_tokens / budget * replica.step_s([(budget, int(prompt_tokens / 2))])
    decode_s = replica.step_s([], 1, int(prompt_tokens + output_tokens / 2))
    return prefill_s + output_tokens * decode_s


def reference_request_s(replica: ReplicaType) -> float:
    """Engine seconds that the reference request costs in a steady batch of its like."""
    batch = min(REFERENCE_BATCH, replica.max_num_seqs)
    context = REFERENCE_PROMPT_TOKENS + REFERENCE_OUTPUT_TOKENS // 2
    decode_s = replica.step_s([], batch, batch * context)
    prefill_s = replica.step_s([(REFERENCE_PROMPT_TOKENS, 0)])
    return prefill_s + REFERENCE_OUTPUT_TOKENS * decode_s / batch
