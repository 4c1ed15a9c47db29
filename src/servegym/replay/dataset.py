"""A decision log as an offline data set: what was seen, what was done, what came of it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.errors import WorkloadError
from servegym.policy.contract import NUM_OBSERVED_FEATURES, NUM_OBSERVED_REQUEST_FEATURES
from servegym.replay.rows import STATUSES, logged_rows, parse_row
from servegym.serve.decision_log import mask_action
from servegym.typing import BoolArray, Float32Array, FloatArray, IntArray
from servegym.whole_files import write_whole
from servegym.workloads.readers import OnBadRow


class OfflineDataset(NamedTuple):
    """One row a decision, in order of time; requests that were held or retried have several.

    Attributes:
        replicas: `float32[n, F, R]`, rows of `policy.contract.REPLICA_FEATURES` that are observed;
            columns beyond a fleet's size are 0.
        request: `float32[n, G]`.
        mask: Allowed actions: replicas, hold, reject, `bool[n, R + 2]`.
        action: Index into the mask, `int64[n]`.
        proposed: What the policy answered, whether or not it was acted on, likewise; `NOT_ASKED`
            (-1) where it was not asked, `int64[n]`.
        propensity: Probability with which the action was taken, NaN where the log does not say:
            rules and exported policies decide without chance, `float64[n]`.
        by_policy: Whether the policy decided, not the fallback, `bool[n]`.
        request_id: Row of the request among those of the log by arrival, `int64[n]`.
        is_last: Whether the request's fate was that of this decision, `bool[n]`.
        time_s: Of the decision, since the first arrival, `float64[n]`.
        status: Of the request, index into `replay.rows.STATUSES`, `int64[n]`.
        ttft_s: Of the request from its arrival, NaN if none, `float64[n]`.
        tpot_s: Likewise.
        e2e_s: Likewise, of finished requests.
        output_tokens: Of the request; as expected where it did not finish, `int64[n]`.
        num_skipped: Malformed rows, and decisions logged without what they saw.
    """

    replicas: Float32Array
    request: Float32Array
    mask: BoolArray
    action: IntArray
    proposed: IntArray
    propensity: FloatArray
    by_policy: BoolArray
    request_id: IntArray
    is_last: BoolArray
    time_s: FloatArray
    status: IntArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray
    output_tokens: IntArray
    num_skipped: int

    def __len__(self) -> int:
        return len(self.action)

    def save(self, path: Path) -> None:
        """Write all arrays into a compressed `.npz` file."""
        content = io.BytesIO()
        np.savez_compressed(content, **self._asdict())
        write_whole({path: content.getvalue()})


#: Types of the columns that hold a number a decision.
_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("action", "proposed", "request_id", "status", "output_tokens"), np.int64),
    **dict.fromkeys(("propensity", "time_s", "ttft_s", "tpot_s", "e2e_s"), np.float64),
    **dict.fromkeys(("by_policy", "is_last"), np.bool_),
}
#: Stands for "the policy was not asked" among proposed actions.
NOT_ASKED = -1


def read_dataset(paths: Sequence[Path], *, on_bad_row: OnBadRow = "error") -> OfflineDataset:
    """Read decision logs that were written with `observations: true`.

    Args:
        paths: Files, or folders of rotated files.
        on_bad_row: Refuse the log at the first malformed row, or count and leave out.

    Raises:
        WorkloadError: If a row cannot be used, observations are of another version of the
            contract, or there are none.
    """
    bad: list[str] = []
    parsed = []
    for where, record in logged_rows(paths, on_bad_row, bad):
        try:
            parsed.append((parse_row(where, record), record, where))
        except WorkloadError:
            if on_bad_row == "error":
                raise
            bad.append(where)
    parsed.sort(key=lambda one: one[0].arrival_s)
    rows: list[dict[str, Any]] = []
    seen: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    num_blind = 0
    for i, (row, record, where) in enumerate(parsed):
        decisions = record["decisions"]
        for k, decision in enumerate(decisions):
            observation = decision.get("observation")
            if observation is None:
                num_blind += 1
                continue
            seen.append(_arrays(where, observation))
            done = row.status == "finished"
            gaps = row.output_tokens - 1
            proposed, chance = decision.get("proposed"), decision.get("propensity")
            rows.append(
                {
                    "action": decision["action"],
                    "proposed": proposed,
                    "propensity": math.nan if chance is None else float(chance),
                    "by_policy": decision.get("by") == "policy",
                    "request_id": i,
                    "is_last": k + 1 == len(decisions),
                    "time_s": row.arrival_s - parsed[0][0].arrival_s + decision["after_s"],
                    "status": STATUSES.index(row.status),
                    "ttft_s": row.ttft_s,
                    "tpot_s": (row.e2e_s - row.ttft_s) / gaps if done and gaps else math.nan,
                    "e2e_s": row.e2e_s if done else math.nan,
                    "output_tokens": row.output_tokens,
                }
            )
    if not rows:
        raise WorkloadError(
            "the log has no observations: set `observations: true` under dispatch.log in the "
            "router's configuration"
        )
    order = np.argsort([row["time_s"] for row in rows], kind="stable")
    width = max(replicas.shape[1] for replicas, _, _ in seen)
    replicas = np.zeros((len(rows), NUM_OBSERVED_FEATURES, width), np.float32)
    request = np.zeros((len(rows), NUM_OBSERVED_REQUEST_FEATURES), np.float32)
    mask = np.zeros((len(rows), width + 2), np.bool_)
    for at, i in enumerate(order.tolist()):
        shown, asked, allowed = seen[i]
        num = shown.shape[1]
        replicas[at, :, :num], request[at] = shown, asked
        mask[at, :num], mask[at, width:] = allowed[:num], allowed[num:]
    for decided in rows:
        proposed = decided["proposed"]
        decided["action"] = mask_action(decided["action"], width)
        decided["proposed"] = NOT_ASKED if proposed is None else mask_action(proposed, width)

    columns: dict[str, Any] = {
        name: np.array([rows[i][name] for i in order.tolist()], dtype)
        for name, dtype in _COLUMNS.items()
    }
    return OfflineDataset(
        replicas=replicas,
        request=request,
        mask=mask,
        **columns,
        num_skipped=len(bad) + num_blind,
    )


def _arrays(
    where: str, observation: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return features by replica `[F, R]`, of the request and the mask of one observation."""
    try:
        replicas = np.array(observation["replicas"], np.float32)
        request = np.array(observation["request"], np.float32)
        mask = np.array(observation["mask"], np.bool_)
        right = (
            replicas.ndim == 2
            and replicas.shape[1] == NUM_OBSERVED_FEATURES
            and request.shape == (NUM_OBSERVED_REQUEST_FEATURES,)
            and mask.shape == (len(replicas) + 2,)
        )
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise WorkloadError(
            f"{where}: its observation has not the {NUM_OBSERVED_FEATURES} features a replica and "
            f"{NUM_OBSERVED_REQUEST_FEATURES} a request of this version's contract"
        )
    return replicas.T, request, mask
