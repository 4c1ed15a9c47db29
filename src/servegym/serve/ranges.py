"""How far an observation is from what training has shown."""

from __future__ import annotations

import numpy as np

from servegym.export.manifest import Manifest
from servegym.policy.contract import (
    FIRST_NOMINAL,
    NUM_NOMINAL,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    UP,
    observed,
)
from servegym.policy.policy import Observations
from servegym.typing import FloatArray

#: Differences that never matter, in the feature's unit. Where training kept a feature still, such
#: as the waiting time of requests that were never held, a range has no width to go by.
_UNIMPORTANT = {
    "outstanding_requests": 4.0,
    "outstanding_prompt_tokens": 2048.0,
    "pending_prefill_tokens": 2048.0,
    "outstanding_predicted_tokens": 1024.0,
    "recent_ttft_s": 0.5,
    "recent_tpot_s": 0.02,
    "since_dispatch_s": 10.0,
    "num_running": 4.0,
    "num_waiting": 4.0,
    "kv_cache_usage": 0.2,
    "generated_tokens": 1024.0,
    "metrics_age_s": 1.0,
    "prefix_hit_tokens": 512.0,
    "prompt_tokens": 512.0,
    "predicted_output_tokens": 256.0,
    "waited_s": 1.0,
    "arrival_rate_rps": 1.0,
    "num_up": 2.0,
    "num_held": 4.0,
    "step_time_ratio": 0.5,
    "recent_itl_s": 0.02,
    "expected_tokens_left": 1024.0,
    "outstanding_as_tight": 4.0,
    "pushed_over_40": 4.0,
    "pushed_over_50": 4.0,
    "pushed_over_60": 4.0,
    "pushed_over_80": 4.0,
    "pushed_over_100": 4.0,
    "expected_tokens": 256.0,
    "expected_tokens_spread": 0.5,
}
#: Of its value, where the width of a range is less.
_RELATIVE = 0.1


def _names(*, extended: bool) -> list[str]:
    shape = observed(extended=extended)
    shown = (*REPLICA_FEATURES[: shape.replicas], *REQUEST_FEATURES[: shape.request])
    return [feature.name for feature in shown]


class Ranges:
    """The values that are not far from training.

    Args:
        low: Smallest of each feature, replicas' then request's, `float64[F + G]`.
        high: Largest, the same.
        extended: Whether what is inferred is among them.
    """

    def __init__(self, low: FloatArray, high: FloatArray, *, extended: bool = False) -> None:
        middle, half = (low + high) / 2.0, (high - low) / 2.0
        num_rows = observed(extended=extended).replicas
        self._names, self._num_rows = _names(extended=extended), num_rows
        self._middle, self._half = middle[:num_rows, None], half[:num_rows, None]
        self._request_middle, self._request_half = middle[num_rows:], half[num_rows:]

    @classmethod
    def of(cls, manifest: Manifest, margin: float) -> Ranges | None:
        """Widen the ranges of a manifest, `None` if it states none.

        Args:
            manifest: Of the policy; its ranges leave out 2 % of the values of training.
            margin: Widths of its range that a feature may be outside of it.
        """
        known = [manifest.ranges.get(group, ()) for group in ("replicas", "request")]
        if not all(known):
            return None
        ranges = np.array([*known[0], *known[1]], np.float64)
        low, high = ranges[:, 0], ranges[:, 1]
        extended = manifest.extended
        least = np.array([_UNIMPORTANT.get(name, 0.0) for name in _names(extended=extended)])
        width = np.maximum(high - low, _RELATIVE * np.maximum(np.abs(low), np.abs(high)))
        width = np.maximum(width, least)
        return cls(low - margin * width, high + margin * width, extended=extended)

    def far(self, observations: Observations) -> list[str]:
        """Return the features that are far from training, at any replica that is up.

        Args:
            observations: A batch of one.
        """
        replicas = observations.replicas[0]
        away = np.abs(replicas[: self._num_rows] - self._middle)
        asked = observations.request[0, : len(self._request_middle)]
        away_request = np.abs(asked - self._request_middle)
        near = away <= self._half
        near_request = away_request <= self._request_half
        if near.all() and near_request.all():  # as a rule
            return []
        far = ~(near | (replicas[UP] <= 0.0)).all(1)
        rows = np.flatnonzero(np.concatenate((far, ~near_request)))
        return [self._names[row] for row in rows.tolist()]

    def far_facts(self, fleet: FloatArray) -> list[str]:
        """Return the static features that are far from training at any replica of a fleet.

        Args:
            fleet: Replica rows, `float64[NUM_REPLICA_FEATURES, R]`. A fact of 0 is not yet known.
        """
        rows = slice(FIRST_NOMINAL, FIRST_NOMINAL + NUM_NOMINAL)
        facts = fleet[rows]
        near = (np.abs(facts - self._middle[rows]) <= self._half[rows]) | (facts == 0.0)
        return [self._names[FIRST_NOMINAL + row] for row in np.flatnonzero(~near.all(1)).tolist()]
