"""One request on its way, as a router that dispatches it keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request on its way.

    Attributes:
        key: Names it; the canary's share is drawn by it.
        arrival_s: When it arrived, on the state's clock.
        prompt_tokens: Length of the prompt, known or estimated.
        predicted_output_tokens: As predicted.
        slo_class: Index of its service level.
        replica: Where it is, -1: nowhere.
        dispatch_s: Last dispatch, NaN before.
        first_token_s: First token, NaN before.
        generated_tokens: Output tokens seen so far.
        expected_tokens: Output tokens that are expected of it, 0: nobody has asked.
        held: Whether it is on hold.
    """

    key: str
    arrival_s: float
    prompt_tokens: float
    predicted_output_tokens: float
    slo_class: int
    replica: int = -1
    dispatch_s: float = math.nan
    first_token_s: float = math.nan
    generated_tokens: int = 0
    expected_tokens: float = 0.0
    held: bool = False
    is_decoding: bool = False  # tokens have come from where it is
    believed_cached: float = 0.0  # prompt tokens, at dispatch
    prefill_is_pending: bool = False
