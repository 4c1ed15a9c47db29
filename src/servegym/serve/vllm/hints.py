"""What clients or the router tell about a request, in vLLM's `vllm_xargs` (`extra_args`)."""

from __future__ import annotations

import math
from typing import Any

PREDICTED_OUTPUT_TOKENS = "servegym_predicted_output_tokens"
TTFT_SLO_S = "servegym_ttft_slo_s"
E2E_SLO_S = "servegym_e2e_slo_s"


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
