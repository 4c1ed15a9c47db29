"""Metrics of one run, from its outcomes, inter-token histogram and step log."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.nominal import reference_request_s
from servegym.cluster.outcome import SOURCE_COLUMNS, goodput_rps, latencies, within_slo
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType
from servegym.cluster.state import ITL_BINS_PER_DECADE, ITL_FIRST_S
from servegym.typing import FloatArray, IntArray

PERCENTILES = (50, 90, 95, 99)


def unloaded_s(outcomes: NDArray[np.void], spec: ClusterSpec) -> FloatArray:
    """E2E of each request alone on the fastest replica type, nothing cached; seconds."""
    fastest = min(spec.types, key=reference_request_s)
    prompt, output = outcomes["prompt_tokens"], outcomes["output_tokens"]
    grid, budget = fastest.grid, fastest.max_num_batched_tokens
    sizes = np.unique(np.geomspace(1, max(2, prompt.max()), 24).astype(int))
    prefill = [_prefill_s(fastest, int(size), budget) for size in sizes]
    steps = np.array([grid.step_s([], 1, int(kv)) for kv in (1, prompt.max() + output.max())])
    slope = (steps[1] - steps[0]) / max(1, prompt.max() + output.max() - 1)
    middle = prompt + 0.5 * output
    decode = (output - 1) * (steps[0] + slope * middle)
    return np.interp(prompt, sizes, prefill) + decode


def _prefill_s(replica: ReplicaType, prompt: int, budget: int) -> float:
    total, done = 0.0, 0
    while done < prompt:
        chunk = min(budget, prompt - done)
        total += replica.grid.step_s([(chunk, done)])
        done += chunk
    return total


def itl_percentile(histogram: IntArray, q: float) -> float:
    """Read a percentile off the histogram of inter-token times; its bins are 4.7 % wide."""
    total = histogram.sum()
    if total == 0:
        return float("nan")
    i = int(np.searchsorted(np.cumsum(histogram), q / 100 * total))
    return float(ITL_FIRST_S * 10 ** ((i + 0.5) / ITL_BINS_PER_DECADE))


def measure(
    outcomes: NDArray[np.void],
    steps: NDArray[np.void],
    histogram: IntArray,
    spec: ClusterSpec,
    episode: Episode,
    warmup: float = 0.2,
) -> dict[str, float]:
    """Reduce a drained run to numbers.

    Args:
        outcomes: `OUTCOME_DTYPE[n]`, in the order of the table.
        steps: `STEP_DTYPE[m]`.
        histogram: Inter-token times.
        spec: The cluster.
        episode: What was played.
        warmup: Share of the requests, the first of the table, that is left out of latencies: the
            same ones under every policy, also where requests wait for others' answers.

    Returns:
        Metrics by name; see `docs/evaluation.md`.
    """
    num_warmup = int(warmup * len(outcomes))
    kept = outcomes[num_warmup:]
    ttft, tpot, e2e = latencies(kept)
    out: dict[str, float] = {}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e)):
        real = values[~np.isnan(values)]
        out[f"{name}_mean_s"] = float(real.mean()) if len(real) else float("nan")
        for q in PERCENTILES:
            out[f"{name}_p{q}_s"] = float(np.percentile(real, q)) if len(real) else float("nan")
    for q in PERCENTILES:
        out[f"itl_p{q}_s"] = itl_percentile(histogram, q)
    queue = kept["scheduled_s"] - kept["arrival_s"]
    out["queue_mean_s"] = float(np.nanmean(queue)) if len(queue) else float("nan")
    good = within_slo(kept, spec)
    types = [spec.types[t] for t in episode.type_idx]
    gpus, usd_per_s = sum(t.num_gpus for t in types), sum(t.price_usd_per_h for t in types) / 3600
    out["slo_attainment"] = float(good.mean())
    for c, level in enumerate(spec.slo_classes):
        mine = kept["slo_class"] == c
        if mine.any():
            out[f"slo_attainment_{level.name}"] = float(good[mine].mean())
    out["goodput_rps"] = goodput_rps(kept, good, episode.table, num_warmup)
    out["goodput_rps_per_gpu"] = out["goodput_rps"] / gpus
    out["goodput_per_usd"] = out["goodput_rps"] / usd_per_s if usd_per_s else float("nan")
    out["normalised_latency_s"] = float(np.nanmean(e2e / kept["output_tokens"]))
    slowdown = e2e / unloaded_s(kept, spec)
    out["slowdown_mean"] = float(np.nanmean(slowdown))
    out["slowdown_p99"] = float(np.nanpercentile(slowdown, 99))
    groups = [np.nanmean(slowdown[kept["tenant"] == t]) for t in np.unique(kept["tenant"])]
    out["fairness_jain"] = float(np.sum(groups) ** 2 / (len(groups) * np.sum(np.square(groups))))
    out["max_wait_s"] = float(np.nanmax(queue)) if len(queue) else float("nan")
    for name, column in (
        ("preemptions", "num_preemptions"),
        ("restarts", "num_restarts"),
        ("holds", "num_holds"),
        ("rejected", "rejected"),
    ):
        out[name] = float(outcomes[column].sum())
    out["prefix_hit_rate"] = float(kept["cached_tokens"].sum() / kept["prompt_tokens"].sum())
    if len(steps):
        length = steps["end_s"] - steps["begin_s"]
        blocks = np.array([t.num_blocks for t in types])[steps["replica"]]
        out["kv_use_mean"] = float(np.average(steps["used_blocks"] / blocks, weights=length))
        out["kv_use_max"] = float((steps["used_blocks"] / blocks).max())
        out["batch_mean"] = float(np.average(steps["num_decodes"], weights=length))
        busy = np.bincount(steps["replica"], weights=length, minlength=len(types))
        out["busy_cv"] = float(busy.std() / busy.mean())
        if spec.disaggregated:
            roles = np.array([t.role for t in types])
            for role in np.unique(roles):
                out[f"busy_cv_{role}"] = float(
                    busy[roles == role].std() / busy[roles == role].mean()
                )
    if spec.disaggregated:
        out |= _of_transfers(outcomes, kept, spec)
    if spec.migrates:
        out |= _of_migrations(outcomes, spec)
    if spec.tiered:
        out |= _of_tiers(outcomes, kept, spec)
    return out


def _of_migrations(outcomes: NDArray[np.void], spec: ClusterSpec) -> dict[str, float]:
    """Reduce what moved to another replica while it waited or decoded."""
    paused_s = outcomes["paused_s"][outcomes["paused_s"] > 0]
    return {
        "migrations": float(outcomes["num_migrations"].sum()),
        "migrations_given_up": float(outcomes["num_stays"].sum()),
        "moved_gb": float((outcomes["moved_bytes"] - _loaded_bytes(outcomes, spec)).sum()) / 1e9,
        "pause_mean_s": float(paused_s.mean()) if len(paused_s) else 0.0,
        "pause_max_s": float(paused_s.max()) if len(paused_s) else 0.0,
    }


def _of_tiers(
    outcomes: NDArray[np.void], kept: NDArray[np.void], spec: ClusterSpec
) -> dict[str, float]:
    """Reduce what was loaded from behind the GPUs, and written there."""
    prompts = float(kept["prompt_tokens"].sum())
    found = {
        f"loaded_from_{column.removesuffix('_tokens')}": float(kept[column].sum()) / prompts
        for column in SOURCE_COLUMNS
    }
    loaded = np.sum([kept[column] for column in SOURCE_COLUMNS], axis=0) > 0
    ttft = latencies(kept)[0]
    loads_s = kept["landed_s"] - kept["transfer_s"]  # of the last load, unless others came after it
    return {
        **found,
        "loaded_share": float(loaded.mean()),
        "loaded_gb": float(_loaded_bytes(outcomes, spec).sum()) / 1e9,
        "stored_gb": float(outcomes["stored_bytes"].sum()) / 1e9,
        **({} if spec.disaggregated or spec.migrates else {"load_mean_s": _mean(loads_s[loaded])}),
        "ttft_loaded_mean_s": _mean(ttft[loaded]),
        "ttft_others_mean_s": _mean(ttft[~loaded]),
    }


def _mean(values: FloatArray) -> float:
    real = values[~np.isnan(values)]
    return float(real.mean()) if len(real) else float("nan")


def _loaded_bytes(outcomes: NDArray[np.void], spec: ClusterSpec) -> FloatArray:
    """What came from tiers and caches, and not from where a request was prefilled or decoded."""
    tokens = np.sum([outcomes[column] for column in SOURCE_COLUMNS], axis=0, dtype=np.float64)
    return np.asarray(tokens * spec.transfers.kv_token_bytes)


def _of_transfers(
    outcomes: NDArray[np.void], kept: NDArray[np.void], spec: ClusterSpec
) -> dict[str, float]:
    """Reduce what was prefilled on one replica and decoded on another."""
    moved_bytes = outcomes["moved_bytes"] - _loaded_bytes(outcomes, spec)
    moved = kept[~np.isnan(kept["landed_s"]) & ~np.isnan(kept["prefilled_s"])]
    found = {
        "transferred_share": len(moved) / len(kept),
        "moved_gb": float(moved_bytes.sum()) / 1e9,
    }
    if spec.tiered:  # of the others the last times may be those of a load where they decode
        moved = moved[moved["num_preemptions"] == 0]
    for name, begin, end in (
        ("prefill_mean_s", "arrival_s", "prefilled_s"),
        ("unfetched_mean_s", "prefilled_s", "transfer_s"),
        ("transfer_mean_s", "transfer_s", "landed_s"),
    ):
        found[name] = float((moved[end] - moved[begin]).mean()) if len(moved) else float("nan")
    return found
