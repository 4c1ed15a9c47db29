"""What clients or the router tell about a request, in vLLM's `vllm_xargs` (`extra_args`)."""

from __future__ import annotations

import math
from typing import Any

#: Of every name that servegym reads there.
PREFIX = "servegym_"
PREDICTED_OUTPUT_TOKENS = "servegym_predicted_output_tokens"
TTFT_SLO_S = "servegym_ttft_slo_s"
E2E_SLO_S = "servegym_e2e_slo_s"


def hints(
    predicted_output_tokens: float, ttft_s: float | None, tpot_s: float | None
) -> dict[str, float]:
    """Say what is known of a request.

    Args:
        predicted_output_tokens: Its output length as predicted.
        ttft_s: Limit of its service level on the time to the first token, if there is one.
        tpot_s: Limit on the time per token after it, if there is one.
    """
    found = {PREDICTED_OUTPUT_TOKENS: predicted_output_tokens}
    if ttft_s is not None:
        found[TTFT_SLO_S] = ttft_s
        if tpot_s is not None:
            found[E2E_SLO_S] = ttft_s + tpot_s * max(0.0, predicted_output_tokens - 1.0)
    return found


def hint(request: Any, name: str) -> float | None:
    """Return a positive number that came with a request, or None.

    What is no positive number is taken for absent: it comes from outside, and a request is not
    refused for a bad hint.
    """
    params = request.sampling_params
    given = params.extra_args if params is not None else None
    value = given.get(name) if given else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value > 0 else None
