"""llm-d's decider: prefilled elsewhere only if enough of the prompt is not cached where it decodes.

llm-d chooses the decode pod first, by its scores, and then says whether somebody else prefills.
Here the dispatch comes first: this rule finds the pod that would decode, and if the answer is yes,
the highest score of those that only prefill. Where it decodes is chosen again, by the same scores,
when it is placed: at once if memory is set aside at the destination first, else after the prefill.
A pod that only decodes cannot say no.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import no_replica
from servegym.baselines.llm_d import (
    ALLOWED,
    DECODING,
    PREFILLING,
    SCORER_PARAMETERS,
    highest_score,
)
from servegym.policy.contract import PREFIX_HIT_TOKENS, PROMPT_TOKENS, Group
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: Places of the decider's parameters, behind those of the scorers.
NON_CACHED = len(SCORER_PARAMETERS)
SHORTEST = NON_CACHED + 1


@rule
def decide(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `policy.rule`."""
    at = highest_score(replicas, request, mask, params, rng, DECODING)
    if at >= 0 and mask[at]:
        prompt = request[PROMPT_TOKENS]
        uncached = prompt - replicas[PREFIX_HIT_TOKENS, at]
        enough = params[NON_CACHED]
        if enough == 0.0 or uncached < enough or prompt < params[SHORTEST]:
            return at
    best = highest_score(replicas, request, mask, params, rng, PREFILLING)
    if best < 0:
        best = highest_score(replicas, request, mask, params, rng, ALLOWED)
    return best if best >= 0 else no_replica(mask)


def llm_d_pd(
    queue: float = 2.0,
    kv: float = 2.0,
    prefix: float = 3.0,
    load: float = 0.0,
    running: float = 0.0,
    active: float = 0.0,
    load_threshold: float = 128.0,
    idle: float = 0.0,
    busy: float = 1.0,
    drawn: float = 0.0,
    non_cached_tokens: float = 8.0,
    prompt_tokens: float = 0.0,
) -> Heuristic:
    """llm-d's decider: prefilled elsewhere from so many tokens on that are not cached there."""
    scores = [queue, kv, prefix, load, running, active, load_threshold, idle, busy, drawn]
    return Heuristic(
        name="llm-d-pd",
        information="metric",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX | Group.ROLES,
        decide=decide,
        params=np.array([*scores, non_cached_tokens, prompt_tokens], np.float64),
        param_names=(*SCORER_PARAMETERS, "non_cached_tokens", "prompt_tokens"),
        reference="llm-d inference scheduler, prefix-based PD decider",
    )
