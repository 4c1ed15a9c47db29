"""Draw workloads for vLLM, compare its runs with ours, keep some as recordings.

python -m conformance.compare draw 500 workloads.json pairs.json
python -m conformance.compare report workloads.json runs.json pairs.json pair_runs.json
python -m conformance.compare record workloads.json runs.json pairs.json pair_runs.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .simulated import (
    PAIR_REQUEST,
    first_difference,
    first_difference_of_pairs,
    outcome_of,
    play_compiled,
    play_compiled_pair,
    play_pair,
    play_reference,
)
from .workloads import (
    for_driver,
    random_drafted,
    random_pair,
    random_workload,
    serving_workload,
)

RECORDED = Path(__file__).parent / "recorded"
#: Seeds worth keeping: short, with preemptions, hits and cut prompts, and for each rule of
#: admission and of the block pool a few that go otherwise without it.
KEPT = (
    *(41, 51, 73, 76, 144, 146, 165, 183, 256, 262, 275, 338, 401, 402, 435, 440, 461, 477, 487),
    *(28, 343, 473),
)
#: Of those, what is kept of priority mode: with preemptions, some that leave others out of a step.
KEPT_BY_PRIORITY = (41, 51, 76, 146, 183, 262, 343, 401, 440, 477)
#: And of asynchronous scheduling: with preemptions, some of requests that had just ended.
KEPT_OVERLAPPED = (41, 51, 76, 146, 183, 275, 343, 401, 473, 477)
#: Workloads with drafts that are kept: short, with preemptions and hits; in some (280, 318, 373) a
#: prompt with one token left is padded.
KEPT_DRAFTED = (5, 15, 51, 183, 275, 280, 318, 338, 343, 373, 477)
#: Pairs that are kept: short, with memory short at either end, hits, and cut prompts.
KEPT_PAIRS = (28, 109, 117, 146, 183, 232, 292)
STEP = (
    "begin_s",
    "scheduled",
    "admitted",
    "preempted",
    "num_waiting",
    "free_blocks",
    "finished",
)
#: Lists of steps in a run: of one replica, or of a pair.
STEP_LISTS = ("steps", "prefill", "decode")


def draw(num_random: int) -> list[dict[str, Any]]:
    """Draw small random workloads, the kept ones among them, and large ones to measure with."""
    seeds = sorted({*range(num_random), *KEPT})
    modes = ["default", "priority", "overlap"]
    small = [for_driver(random_workload(seed), modes) for seed in seeds]
    large = [
        for_driver(
            serving_workload(seed, prefix_caching=caching, num_blocks=num_blocks),
            ["default", "first_chunk", "overlap", "drafts"],
        )
        for caching in (False, True)
        for num_blocks in (500, 1500)
        for seed in (0, 1)
    ]
    drafted = [
        for_driver(random_drafted(seed), ["drafts"])
        for seed in sorted({*range(num_random), *KEPT_DRAFTED})
    ]
    return small + drafted + large


def draw_pairs(num_random: int) -> list[dict[str, Any]]:
    """Draw workloads for a replica that prefills and one that decodes, the kept ones included."""
    return [for_driver(random_pair(seed), []) for seed in sorted({*range(num_random), *KEPT_PAIRS})]


def report_pairs(workloads: list[dict[str, Any]], told: dict[str, Any]) -> bool:
    """Print how many pairs agree at every step of both replicas; True if all do."""
    total: Counter[str] = Counter()
    same: Counter[str] = Counter()
    early: Counter[str] = Counter()
    compiled: Counter[str] = Counter()
    for workload, run in zip(workloads, told["runs"], strict=True):
        kind = "caching" if workload["prefix_caching"] else "no caching"
        total[kind] += 1
        difference = first_difference_of_pairs(play_pair(workload), run)
        same[kind] += difference is None
        if difference is not None:
            difference = first_difference_of_pairs(play_pair(workload, early=True), run)
        early[kind] += difference is None
        compiled[kind] += same_outcome(play_compiled_pair(workload), outcome_of(run))
        if difference is not None:
            print(f"  pair {workload['seed']}, {kind}: {difference[:160]}")
    print("\npairs, prefix caching | workloads | identical | and with early identity | compiled")
    for kind in sorted(total):
        print(f"{kind} | {total[kind]} | {same[kind]} | {early[kind]} | {compiled[kind]}")
    return early == total


def report(workloads: list[dict[str, Any]], told: dict[str, Any]) -> bool:
    """Print how many workloads agree and how large the differences are; True if all agree."""
    print(f"vLLM {told['vllm']}, step by step, then the compiled simulator's requests:\n")
    total: Counter[tuple[str, ...]] = Counter()
    same: Counter[tuple[str, ...]] = Counter()
    early: Counter[tuple[str, ...]] = Counter()
    ordered: Counter[tuple[str, ...]] = Counter()
    overlapped: Counter[tuple[str, ...]] = Counter()
    compiled: Counter[tuple[str, ...]] = Counter()
    shown = 0
    large, drafted = [], []
    for workload, run in zip(workloads, told["runs"], strict=True):
        if "first_chunk" in run:
            large.append((workload, run))
            continue
        if "drafts" in run:
            drafted.append((workload, run["drafts"]))
            continue
        kind = (
            "caching" if workload["prefix_caching"] else "no caching",
            "chunked" if workload["chunked_prefill"] else "whole",
        )
        total[kind] += 1
        difference = first_difference(play_reference(workload), run["default"])
        same[kind] += difference is None
        if difference is not None:
            difference = first_difference(play_reference(workload, early=True), run["default"])
        early[kind] += difference is None
        compiled[kind] += same_outcome(play_compiled(workload), outcome_of(run["default"]))
        by_priority = play_reference(workload, early=True, priority=True)
        unlike = first_difference(by_priority, run["priority"])
        ordered[kind] += unlike is None
        ahead = play_reference(workload, early=True, overlap=True)
        other = first_difference(ahead, run["overlap"])
        overlapped[kind] += other is None
        difference = difference or unlike or other
        if difference is not None and shown < 10:
            shown += 1
            print(f"  seed {workload['seed']}, {' '.join(kind)}: {difference[:160]}")
    print(
        "\nprefix caching / prefill | workloads | identical | and with early identity | compiled "
        "| in priority mode, with early identity | with asynchronous scheduling, likewise"
    )
    for kind in sorted(total):
        counts = f"{total[kind]} | {same[kind]} | {early[kind]} | {compiled[kind]}"
        counts += f" | {ordered[kind]} | {overlapped[kind]}"
        print(f"{' / '.join(kind)} | {counts}")
    all_drafted = report_drafted(drafted)
    if large:
        report_sizes(large)
    return early == ordered == overlapped == total and all_drafted


def report_drafted(told: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Print how many workloads with drafts agree; True if all do."""
    total: Counter[str] = Counter()
    same: Counter[str] = Counter()
    compiled: Counter[str] = Counter()
    for workload, run in told:
        kind = "caching" if workload["prefix_caching"] else "no caching"
        total[kind] += 1
        difference = first_difference(play_reference(workload, drafts=True), run)
        same[kind] += difference is None
        compiled[kind] += same_outcome(play_compiled(workload, drafts=True), outcome_of(run))
        if difference is not None:
            print(f"  with drafts {workload['seed']}, {kind}: {difference[:160]}")
    print("\nwith drafts, prefix caching | workloads | identical | compiled")
    for kind in sorted(total):
        print(f"{kind} | {total[kind]} | {same[kind]} | {compiled[kind]}")
    return same == total


def same_outcome(ours: dict[str, Any], engine: dict[str, Any]) -> bool:
    """Whether all requests went the same way, times within rounding."""
    return all(np.allclose(ours[name], engine[name], rtol=1e-9, atol=1e-12) for name in engine)


def report_sizes(large: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Print what differences mean for latencies on the large workloads."""
    print("\nmean TTFT s, mean E2E s, share of prompt tokens cached, preemptions, steps:")
    for workload, run in large:
        print(
            f"\nseed {workload['seed']}, caching {workload['prefix_caching']}, "
            f"{workload['num_blocks']} blocks, {len(workload['requests'])} requests"
        )
        rows = {"engine": run["default"], "ours": play_reference(workload)}
        rows["ours, early identity"] = play_reference(workload, early=True)
        rows["engine, first chunk"] = run["first_chunk"]
        rows["engine, overlapped"] = run["overlap"]
        rows["ours, overlapped"] = play_reference(workload, overlap=True)
        rows["ours, overlapped, early identity"] = play_reference(
            workload, early=True, overlap=True
        )
        rows["engine, drafts"] = run["drafts"]
        rows["ours, drafts"] = play_reference(workload, drafts=True)
        want = summary(workload, rows["engine"])
        for name, row in rows.items():
            got = summary(workload, row)
            ttft, e2e = (100 * (got[k] / want[k] - 1) for k in (0, 1))
            mode = next((m for m in ("overlap", "drafts") if m in name), "default")
            engine = run[mode]
            same = first_difference(row, engine) is None
            print(
                f"  {name:34} {got[0]:8.4f} ({ttft:+6.2f} %) {got[1]:8.4f} ({e2e:+6.2f} %) "
                f"{got[2]:7.4f} {got[3]:5.0f} {got[4]:6.0f}{'  identical' if same else ''}"
            )


def summary(workload: dict[str, Any], run: dict[str, Any]) -> tuple[float, ...]:
    """Return mean TTFT and E2E, cached share, preemptions and steps."""
    requests = workload["requests"]
    arrival_s = np.array([r[0] for r in requests])
    return (
        float(np.mean(run["first_token_s"] - arrival_s)),
        float(np.mean(run["finish_s"] - arrival_s)),
        float(np.sum(run["cached_tokens"]) / sum(r[1] for r in requests)),
        float(sum(len(s["preempted"]) for s in run["steps"])),
        float(len(run["steps"])),
    )


def record(workloads: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """Write the kept workloads and what vLLM did, one step a line."""
    RECORDED.mkdir(exist_ok=True)
    for workload, run in zip(workloads, told["runs"], strict=True):
        if "first_chunk" in run:
            continue
        if "drafts" in run:
            if workload["seed"] in KEPT_DRAFTED:
                path = RECORDED / f"drafted-{workload['seed']}.json"
                _write(path, workload, told["vllm"], run["drafts"])
            continue
        if workload["seed"] not in KEPT:
            continue
        _write(RECORDED / f"seed-{workload['seed']}.json", workload, told["vllm"], run["default"])
        if workload["seed"] in KEPT_BY_PRIORITY:
            path = RECORDED / f"priority-{workload['seed']}.json"
            _write(path, workload, told["vllm"], run["priority"])
        if workload["seed"] in KEPT_OVERLAPPED:
            path = RECORDED / f"overlapped-{workload['seed']}.json"
            _write(path, workload, told["vllm"], run["overlap"])


def record_pairs(workloads: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """Write the kept pairs and what vLLM did, one step a line."""
    for workload, run in zip(workloads, told["runs"], strict=True):
        if workload["seed"] in KEPT_PAIRS:
            _write(RECORDED / f"pair-{workload['seed']}.json", workload, told["vllm"], run)


def _write(path: Path, workload: dict[str, Any], vllm: str, row: dict[str, Any]) -> None:
    given = {k: v for k, v in workload.items() if k not in ("grid", "modes")}
    lists = [k for k in STEP_LISTS if k in row]
    head = {"vllm": vllm, "workload": given} | {k: v for k, v in row.items() if k not in lists}
    text = json.dumps(head, separators=(",", ":"))[:-1]
    for name in lists:
        lines = [json.dumps([s[k] for k in STEP], separators=(",", ":")) for s in row[name]]
        text += f',"{name}":[\n' + ",\n".join(lines) + "\n]"
    path.write_text(text + "}\n")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a recorded workload and vLLM's run of it."""
    told = json.loads(path.read_text())
    run = {k: told[k] for k in PAIR_REQUEST if k in told}
    for name in STEP_LISTS:
        if name in told:
            run[name] = [dict(zip(STEP, row, strict=True)) for row in told[name]]
    return told["workload"], run


def main() -> None:
    """Draw, report or record."""
    command, *given = sys.argv[1:]
    if command == "draw":
        Path(given[1]).write_text(json.dumps({"workloads": draw(int(given[0]))}))
        Path(given[2]).write_text(json.dumps({"workloads": draw_pairs(int(given[0]))}))
        return
    workloads, told, pairs, told_pairs = (json.loads(Path(name).read_text()) for name in given)
    if command == "record":
        record(workloads["workloads"], told)
        record_pairs(pairs["workloads"], told_pairs)
        return
    agree = report(workloads["workloads"], told)
    if not (report_pairs(pairs["workloads"], told_pairs) and agree):
        sys.exit("the simulator and vLLM differ")


if __name__ == "__main__":
    main()
