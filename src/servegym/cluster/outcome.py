"""What a run leaves: outcomes, which metrics are computed from, step log and event log.

One format for simulated and live runs. The simulator makes outcomes of its own records; the event
log is a second account of the same run, by which tests check it (docs/simulator.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.cluster import state as s
from servegym.cluster.spec import ClusterSpec
from servegym.typing import BoolArray, FloatArray
from servegym.workloads.table import ANY_END, RequestTable

#: One event: `kind` is one of `state.EV_*`; `value` is cached tokens for `EV_ADMIT`, bytes for
#: `EV_TRANSFER` and `EV_LAND`, seconds without decoding for `EV_MIGRATE` and `EV_STAY`, else 0.
EVENT_DTYPE = np.dtype(
    [
        ("time_s", "f8"),
        ("value", "f8"),
        ("request", "i4"),
        ("replica", "i2"),
        ("kind", "i1"),
    ],
    align=True,
)
#: A stretch of equal engine steps of one replica: `num_steps` steps, each with `num_decodes`
#: decoding requests; `prefill_tokens` > 0 only for single steps. `used_blocks`: KV blocks held.
STEP_DTYPE = np.dtype(
    [
        ("begin_s", "f8"),
        ("end_s", "f8"),
        ("replica", "i2"),
        ("num_steps", "i4"),
        ("num_decodes", "i4"),
        ("prefill_tokens", "i4"),
        ("num_waiting", "i4"),
        ("used_blocks", "i4"),
    ],
    align=True,
)
#: One request's fate. Times are NaN for what did not happen; `rejected` requests have no replica.
#: `prefill_replica` is the one that computed its prompt for the replica where it decoded, or -1;
#: `transfer_s` is when both held memory for it; `moved_bytes` counts all its transfers that landed.
#: `num_migrations` counts moves to another replica while it waited or decoded, `num_stays` those
#: that were given up; `paused_s` is how long it decoded nowhere for them.
#: Loads from tiers and from other replicas count as transfers do, and the times are those of the
#: last of all; `host_tokens` and its like are what came from each source, `stored_bytes` what was
#: written to all tiers.
OUTCOME_DTYPE = np.dtype(
    [
        ("request", "i4"),
        ("arrival_s", "f8"),
        ("dispatch_s", "f8"),
        ("scheduled_s", "f8"),
        ("first_token_s", "f8"),
        ("finish_s", "f8"),
        ("replica", "i2"),
        ("rejected", "?"),
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),
        ("cached_tokens", "i4"),
        ("num_preemptions", "i2"),
        ("num_restarts", "i2"),
        ("num_holds", "i2"),
        ("slo_class", "i2"),
        ("tenant", "i4"),
        ("prefill_replica", "i2"),
        ("prefilled_s", "f8"),
        ("transfer_s", "f8"),
        ("landed_s", "f8"),
        ("moved_bytes", "f8"),
        ("num_migrations", "i2"),
        ("num_stays", "i2"),
        ("paused_s", "f8"),
        ("host_tokens", "i4"),
        ("disk_tokens", "i4"),
        ("store_tokens", "i4"),
        ("peer_tokens", "i4"),
        ("stored_bytes", "f8"),
    ]
)
#: What latencies, limits and goodput are worked out from: `OUTCOME_DTYPE` without the rest.
JUDGED_DTYPE = np.dtype(
    [
        (name, OUTCOME_DTYPE[name])
        for name in (
            "arrival_s",
            "first_token_s",
            "finish_s",
            "output_tokens",
            "slo_class",
            "rejected",
        )
    ],
    align=True,
)
#: Columns of what was loaded, in the order of the tiers; the last is of other replicas.
SOURCE_COLUMNS = ("host_tokens", "disk_tokens", "store_tokens", "peer_tokens")


def outcomes_from_events(events: NDArray[np.void], table: RequestTable) -> NDArray[np.void]:
    """Derive each request's fate from the event log.

    Args:
        events: `EVENT_DTYPE[m]` in order of time.
        table: The requests the log is about.

    Returns:
        `OUTCOME_DTYPE[n]`, in table order; requests that never arrived have NaN arrivals.
    """
    out = np.zeros(len(table), OUTCOME_DTYPE)
    out["request"] = np.arange(len(table))
    for name in out.dtype.names or ():
        if name.endswith("_s"):
            out[name] = np.nan
    out["replica"] = out["prefill_replica"] = -1
    out["prompt_tokens"] = table.prompt_tokens
    out["output_tokens"] = table.output_tokens
    out["slo_class"] = table.slo_class
    out["tenant"] = table.tenant

    def of(kind: int) -> NDArray[np.void]:
        return events[events["kind"] == kind]

    def first(kind: int, column: str) -> NDArray[np.void]:
        part = of(kind)
        rows, where = np.unique(part["request"], return_index=True)
        out[column][rows] = part["time_s"][where]
        return part[where]

    first(s.EV_ARRIVE, "arrival_s")
    admitted = first(s.EV_ADMIT, "scheduled_s")
    out["cached_tokens"][admitted["request"]] = admitted["value"].astype(np.int32)
    first(s.EV_FIRST_TOKEN, "first_token_s")
    first(s.EV_FINISH, "finish_s")

    def last(kind: int, time: str, replica: str | None = None) -> None:
        part = of(kind)  # later rows overwrite earlier ones
        out[time][part["request"]] = part["time_s"]
        if replica is not None:
            out[replica][part["request"]] = part["replica"]

    last(s.EV_DISPATCH, "dispatch_s")
    last(s.EV_PREFILLED, "prefilled_s", "prefill_replica")
    last(s.EV_TRANSFER, "transfer_s")
    last(s.EV_LAND, "landed_s")
    out["paused_s"] = 0.0
    migrations = events[np.isin(events["kind"], (s.EV_MIGRATE, s.EV_STAY))]
    np.add.at(out["paused_s"], migrations["request"], migrations["value"])
    sent = events[np.isin(events["kind"], (s.EV_DISPATCH, s.EV_PLACE, s.EV_MIGRATE))]
    out["replica"][sent["request"]] = sent["replica"]
    for kind, column in (
        (s.EV_LAND, "moved_bytes"),
        (s.EV_HOST, "host_tokens"),
        (s.EV_DISK, "disk_tokens"),
        (s.EV_STORE, "store_tokens"),
        (s.EV_PEER, "peer_tokens"),
        (s.EV_STORED, "stored_bytes"),
    ):
        part = of(kind)
        np.add.at(out[column], part["request"], part["value"].astype(out[column].dtype))
    rejected = of(s.EV_REJECT)
    out["rejected"][rejected["request"]] = True
    out["finish_s"][rejected["request"]] = rejected["time_s"]
    out["replica"][rejected["request"]] = -1
    for kind, column in (
        (s.EV_PREEMPT, "num_preemptions"),
        (s.EV_RETURN, "num_restarts"),
        (s.EV_HOLD, "num_holds"),
        (s.EV_MIGRATE, "num_migrations"),
        (s.EV_STAY, "num_stays"),
    ):
        out[column] = np.bincount(of(kind)["request"], minlength=len(table))
    return out


def within_slo(outcomes: NDArray[np.void], spec: ClusterSpec) -> BoolArray:
    """Which requests met all limits of their class; rejected ones did not."""
    ttft, tpot, _ = latencies(outcomes)
    limits = np.array([(c.ttft_s, c.tpot_s) for c in spec.slo_classes])
    ttft_limit, tpot_limit = (limit.take(outcomes["slo_class"]) for limit in limits.T)
    ok = (ttft <= ttft_limit) & ~(tpot > tpot_limit)  # one token has no TPOT to exceed
    return np.asarray(ok & ~outcomes["rejected"])


def arrivals_end_s(outcomes: NDArray[np.void], table: RequestTable) -> float:
    """Return until when requests count for goodput: the last arrival if answers took no time.

    That is the same under every policy. What comes later, since it waited for slow answers, does
    not count: else the last turn of the longest session would rule the rate. Requests of clients
    have no times of their own; there it is the last arrival.
    """
    last_s = float(outcomes["arrival_s"].max())
    anyone = bool((table.after == ANY_END).any())
    return last_s if anyone else min(last_s, float(table.arrival_s[-1]))


def goodput_rps(
    outcomes: NDArray[np.void], good: BoolArray, table: RequestTable, first: int = 0
) -> float:
    """Return requests within their limits per second of the time in which requests arrive.

    Args:
        outcomes: Those that are judged, `OUTCOME_DTYPE[m]`.
        good: Which of them met their limits, `bool[m]`.
        table: What was played.
        first: The first request of the table that is judged.

    Returns:
        Requests per second until `arrivals_end_s`; of a batch, until its last finish; NaN if no
        time passes.
    """
    arrival_s, end_s = outcomes["arrival_s"], arrivals_end_s(outcomes, table)
    begin_s = float(arrival_s.min())
    if not (table.after == ANY_END).any():
        begin_s = float(table.arrival_s[first])
    if end_s <= begin_s:
        end_s = float(np.nan_to_num(outcomes["finish_s"]).max())
    span_s = end_s - begin_s
    return float(good[arrival_s <= end_s].sum() / span_s) if span_s > 0 else float("nan")


def worth_in_time(outcomes: NDArray[np.void], spec: ClusterSpec, table: RequestTable) -> float:
    """Return the weight of what counts for goodput, per request of the table."""
    counts = within_slo(outcomes, spec)
    counts &= outcomes["arrival_s"] <= arrivals_end_s(outcomes, table)
    weight = np.array([c.weight for c in spec.slo_classes])[outcomes["slo_class"]]
    return float(weight[counts].sum()) / len(table)


def latencies(outcomes: NDArray[np.void]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return TTFT, TPOT (NaN for one token) and E2E in seconds, NaN for rejected requests."""
    served = ~outcomes["rejected"]
    ttft = np.where(served, outcomes["first_token_s"] - outcomes["arrival_s"], np.nan)
    e2e = np.where(served, outcomes["finish_s"] - outcomes["arrival_s"], np.nan)
    decode = outcomes["finish_s"] - outcomes["first_token_s"]
    more = outcomes["output_tokens"] - 1
    tpot = np.where(served & (more > 0), decode / np.maximum(more, 1), np.nan)
    return ttft, tpot, e2e
